"""Federated mode: rounds of FedAvg with weight updates, which the server attacks as it receives them."""

from utils.interrupt import die_of_sigint

if __name__ == "__main__":
    die_of_sigint()  # while modules are imported

from runner.workers import preload_workers
from utils.environment import require_modules, require_working_directory

if __name__ == "__main__":
    require_modules(("torch", "numpy", "tqdm"), "run sh experiments/fed/dlg.sh once, then use .venv/bin/python")
    require_working_directory()
    preload_workers()  # before torch is imported here

from runner.flags import Fed
from runner.run import main
from runner.sources import federated_source

if __name__ == "__main__":
    main("fed", Fed, federated_source)
