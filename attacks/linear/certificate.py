"""Rank certificates: neurons that share their weights prove that an example stands alone.

R neurons with equal weights w and bias c, but different places in the network behind, are active for the same examples:
their gradient is the R x d matrix  sum_i d_i x_i^T  over these examples, with another d_i in R^R for each. Its rank is
their number, up to R, so a matrix of rank one is a multiple of one example. Unlike the brightness of a row, which any
mixture of the bin's examples has, the rank can be wrong only where two examples have parallel d_i.
"""

import math

import torch
from torch import Tensor

ROUNDING = 2**-22  # of a sum in float32, relative to the norm of its addends' sum


def main_direction(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first left singular vector (R, K) of each bin's rows, and their second singular value (K,).

    weight: (R, K, d), the gradients of the R neurons of each of K bins. With R = 1 the second value is infinite.
    """
    rows = weight.transpose(0, 1)  # (K, R, d)
    squares, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending, (K, R) and (K, R, R)
    second = squares[:, -2].clamp(min=0).sqrt() if len(weight) > 1 else torch.full_like(squares[:, 0], math.inf)
    return vectors[:, :, -1].T, second


def is_certain(second: Tensor, size: Tensor, rounding: Tensor, resolution: float) -> Tensor:
    """(K,) which bins hold one example: s_2 is rounding, and rounding could not hide a second example.

    second, size: s_2 and s_1 (K,). rounding: its largest share in s_2 (K,). resolution: the least s_2 / s_1 of two
    examples in one bin.
    """
    return (second <= rounding) & (rounding <= resolution * size)
