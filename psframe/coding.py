"""Codecs at work: gradients on their way to the servers, and parameters on their way back.

A gradient is coded in its slot: what the slot holds afterwards is what a receiver decodes, to the
bit, so that a server that reads the slot in place and one that is sent the payload apply the same.

Of parameters the difference is coded to what the worker has: the server keeps a copy of that for
each worker, its *mirror*, and adds to it what the worker decodes. What a payload lacks is in the
next difference, so that errors do not add up. The first parameters that a worker gets, and those
of an evaluation, are sent as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from psframe.codecs import QSGD, Codec, Encoder, Sign
from psframe.codecs.shard import is_finite
from psframe.errors import MessageError
from psframe.layout import Array, Layout

__all__ = [
    "CODED",
    "Coded",
    "PullCoder",
    "PullDecoder",
    "PushCoder",
    "Traffic",
    "as_codec",
    "as_pull_codec",
    "payload_buffer",
    "push_seed",
]

# Streams of random numbers of a seed, beside those of workers and of compute times.
_PUSH_STREAM, _PULL_STREAM = 3, 4
# In buckets of d = 512, QSGD's error is below sqrt(d) / levels of what it codes.
_LEVELS_MIN = 23


def as_codec(name: str, value: Any) -> Codec | None:
    """Give a codec back, or None.

    Raises:
        TypeError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, type) or not isinstance(value, Codec):
        raise TypeError(
            f"{name}: expected one of psframe.codecs, such as psframe.codecs.Float16(), or None,"
            f" got {value!r}"
        )
    kind: Any = type(value)
    if not dataclasses.is_dataclass(kind) or " at 0x" in repr(value):
        raise TypeError(
            f"{name}: the text of {value!r} differs from rank to rank, which compare it; make"
            f" {kind.__name__} a frozen dataclass of numbers"
        )
    return value


def as_pull_codec(name: str, value: Any) -> Codec | None:
    """Give a codec for parameters back, or None.

    Raises:
        TypeError: as `as_codec`.
        ValueError: what it makes of a difference may be farther off than nothing at all.
    """
    codec = as_codec(name, value)
    if isinstance(codec, QSGD) and codec.levels < _LEVELS_MIN:
        raise ValueError(
            f"{name}: {codec!r} may be off by more than what it codes, and differences to what a"
            f" worker has would grow; take {_LEVELS_MIN} levels or more"
        )
    if isinstance(codec, Sign) and codec.scale is not None:
        raise ValueError(
            f"{name}: {codec!r} moves every parameter by its scale, changed or not; leave scale out"
        )
    if getattr(codec, "clip_norm", None) is not None:
        raise ValueError(f"{name}: {codec!r}: differences must not be clipped; leave it out")
    if getattr(codec, "momentum", 0.0):
        raise ValueError(f"{name}: {codec!r}: parameters have no momentum; leave it out")
    return codec


@dataclasses.dataclass
class Traffic:
    """Bytes of gradients and of parameters between workers and servers.

    Attributes:
        pushed, pulled: of what has stood for them. Gradients that a server reads in the memory of
            another process of its node are not counted.
        pushed_dense, pulled_dense: of themselves.
    """

    pushed: int = 0
    pushed_dense: int = 0
    pulled: int = 0
    pulled_dense: int = 0

    def add(self, other: Traffic) -> None:
        """Add what another has counted."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


class Coded:
    """One payload: a handle, as events carry it.

    Attributes:
        data: uint8, contiguous; whose memory it is, its maker says.
    """

    __slots__ = ("data",)

    def __init__(self, data: Array) -> None:
        self.data = data

    def __len__(self) -> int:
        return int(self.data.size)


# Of a message that announces one, before it is there.
CODED = Coded(np.empty(0, np.uint8))


def payload_buffer(n_bytes: int) -> Array:
    """Make room for a payload, at a multiple of 8 in memory."""
    return np.empty(-(-n_bytes // 8), np.uint64).view(np.uint8)[:n_bytes]


def push_seed(seed: int, worker: int, server: int) -> tuple[int, ...]:
    """Give the seed of the encoder of one worker's gradients for one server."""
    return seed, _PUSH_STREAM, worker, server


