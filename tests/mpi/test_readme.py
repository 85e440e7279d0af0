"""The README's library example, as it stands there, on every rank."""

import re
from pathlib import Path

import pytest
from mpi4py import MPI

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.mpi(min_size=2)
def test_the_library_example(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[0]
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed.startswith("500 updates: [") == (MPI.COMM_WORLD.rank == 0)
