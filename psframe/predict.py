"""Predict with a trained model: `python -m psframe.predict RUN_DIR DATA -o OUT`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import csv
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TextIO

import numpy as np

from psframe.applying import Applied, main_of
from psframe.data import Dataset
from psframe.errors import ArgumentError, RunDirError
from psframe.inference import Predictions

__all__ = ["arguments", "main"]

_DESCRIPTION = """\
Predict the label of each sample, on all ranks, in the order of the data.

  python -m psframe.predict runs/a new.npz -o labels.csv
  mpirun -n 4 python -m psframe.predict runs/a new.csv -o labels.npz --probabilities

A .csv has a line a sample: its number, the label and the label's probability; with --probabilities
that of each label. An .npz has the arrays labels (indices into classes), classes and probabilities.
With --part all the training part comes first, then the validation part, then the test part.
"""


def arguments() -> Any:
    """Make the dataclass of the command's flags."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        run_dir: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="RUN_DIR", help="a completed run's folder, or a file of weights"),
        ]
        data: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="DATA", help="as for psframe.train; labels are not needed"),
        ]
        output: Annotated[
            str,
            tyro.conf.arg(aliases=["-o"], metavar="OUT", help=".csv or .npz; - prints a .csv"),
        ] = "predictions.csv"
        probabilities: Annotated[bool, tyro.conf.arg(help="of all labels, not of one")] = False
        label: Annotated[str | None, tyro.conf.arg(help="label column of a table")] = None
        part: Annotated[
            Literal["train", "validation", "test", "all"] | None,
            tyro.conf.arg(help="of the data; else test, if there is one, or all of it"),
        ] = None
        servers: Annotated[
            int, tyro.conf.arg(help="ranks that hold the parameters; the others compute")
        ] = 1
        workers: Annotated[
            int | None, tyro.conf.arg(help="worker threads without mpirun; else 3")
        ] = None
        device: Annotated[
            Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="where workers compute")
        ] = "auto"

    return Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error, 2 for wrong flags, 130."""
    return main_of(arguments, "predict", _DESCRIPTION, argv, _load, _predict)


def _load(flags: Any, applied: Applied) -> Dataset:
    """Load the samples; before that, see that the predictions can be written."""
    if flags.output.endswith("/"):
        raise ArgumentError(f"--output: expected a file, {flags.output!r} is the name of a folder")
    if flags.output != "-" and Path(flags.output).suffix.lower() not in (".csv", ".npz"):
        raise ArgumentError(f"--output: expected a file .csv or .npz, or -, got {flags.output!r}")
    if flags.probabilities and not callable(getattr(applied.trainer.model, "probabilities", None)):
        raise ArgumentError(
            f"--probabilities: the model {applied.weights.model!r} has no method 'probabilities'"
        )
    if applied.root and flags.output != "-":
        _check_writable(Path(flags.output))
    return applied.samples(flags.data, flags.label, flags.part)


def _predict(flags: Any, applied: Applied, data: Dataset) -> None:
    found = applied.trainer.predict(applied.weights.params, data)
    if found is None:
        return
    classes, everything = applied.weights.classes, flags.probabilities
    if flags.output == "-":
        _csv(sys.stdout, found, classes, everything)
        sys.stdout.flush()
        return
    file = Path(flags.output)
    write = _csv_file if file.suffix.lower() == ".csv" else _npz
    _replace(file, lambda stream: write(stream, found, classes, everything))
    print(f"{flags.output}: {len(found.labels)} predictions", flush=True)


def _csv(stream: TextIO, found: Predictions, classes: tuple[str, ...], everything: bool) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    header, probabilities = ["sample", "label"], found.probabilities
    if probabilities is not None:
        header += list(classes) if everything else ["probability"]
    writer.writerow(header)
    for i, label in enumerate(map(int, found.labels)):
        row: list[Any] = [i, classes[label]]
        if probabilities is not None:
            shown = probabilities[i] if everything else probabilities[i, label : label + 1]
            row += [f"{p:.6g}" for p in shown.tolist()]
        writer.writerow(row)


def _csv_file(
    stream: BinaryIO, found: Predictions, classes: tuple[str, ...], everything: bool
) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    _csv(text, found, classes, everything)
    text.flush()
    text.detach()


def _npz(stream: BinaryIO, found: Predictions, classes: tuple[str, ...], everything: bool) -> None:
    arrays = {"labels": found.labels, "classes": np.array(classes)}
    if everything and found.probabilities is not None:
        arrays["probabilities"] = found.probabilities
    np.savez(stream, allow_pickle=False, **arrays)


def _check_writable(file: Path) -> None:
    """See that there is room for a file, without touching what is there.

    Raises:
        RunDirError: it cannot be written.
    """
    temporary = _temporary(file)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.write_bytes(b"")
        temporary.unlink()
    except OSError as error:
        raise RunDirError(f"{file}: cannot be written: {error.strerror}") from error


def _replace(file: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file by rename: a full disk leaves what was there."""
    temporary = _temporary(file)
    try:
        with temporary.open("wb") as stream:
            write(stream)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirError(f"{file}: cannot be written: {error.strerror}") from error


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


if __name__ == "__main__":
    sys.exit(main())
