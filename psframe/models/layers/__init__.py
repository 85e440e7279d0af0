"""The layers that models are made of, with hand-derived gradients, on NumPy and CuPy arrays."""

from psframe.models.layers.activations import Flatten, ReLU, Tanh
from psframe.models.layers.base import Context, Layer
from psframe.models.layers.convolution import Conv2D
from psframe.models.layers.dense import Dense
from psframe.models.layers.dropout import Dropout
from psframe.models.layers.normalization import BatchNorm
from psframe.models.layers.pooling import AveragePool2D, GlobalAveragePool2D, MaxPool2D

__all__ = [
    "AveragePool2D",
    "BatchNorm",
    "Context",
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAveragePool2D",
    "Layer",
    "MaxPool2D",
    "ReLU",
    "Tanh",
]
