"""Where a worker computes: NumPy arrays on the host, or CuPy arrays on a GPU.

CuPy is imported only when a GPU is wanted.
"""

from psframe.devices.base import Coder, Device, HostDevice
from psframe.devices.choosing import choose_device, make_device, use_gpu, visible_gpus
from psframe.devices.cuda import CudaDevice
from psframe.devices.direct import DirectDevice
from psframe.devices.sharing import (
    NO_GPU,
    Sharing,
    announce,
    announce_threads,
    fit_memory,
    identify,
    memory_limit,
    memory_of,
    too_much_to_lend,
)

__all__ = [
    "NO_GPU",
    "Coder",
    "CudaDevice",
    "Device",
    "DirectDevice",
    "HostDevice",
    "Sharing",
    "announce",
    "announce_threads",
    "choose_device",
    "fit_memory",
    "identify",
    "make_device",
    "memory_limit",
    "memory_of",
    "too_much_to_lend",
    "use_gpu",
    "visible_gpus",
]
