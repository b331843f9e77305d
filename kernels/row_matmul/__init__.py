"""Rows times weights, with the norm before and what comes behind: of few rows in a decode step, of many in an MLP."""

from lragent_jax.kernels.row_matmul.api import row_matmul
from lragent_jax.kernels.row_matmul.arguments import Norm, Shrink

__all__ = ["Norm", "Shrink", "row_matmul"]
