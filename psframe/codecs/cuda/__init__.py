"""Encoders that run on a worker's GPU, so that only payloads cross its bus."""

from psframe.codecs.cuda.base import DeviceEncoder
from psframe.codecs.cuda.registry import encoder_for

__all__ = ["DeviceEncoder", "encoder_for"]
