"""The networks that clients train: `build` makes one by name, `load_weights` reads trained weights into it.

A new network is a function under `models.zoo.registry.model` in a file of this folder.
"""

from models.zoo.registry import MODELS, build
from models.zoo.weights import load_weights

__all__ = ["MODELS", "build", "load_weights"]
