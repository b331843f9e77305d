"""Few rows times weights, with the norm before and what comes behind: what a decode step does around its attention."""

from lragent_jax.kernels.row_matmul.api import row_matmul
from lragent_jax.kernels.row_matmul.arguments import Norm, Shrink

__all__ = ["Norm", "Shrink", "row_matmul"]
