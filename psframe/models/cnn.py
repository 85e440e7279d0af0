"""Convolutional networks for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from psframe.errors import ArgumentError
from psframe.models.layers import BatchNorm, Conv2D, Dense, Dropout, Flatten, Layer, MaxPool2D, ReLU
from psframe.models.sequential import Sequential

__all__ = ["CNN"]

# Images with a shorter side than this keep their size through the first convolution.
_SMALL = 16
# Channels of each convolution, and whether a pooling follows.
_SMALL_LAYERS = ((16, False), (32, True))
_LARGE_LAYERS = ((32, True), (64, True), (64, True))


class CNN(Sequential):
    """Convolutions with batch normalisation and ReLU, pooling, and two dense layers.

    Images of less than 16 pixels a side: convolutions of 16 and 32 channels, one pooling, a dense
    layer of 64 units. Larger ones: convolutions of 32, 64 and 64 channels, each followed by a
    pooling, a dense layer of 128 units. Then dropout, and a unit a class. The dense layer is
    normalised too: the first steps of Adagrad and Adam move each of its many weights by the whole
    learning rate in one direction, which may leave its units dead.

    Args:
        input_shape: of one sample: (h, w), or (c, h, w).
        n_classes: k.

    Raises:
        ArgumentError: samples are no images, or too small for it.
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int) -> None:
        shape = tuple(input_shape)
        if len(shape) not in (2, 3):
            raise ArgumentError(
                "model 'cnn': expected images of (height, width) or (channels, height, width), "
                f"got samples of shape {shape}; take --model mlp, or give the data its shape"
            )
        if min(shape[-2:]) < 4:
            raise ArgumentError(
                f"model 'cnn': images of {shape[-2]} x {shape[-1]} are too small, expected at "
                "least 4 x 4; take --model mlp"
            )
        small = min(shape[-2:]) < _SMALL
        layers: list[Layer] = []
        for channels, pooled in _SMALL_LAYERS if small else _LARGE_LAYERS:
            layers += [Conv2D(channels, bias=False), BatchNorm(), ReLU()]
            if pooled:
                layers.append(MaxPool2D(2))
        units = 64 if small else 128
        layers += [Flatten(), Dense(units), BatchNorm(), ReLU(), Dropout(0.5), Dense(n_classes)]
        super().__init__(shape, layers)
