"""Draw a run's report: `python -m psframe.report RUN_DIR`."""

# Annotations are evaluated here: tyro's, which are local to a function, could not be found later.
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from psframe.errors import PsframeError
from psframe.output import give_up_printing, parse_flags
from psframe.report.making import make_report

_DESCRIPTION = """\
Draw what a run did: learning curves, staleness, workers, classes; and say what it means.

  python -m psframe.report runs/20250131-101500

writes report.html, one page that needs nothing else, and a PNG file for each figure.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 for an error, 2 for wrong flags."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        run_dir: Annotated[
            tyro.conf.Positional[str],
            tyro.conf.arg(metavar="RUN_DIR", help="the run's folder; it may still be running"),
        ]
        output: Annotated[
            str | None,
            tyro.conf.arg(aliases=["-o"], metavar="OUT", help="folder for it; else RUN_DIR/report"),
        ] = None
        no_png: Annotated[bool, tyro.conf.arg(help="write the page only")] = False

    arguments = parse_flags(
        tyro.cli,
        Arguments,
        name="report",
        quiet=False,
        args=list(sys.argv[1:] if argv is None else argv),
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        for file in make_report(arguments.run_dir, arguments.output, images=not arguments.no_png):
            print(file)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_printing()
    except (PsframeError, OSError) as error:
        if isinstance(error, OSError):  # perhaps of a full disk, which has what was printed
            give_up_printing()
        print(f"psframe: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
