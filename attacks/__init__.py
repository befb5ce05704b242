"""Attacks on one update of a federated client.

    from attacks import IGSingle
    result = IGSingle(iterations=300)(model, gradients, input_shape=(3, 32, 32))
    result.examples, result.labels

Every attack is a class of this package; `attacks.ATTACKS` maps the names of the command line to them.
"""

from typing import Any

from attacks.base import ATTACKS, Attack

__all__ = ["ATTACKS", "Attack"]


def __getattr__(name: str) -> Any:
    """Attack classes by name, imported at their first use."""
    if name[:1].isupper():  # submodules are not classes, and must not wait for all of them
        for cls in ATTACKS.values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'attacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(cls.__name__ for cls in ATTACKS.values())])
