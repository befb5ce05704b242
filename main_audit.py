"""Audit: every attack that applies to a model and a recipe, or to a captured update, and a verdict."""

from utils.environment import require_modules

if __name__ == "__main__":
    require_modules(("torch", "numpy", "tqdm"), "run sh experiments/grad/dlg.sh once, then use .venv/bin/python")

from runner.audit import main

if __name__ == "__main__":
    main()