class PushCoder:
    """Codes one worker's gradients for each server.

    Args:
        codec: which.
        layout, servers: the parameters, and S.
        seed, worker: whose random numbers.
        slots: gradient slots; the payloads of one are good until it is coded again.
    """

    def __init__(
        self, codec: Codec, layout: Layout, servers: int, seed: int, worker: int, slots: int
    ) -> None:
        self.codec = codec
        self._shards = layout.shards(servers)
        self._encoders: list[Encoder] = [
            codec.encoder(layout, begin, end, push_seed(seed, worker, server))
            for server, (begin, end) in enumerate(self._shards)
        ]
        self._decoders = [codec.decoder(layout, begin, end) for begin, end in self._shards]
        self._payloads: list[list[Array] | None] = [None] * slots

    def encode(self, slot: int, flat: Array) -> list[Coded]:
        """Code a gradient; `flat`, the slot, holds afterwards what the payloads stand for."""
        if len(self._shards) > 1 and not is_finite(flat):
            flat.fill(np.nan)  # refused whole, so that no shard's residual may be sent with it
        payloads = self._payloads[slot]
        if payloads is None:
            payloads = [payload_buffer(encoder.bytes_max) for encoder in self._encoders]
            self._payloads[slot] = payloads
        coded = []
        coders = zip(self._shards, self._encoders, self._decoders, payloads, strict=True)
        for (begin, end), encoder, decoder, payload in coders:
            part = flat[begin:end]
            data = payload[: encoder.encode(part, payload)]
            decoder.decode(data, part)
            coded.append(Coded(data))
        return coded


class PullCoder:
    """Codes one shard's parameters for each worker.

    Args:
        codec: which; its error feedback is left out, since the mirror is that.
        layout, begin, end: the parameters, and the shard.
        seed, server: whose random numbers.
        workers: W. Costs an array of the shard a worker, as what it keeps.

    Attributes:
        traffic: of all parameters so far.
    """

    def __init__(
        self,
        codec: Codec,
        layout: Layout,
        begin: int,
        end: int,
        seed: int,
        server: int,
        workers: int,
    ) -> None:
        self._codec = dataclasses.replace(codec, error_feedback=False)  # type: ignore[type-var]
        self._place = layout, begin, end
        self._seed = seed, server
        self._encoders: list[Encoder | None] = [None] * workers
        self._decoder = self._codec.decoder(layout, begin, end)
        self._mirrors: list[Array | None] = [None] * workers
        self._difference: Array | None = None
        self._payloads: list[Array | None] = [None] * workers
        self.traffic = Traffic()

    def dense(self, worker: int, params: Array) -> None:
        """Note that a worker is sent parameters as they are."""
        mirror = self._mirrors[worker]
        if mirror is None:
            self._mirrors[worker] = params.copy()
        else:
            mirror[:] = params
        self.traffic.pulled_dense += params.nbytes
        self.traffic.pulled += params.nbytes

    def encode(self, worker: int, params: Array) -> tuple[Coded, Array] | None:
        """Code the present parameters for a worker.

        Returns:
            The payload, good until the worker's next one, and its mirror with it added, which is
            only to be read; None if they are to be sent as they are.
        """
        mirror = self._mirrors[worker]
        if mirror is None:
            return None
        encoder, payload = self._encoders[worker], self._payloads[worker]
        if encoder is None or payload is None:
            seed = self._seed[0], _PULL_STREAM, worker, self._seed[1]
            encoder = self._encoders[worker] = self._codec.encoder(*self._place, seed)
            payload = self._payloads[worker] = payload_buffer(encoder.bytes_max)
        if self._difference is None:
            self._difference = np.empty_like(params)
        difference = self._difference
        with np.errstate(over="ignore", invalid="ignore"):  # then it goes as it is
            np.subtract(params, mirror, out=difference)
        data = payload[: encoder.encode(difference, payload)]
        self._decoder.decode(data, difference)
        if not np.isfinite(difference).all():
            return None  # parameters so far apart that their difference is no number
        mirror += difference
        self.traffic.pulled_dense += params.nbytes
        self.traffic.pulled += data.size
        return Coded(data), mirror

    def forget(self, worker: int) -> None:
        """Keep nothing for a worker any more; who comes in its place begins anew."""
        self._mirrors[worker] = self._encoders[worker] = self._payloads[worker] = None


class PullDecoder:
    """What a worker keeps of one server's parameters, where their payloads reach it.

    Args:
        codec, layout, begin, end: as for `PullCoder`.
    """

    def __init__(self, codec: Codec, layout: Layout, begin: int, end: int) -> None:
        plain = dataclasses.replace(codec, error_feedback=False)  # type: ignore[type-var]
        self._decoder = plain.decoder(layout, begin, end)
        self.bytes_max = self._decoder.bytes_max
        self._mirror = np.empty(end - begin, layout.dtype)
        self._has_mirror = False
        self._difference = np.empty_like(self._mirror)

    def dense(self, params: Array) -> None:
        """Note what has come as it is."""
        self._mirror[:] = params
        self._has_mirror = True

    def decode(self, payload: Array, out: Array) -> None:
        """Write the parameters that a payload brings.

        Raises:
            MessageError: it is none, or nothing has come that it is the difference to.
        """
        if not self._has_mirror:
            raise MessageError("parameters are coded, before any have come as they are")
        self._decoder.decode(payload, self._difference)
        self._mirror += self._difference
        out[:] = self._mirror
