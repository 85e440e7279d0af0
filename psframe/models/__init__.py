"""Models with hand-derived gradients, on NumPy and CuPy arrays."""

from __future__ import annotations

from psframe.models.base import Model, check_model
from psframe.models.factory import NAMES, create
from psframe.models.mlp import MLP
from psframe.models.softmax import Softmax

__all__ = ["MLP", "NAMES", "Model", "Softmax", "check_model", "create"]
