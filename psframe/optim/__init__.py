"""The update rules, their learning rates, and clipping."""

from psframe.optim import schedules
from psframe.optim.base import Optimizer
from psframe.optim.clipping import clip_scale
from psframe.optim.delayed import DelayedNesterov
from psframe.optim.grouped import Average, Grouped
from psframe.optim.per_worker import DANAZero, WorkerMomentum
from psframe.optim.rules import SGD, Adagrad, Adam, AdamW, RMSProp

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Average",
    "DANAZero",
    "DelayedNesterov",
    "Grouped",
    "Optimizer",
    "RMSProp",
    "WorkerMomentum",
    "clip_scale",
    "schedules",
]
