"""Labelled data: the built-in digits, `.npz` files, splits and scaling."""

from __future__ import annotations

from psframe.data.dataset import Dataset, Scaling, prepare, split
from psframe.data.loading import load

__all__ = ["Dataset", "Scaling", "load", "prepare", "split"]
