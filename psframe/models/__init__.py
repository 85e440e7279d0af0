"""Models with hand-derived gradients, on NumPy and CuPy arrays; `layers` to make one's own of."""

from __future__ import annotations

from psframe.models import layers
from psframe.models.base import Model, check_model
from psframe.models.cnn import CNN
from psframe.models.factory import NAMES, create
from psframe.models.mlp import MLP
from psframe.models.sequential import Sequential
from psframe.models.softmax import Softmax

__all__ = [
    "CNN",
    "MLP",
    "NAMES",
    "Model",
    "Sequential",
    "Softmax",
    "check_model",
    "create",
    "layers",
]
