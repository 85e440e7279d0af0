"""Tests that need a launcher: run by ``make test`` and by ``tests/mpi/run``."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder ``mpi``, so that none is left out of ``-m mpi``.

    And ``stand_in`` those that have a stand-in of CuPy.
    """
    for item in items:
        if _HERE in item.path.parents:
            if item.get_closest_marker("mpi") is None:
                item.add_marker(pytest.mark.mpi)
            if "cupy" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.stand_in)


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A stand-in of CuPy with one GPU, whose streams work as late as they may, or at once."""
    from fake_cupy import FakeCupy, installed

    with installed(FakeCupy(gpus=1)) as fake:
        fake.cuda.eager = request.param
        yield fake
    assert fake.cuda.runtime.registered == {}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how the session of this rank ended."""
    session.config.stash[_failed] = exitstatus in (
        pytest.ExitCode.TESTS_FAILED,
        pytest.ExitCode.INTERRUPTED,
        pytest.ExitCode.INTERNAL_ERROR,
    )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End the job when a test failed here and other ranks may be waiting for this one.

    Without it they would wait in a receive, or in MPI_Finalize, until the timeout, and the rank
    that timed out would be reported in place of the one that failed.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not config.stash.get(_failed, False):
        return
    if mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """An empty folder, the same on every rank. (pytest's own are cleaned by all ranks at once.)"""
    from mpi4py import MPI

    folder = tempfile.TemporaryDirectory() if MPI.COMM_WORLD.rank == 0 else None
    yield Path(MPI.COMM_WORLD.bcast(folder.name if folder else None))
    MPI.COMM_WORLD.Barrier()
    if folder is not None:
        folder.cleanup()
