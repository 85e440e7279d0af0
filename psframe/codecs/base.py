"""What every codec has: an encoder for who sends a gradient, a decoder for who receives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from psframe.layout import Array, Layout

__all__ = ["Codec", "Decoder", "Encoder"]


@runtime_checkable
class Encoder(Protocol):
    """Turns the gradients of one sender into payloads; it has state, and is not thread-safe.

    A payload of a gradient that is not finite decodes to one that is not: the receiver refuses it,
    and with error feedback the residual stays as it was.

    Attributes:
        bytes_max: the longest payload that it can make.
    """

    bytes_max: int

    def encode(self, grad: Array, out: Array) -> int:
        """Write one gradient's payload. With error feedback it is that of gradient + residual.

        Args:
            grad: (end - begin,) elements of the layout's dtype, contiguous; only read, and the
                caller's again on return.
            out: `bytes_max` bytes or more of uint8, contiguous, beginning at a multiple of 8 in
                memory; the caller's. It must not overlap `grad`.

        Returns:
            How many bytes of `out` are the payload; what lies behind them is undefined.

        Raises:
            ValueError: an array is not like that; then nothing has changed.
        """

    @property
    def residual(self) -> Array | None:
        """What payloads have lacked so far, (end - begin,); None without error feedback.

        The encoder's own memory: to be read until the next `encode`, not written.
        """


@runtime_checkable
class Decoder(Protocol):
    """Turns payloads into dense gradients. Stateless: one serves all senders, one at a time.

    Attributes:
        bytes_max: the longest payload that is one.
    """

    bytes_max: int

    def decode(self, payload: Array, out: Array) -> None:
        """Check a payload, which nobody has looked at before, and write what it stands for.

        Args:
            payload: contiguous uint8 of any length, anywhere in memory; only read, and the
                caller's again on return.
            out: (end - begin,) elements of the layout's dtype, contiguous; the caller's. All of it
                is written. It must not overlap `payload`.

        Raises:
            MessageError: no encoder makes such a payload. `out` is undefined then.
            ValueError: `out` is not like that, or `payload` is no array of bytes.
        """


@runtime_checkable
class Codec(Protocol):
    """What travels in place of a dense gradient: a frozen dataclass, equal on every rank.

    Attributes:
        error_feedback: whether a sender adds to a gradient what its earlier payloads have lacked
            (Seide et al., 1-Bit Stochastic Gradient Descent, 2014).
    """

    @property
    def error_feedback(self) -> bool: ...

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> Encoder:
        """Make the state of one sender for the shard [begin, end) of the flat vector.

        Args:
            layout, begin, end: the parameters, and the shard.
            seed: integers >= 0 that determine all random numbers; those of no other sender.

        Raises:
            ValueError: the shard is not in the vector, or too long for the codec.
        """

    def decoder(self, layout: Layout, begin: int, end: int) -> Decoder:
        """Make what a receiver needs for that shard.

        Raises:
            ValueError: as `encoder`.
        """
