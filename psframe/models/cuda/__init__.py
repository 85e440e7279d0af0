"""The built-in layers on a GPU: kernels of their own, cuBLAS, and memory that is reused."""

from psframe.models.cuda.net import Net

__all__ = ["Net"]
