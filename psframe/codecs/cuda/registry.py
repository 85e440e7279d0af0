"""Which codecs have an encoder that runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psframe.codecs.base import Codec
from psframe.codecs.cuda.base import DeviceEncoder
from psframe.codecs.cuda.halves import HalfEncoder
from psframe.codecs.cuda.powersgd import RANK_MAX, PowerSGDEncoder
from psframe.codecs.cuda.qsgd import QSGDEncoder
from psframe.codecs.cuda.signs import SignEncoder
from psframe.codecs.cuda.topk import TopKEncoder
from psframe.codecs.halves import BFloat16, Float16
from psframe.codecs.powersgd import PowerSGD
from psframe.codecs.qsgd import QSGD
from psframe.codecs.signs import Sign
from psframe.codecs.topk import TopK
from psframe.layout import Layout

__all__ = ["encoder_for"]

_ENCODERS: dict[type, Callable[..., DeviceEncoder]] = {
    BFloat16: HalfEncoder,
    Float16: HalfEncoder,
    PowerSGD: PowerSGDEncoder,
    QSGD: QSGDEncoder,
    Sign: SignEncoder,
    TopK: TopKEncoder,
}


def encoder_for(
    xp: Any, codec: Codec, layout: Layout, begin: int, end: int, seed: Sequence[int]
) -> DeviceEncoder | None:
    """Make an encoder on cupy's current device, as `Codec.encoder` does on the CPU.

    Its state is zeroed on the current stream.

    Returns:
        The encoder; None if there is none for such a codec.
    """
    if isinstance(codec, TopK) and not TopKEncoder.codes(codec, layout, begin, end):
        return None
    if isinstance(codec, PowerSGD) and codec.rank > RANK_MAX:
        return None
    make = _ENCODERS.get(type(codec))
    return None if make is None else make(xp, codec, layout, begin, end, seed)
