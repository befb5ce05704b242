"""The networks clients train, by name, and their weights as a function of what a server can compute."""

from models.meta import MetaModel
from models.zoo import MODELS, build, load_weights

__all__ = ["MODELS", "MetaModel", "build", "load_weights"]
