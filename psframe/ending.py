"""The end of a training in its run directory: first the weights, and then what became of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from psframe import roles
from psframe.data import Dataset
from psframe.errors import Interrupted
from psframe.plan import Result
from psframe.rundir import RunDir
from psframe.weights import save_weights
from psframe.witness import Witness

__all__ = ["Ending", "name_of"]


class Ending:
    """Leaves what a run directory lacks when the run is over; a context around what follows it.

    At its beginning the weights are saved. The status says "running" until its end, and then
    "completed" only if nothing went wrong; should the process be killed meanwhile, a witness makes
    it "failed". Where there is no run directory, and on ranks that are not the root, it does
    nothing.

    Args:
        result: of the run.
        name: of the model, as `--model` has it.
        train: the training part.
        accuracy: on the test part, as far as known.

    Attributes:
        accuracy: for the status; to be set once more is known.
        error: what has gone wrong, if something has; to be set, too.
    """

    def __init__(
        self, result: Result, name: str, train: Dataset, accuracy: float | None = None
    ) -> None:
        self.accuracy = accuracy
        self.error: BaseException | None = None
        self._result = result
        self._name = name
        self._train = train
        self._unsaved: Exception | None = None
        self._witness: Witness | None = None

    def __enter__(self) -> Ending:
        folder, params = self._result.run_dir, self._result.params
        if folder is None or params is None:
            return self
        self._status(folder, "running")
        self._witness = Witness(folder)
        try:
            save_weights(folder, params, self._name, self._train)
        except Exception as error:  # raised at the end: the other ranks wait for what follows
            self._unsaved = error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        folder = self._result.run_dir
        if self._witness is None or folder is None:
            return
        wrong = error or self._unsaved or self.error
        if wrong is None:
            self._status(folder, "completed")
        elif isinstance(wrong, KeyboardInterrupt):
            self._status(folder, "interrupted", str(wrong))
        elif isinstance(wrong, Interrupted):
            self._status(folder, "interrupted", describe(wrong))
        else:
            self._status(folder, "failed", describe(wrong))
        self._witness.dismiss()
        if error is None and self._unsaved is not None:
            raise self._unsaved

    def _status(self, folder: Path, state: str, reason: str = "") -> None:
        RunDir(folder).status(
            state,
            updates=self._result.version,
            test_accuracy=self.accuracy,
            reason=reason,
            lost=self._result.lost,
            replaced=self._result.replaced,
        )


def describe(error: BaseException) -> str:
    """Put into a line why the end of a training failed."""
    what = roles.describe(error)  # whatever its `__str__` does
    return f"{what.type}: {what.message}"


def name_of(model: Any) -> str:
    """Name a model's class as `--model` does: package.module:Class."""
    module = type(model).__module__
    if module == "__main__":  # under that name nobody else finds it
        main = sys.modules[module]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}:{type(model).__qualname__}"
