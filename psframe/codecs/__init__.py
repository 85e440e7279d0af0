"""Codecs: what travels in place of a dense gradient. The error of what is sent can be fed back."""

from psframe.codecs.base import Codec, Decoder, Encoder
from psframe.codecs.halves import BFloat16, Float16
from psframe.codecs.powersgd import PowerSGD
from psframe.codecs.qsgd import QSGD
from psframe.codecs.signs import Sign
from psframe.codecs.topk import TopK

__all__ = [
    "QSGD",
    "BFloat16",
    "Codec",
    "Decoder",
    "Encoder",
    "Float16",
    "PowerSGD",
    "Sign",
    "TopK",
]
