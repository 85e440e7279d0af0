"""Random changes to images while training, a function of the block's own random stream."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Shift each image by up to `shift` pixels each way, and mirror half of them.

    What is shifted in is 0, the mean of standardised data.

    Attributes:
        shift: pixels, >= 0.
        flip: whether to mirror left and right.
    """

    shift: int = 0
    flip: bool = False

    @classmethod
    def parse(cls, text: str) -> Augmentation | None:
        """Read what --augment takes: "shift=2,flip"; None for an empty text.

        Raises:
            ArgumentError: it is something else.
        """
        shift, flip = 0, False
        for word in text.replace(" ", "").split(","):
            name, equals, value = word.partition("=")
            if name == "flip" and not equals:
                flip = True
            elif name == "shift" and value.isdecimal() and int(value) <= 10_000:
                shift = int(value)
            elif word:
                near = difflib.get_close_matches(name, ("shift", "flip"), n=1)
                hint = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
                raise ArgumentError(f"--augment: expected shift=PIXELS or flip, got {word!r}{hint}")
        return cls(shift, flip) if shift or flip else None

    def check(self, input_shape: tuple[int, ...], name: str) -> None:
        """Raise ArgumentError unless samples of that shape are images large enough for it."""
        if len(input_shape) not in (2, 3):
            raise ArgumentError(
                f"--augment: {name} has samples of shape {input_shape}, expected images of "
                "(height, width) or (channels, height, width)"
            )
        if self.shift >= min(input_shape[-2:]):
            raise ArgumentError(
                f"--augment: shift={self.shift} moves images of {input_shape[-2]} x "
                f"{input_shape[-1]} out of sight"
            )

    def apply(
        self, x: npt.NDArray[np.float32], rng: np.random.Generator
    ) -> npt.NDArray[np.float32]:
        """Change images (n, h, w) or (n, c, h, w); gives fresh memory.

        The same generator state gives the same images.
        """
        n, (height, width) = len(x), x.shape[-2:]
        images = x.reshape(n, -1, height, width)
        rows = np.broadcast_to(np.arange(height), (n, height))
        columns = np.broadcast_to(np.arange(width), (n, width))
        if self.shift:
            k = self.shift
            moved = rng.integers(-k, k + 1, size=(2, n, 1))
            images = np.pad(images, ((0, 0), (0, 0), (k, k), (k, k)))
            rows, columns = rows + k + moved[0], columns + k + moved[1]
        if self.flip:
            mirrored = rng.random((n, 1)) < 0.5
            columns = np.where(mirrored, columns[:, ::-1], columns)
        samples, channels = np.arange(n)[:, None, None, None], np.arange(images.shape[1])
        result = images[
            samples,
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        return np.ascontiguousarray(result).reshape(x.shape)
