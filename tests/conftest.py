"""What all tests share: hypothesis' settings, GPU tests without a GPU, and counts that are told."""

import functools
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Every rank must draw the same examples, and a build server the same ones each time; elsewhere they
# are new, and a failure prints the blob that repeats it. No deadline: a busy machine is slow.
_under_launcher = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
settings.register_profile(
    "psframe",
    deadline=None,
    print_blob=True,
    derandomize=_under_launcher or "CI" in os.environ,
    database=None if _under_launcher else settings.default.database,
)
settings.load_profile("psframe")

# A shell starts its background jobs with SIGINT ignored, and what they start inherits that; tests
# of what Ctrl-C does would find out nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the files that start MPI jobs run one after the other, beside all others (xdist).

    Ranks beyond the cores are slow enough; a file stays with one process, for what its tests share.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "mpi" if _starts_jobs(item.path) else item.path.name
            item.add_marker(pytest.mark.xdist_group(group))


@functools.cache
def _starts_jobs(file: Path) -> bool:
    """Whether a test file, or a helper beside it that it imports, speaks of mpirun."""
    text = file.read_text(encoding="utf-8")
    helpers = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    beside = (file.with_name(f"{name}.py") for name in helpers)
    return "mpirun" in text or any("mpirun" in h.read_text("utf-8") for h in beside if h.exists())


@pytest.fixture(scope="session", autouse=True)
def _folder_of_launchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the jobs that tests start a folder of their own.

    An Open MPI mpirun that is killed leaves a folder named after its process in TMPDIR, and another
    one that happens to have the same number fails in it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not _under_launcher:
            patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("launchers")))
        yield


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A stand-in of CuPy with two GPUs, whose streams work as late as they may, or at once."""
    from fake_cupy import FakeCupy, installed

    with installed(FakeCupy()) as fake:
        fake.cuda.eager = request.param
        yield fake
    assert fake.cuda.runtime.registered == {}, "something stays registered"


@functools.cache
def _why_no_gpu() -> str:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    return "" if cupy.is_available() else "CuPy sees no CUDA device"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu``, with the reason, where it cannot run."""
    if item.get_closest_marker("gpu") is not None and _why_no_gpu():
        pytest.skip(_why_no_gpu())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was tried, where tests have recorded that: their counts, added up."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", ()):
        counts.update(dict(report.user_properties))
    for what, count in counts.items():
        terminalreporter.write_line(f"{count:,} {what}")
