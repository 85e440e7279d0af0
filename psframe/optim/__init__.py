"""The update rules, their learning rates, and clipping."""

from psframe.optim import schedules
from psframe.optim.base import Optimizer
from psframe.optim.clipping import clip_scale
from psframe.optim.grouped import Average, Grouped
from psframe.optim.rules import SGD, Adagrad, Adam, AdamW, RMSProp

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Average",
    "Grouped",
    "Optimizer",
    "RMSProp",
    "clip_scale",
    "schedules",
]
