"""Where a worker codes its gradients: on its GPU, if only payloads leave it, or on the host."""

from __future__ import annotations

import logging

from psframe.codecs import Codec
from psframe.coding import PushCoder, push_seed
from psframe.devices import Coder, Device
from psframe.exchange import Endpoint
from psframe.layout import Layout
from psframe.server import SLOTS

__all__ = ["choose_coder"]

_log = logging.getLogger("psframe")


def choose_coder(
    codec: Codec, layout: Layout, seed: int, endpoint: Endpoint, device: Device, *, normed: bool
) -> PushCoder | Coder:
    """Make what codes a worker's gradients; one line says so if that is not its GPU.

    Args:
        codec, layout, seed: of the run.
        endpoint, device: the worker's.
        normed: whether the norm of what the payloads stand for is asked for.
    """
    servers, worker = endpoint.servers, endpoint.index
    if device.name != "cpu":
        why = ""
        if any(endpoint.in_place):
            why = "a server reads them in this node's memory"
        elif normed:
            why = "their norm is needed"
        else:
            seeds = [push_seed(seed, worker, server) for server in range(servers)]
            coder = device.coder(codec, layout.shards(servers), seeds)
            if coder is not None:
                return coder
            why = "this codec has no encoder for GPUs"
        _log.info("worker %d codes its gradients on the host, by %r: %s", worker, codec, why)
    return PushCoder(codec, layout, servers, seed, worker, SLOTS)
