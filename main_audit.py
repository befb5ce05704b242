"""Audit: every attack that applies to a model and a recipe, or to a captured update, and a verdict."""

from utils.interrupt import die_of_sigint

if __name__ == "__main__":
    die_of_sigint()  # while modules are imported

from utils.environment import require_modules, require_working_directory

if __name__ == "__main__":
    require_modules(("torch", "numpy", "tqdm"), "run sh experiments/grad/dlg.sh once, then use .venv/bin/python")
    require_working_directory()

from runner.audit import main

if __name__ == "__main__":
    main()
