"""Labelled data: formats, splits, preprocessing and augmentation."""

from __future__ import annotations

from psframe.data.augmentation import Augmentation
from psframe.data.dataset import Dataset, Parts
from psframe.data.loading import load
from psframe.data.preprocessing import Preprocessing
from psframe.data.splitting import prepare, split

__all__ = ["Augmentation", "Dataset", "Parts", "Preprocessing", "load", "prepare", "split"]
