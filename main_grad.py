"""Gradient mode: each trial is the gradient of one private batch, which the server attacks."""

from utils.interrupt import die_of_sigint

if __name__ == "__main__":
    die_of_sigint()  # while modules are imported

from runner.workers import preload_workers
from utils.environment import require_modules, require_working_directory

if __name__ == "__main__":
    require_modules(("torch", "numpy", "tqdm"), "run sh experiments/grad/dlg.sh once, then use .venv/bin/python")
    require_working_directory()
    preload_workers()  # before torch is imported here

from runner.flags import Grad
from runner.run import main
from runner.sources import gradient_source

if __name__ == "__main__":
    main("grad", Grad, gradient_source)
