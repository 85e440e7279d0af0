"""Evaluate a trained model: `python -m psframe.evaluate RUN_DIR [DATA]`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from psframe.applying import Applied, main_of
from psframe.data import Dataset
from psframe.data.describing import printable
from psframe.summary import class_accuracies

__all__ = ["arguments", "main"]

_DESCRIPTION = """\
Evaluate a trained model on all ranks.

  on the test part of the data that it was trained on:
      mpirun -n 4 python -m psframe.evaluate runs/a
  on other data:
      python -m psframe.evaluate runs/a other.npz
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
            tyro.conf.Positional[str | None],
            tyro.conf.arg(metavar="DATA", help="as for psframe.train; else what it was trained on"),
        ] = None
        label: Annotated[str | None, tyro.conf.arg(help="label column of a table")] = None
        part: Annotated[
            Literal["train", "validation", "test", "all"] | None,
            tyro.conf.arg(help="of the data; else test, if there is one, or all of it"),
        ] = None
        json: Annotated[bool, tyro.conf.arg(help="print a JSON object instead of text")] = False
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
    return main_of(arguments, "evaluate", _DESCRIPTION, argv, _load, _evaluate)


def _load(flags: Any, applied: Applied) -> Dataset:
    return applied.labelled(flags.data, flags.label, flags.part)


def _evaluate(flags: Any, applied: Applied, data: Dataset) -> None:
    found = applied.trainer.evaluate(applied.weights.params, data)
    if found is None:
        return
    record = {
        "data": data.name,
        "samples": len(data),
        "accuracy": found.accuracy,
        "loss": found.loss,
        "classes": list(data.classes),
        "confusion": found.confusion.tolist(),
        "per_class": class_accuracies(found.confusion),
    }
    if flags.json:
        print(json.dumps(record), flush=True)
        return
    from psframe.closing import class_lines

    loss = "" if found.loss is None else f"  loss {found.loss:.4g}"
    wrong = len(data) - int(found.confusion.trace())
    print(f"{data.name}: accuracy {found.accuracy:.2%}  ({wrong} of {len(data)} wrong){loss}")
    record["classes"] = [printable(name) for name in data.classes]
    print("\n".join(class_lines(record)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
