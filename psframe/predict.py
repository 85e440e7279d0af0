"""Predict with a trained model: `python -m psframe.predict RUN_DIR DATA -o OUT`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from psframe.applying import Applied, main_of
from psframe.errors import ArgumentError, RunDirError
from psframe.inference import Predictions

__all__ = ["arguments", "main"]

_DESCRIPTION = """\
Predict the label of each sample, on all ranks, in the order of the data.

  python -m psframe.predict runs/a new.npz -o labels.csv
  mpirun -n 4 python -m psframe.predict runs/a new.csv -o labels.npz --probabilities

A .csv has a line a sample: its number, the label and the label's probability; with --probabilities
that of each label. An .npz has the arrays labels (indices into classes), classes and probabilities.
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
            tyro.conf.arg(help="of the data; else test, if there is one, or all"),
        ] = None
        servers: Annotated[int, tyro.conf.arg(help="ranks that gather; the others compute")] = 1
        workers: Annotated[
            int | None, tyro.conf.arg(help="worker threads without mpirun; else 3")
        ] = None
        device: Annotated[
            Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="where workers compute")
        ] = "auto"

    return Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error, 2 for wrong flags, 130."""
    return main_of(arguments, "predict", _DESCRIPTION, argv, _predict)


def _predict(flags: Any, applied: Applied) -> None:
    suffix = ".csv" if flags.output == "-" else Path(flags.output).suffix.lower()
    if suffix not in (".csv", ".npz"):
        raise ArgumentError(f"--output: expected a file .csv or .npz, or -, got {flags.output!r}")
    data = applied.samples(flags.data, flags.label, flags.part)
    found = applied.trainer.predict(applied.weights.params, data)
    if found is None:
        return
    if flags.probabilities and found.probabilities is None:
        raise ArgumentError(
            f"--probabilities: the model {applied.weights.model!r} has no method 'probabilities'"
        )
    write = _csv if suffix == ".csv" else _npz
    content = write(found, applied.weights.classes, flags.probabilities)
    if flags.output == "-":
        sys.stdout.write(content.decode())
        sys.stdout.flush()
        return
    _replace(Path(flags.output), content)
    print(f"{flags.output}: {len(found.labels)} predictions", flush=True)


def _csv(found: Predictions, classes: tuple[str, ...], everything: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header, probabilities = ["sample", "label"], found.probabilities
    if probabilities is not None:
        header += list(classes) if everything else ["probability"]
    writer.writerow(header)
    for i, label in enumerate(found.labels.tolist()):
        row: list[Any] = [i, classes[label]]
        if probabilities is not None:
            shown = probabilities[i] if everything else probabilities[i, label : label + 1]
            row += [f"{p:.6g}" for p in shown.tolist()]
        writer.writerow(row)
    return text.getvalue().encode()


def _npz(found: Predictions, classes: tuple[str, ...], everything: bool) -> bytes:
    buffer = io.BytesIO()
    arrays = {"labels": found.labels, "classes": np.array(classes)}
    if everything and found.probabilities is not None:
        arrays["probabilities"] = found.probabilities
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _replace(file: Path, content: bytes) -> None:
    """Write a file by rename: a full disk leaves what was there."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirError(f"{file}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
