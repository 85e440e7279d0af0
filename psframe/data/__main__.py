"""Look at data, and convert it: `python -m psframe.data describe PATH`, `... convert PATH OUT`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from psframe.data.converting import convert
from psframe.data.describing import describe, description_lines
from psframe.data.loading import format_of, load
from psframe.errors import ArgumentError
from psframe.output import give_up_printing, parse_flags, prepare_output

__all__ = ["arguments", "main"]

_DESCRIPTION = """\
Look at data as psframe.train would read it, or convert it into shards.

  python -m psframe.data describe digits
  python -m psframe.data describe table.csv --label species
  python -m psframe.data convert images.npz images-shards

A folder of shards is memory-mapped, so that it may be larger than memory.
"""


def arguments() -> dict[str, Any]:
    """Make the dataclasses of the subcommands' flags."""
    import tyro

    @dataclass(frozen=True)
    class Describe:
        """Say what is in data: parts, samples, classes, values."""

        path: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="PATH", help="digits, a file or a folder, as for psframe.train"),
        ]
        label: Annotated[str | None, tyro.conf.arg(help="label column; else the last")] = None
        json: Annotated[bool, tyro.conf.arg(help="print a JSON object instead of text")] = False

        def main(self) -> None:
            found = describe(load(self.path, self.label), format_of(self.path))
            print(json.dumps(found) if self.json else "\n".join(description_lines(found)))

    @dataclass(frozen=True)
    class Convert:
        """Write data as a folder of memory-mapped shards."""

        path: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="PATH", help="digits, a file or a folder, as for psframe.train"),
        ]
        out: Annotated[
            tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT", help="the folder to be made")
        ]
        label: Annotated[str | None, tyro.conf.arg(help="label column; else the last")] = None
        samples_per_shard: Annotated[int, tyro.conf.arg(help="samples in a file")] = 8192
        overwrite: Annotated[bool, tyro.conf.arg(help="replace shards that are there")] = False

        def main(self) -> None:
            count = convert(
                load(self.path, self.label),
                Path(self.out),
                samples_per_shard=self.samples_per_shard,
                overwrite=self.overwrite,
            )
            print(f"{self.out}: {count} shards")

    return {"describe": Describe, "convert": Convert}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error, 2 for wrong flags."""
    import tyro

    prepare_output()
    command: Any = parse_flags(
        tyro.extras.subcommand_cli_from_dict,
        arguments(),
        args=list(sys.argv[1:] if argv is None else argv),
        name="data",
        quiet=False,
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        command.main()
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_printing()
    except (ArgumentError, ValueError, OSError) as error:
        if isinstance(error, OSError):  # perhaps of a full disk, which has what was printed
            give_up_printing()
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
