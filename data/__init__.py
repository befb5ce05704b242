"""Labelled examples in three disjoint splits: `load(name, ...)`.

A new data set is a function under `data.base.register` in a file of this folder.
"""

from data.base import DATASETS, Dataset, Normalize, load
from data.partition import Scheme, partition
from data.selection import Public, Victims
from data.splits import Split

__all__ = ["DATASETS", "Dataset", "Normalize", "Public", "Scheme", "Split", "Victims", "load", "partition"]
