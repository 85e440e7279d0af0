"""The verdict: once, with every line before it, and even if the process is killed."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from psframe.errors import RunDirError
from psframe.events import EpochDone, HostEvent, Logged
from psframe.host import Host
from psframe.interrupts import Interrupts, interrupting
from psframe.witness import Witness


def open_host(folder: Path, **kwargs: Any) -> Host:
    options = {"overwrite": False, "config": {}, "observer": None}
    return Host.open(folder, **{**options, **kwargs})


def status(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "status.json").read_text(encoding="utf-8")))


def test_without_a_directory_only_the_observer_hears() -> None:
    heard: list[HostEvent] = []
    host = Host.open(None, overwrite=False, config={}, observer=heard.append)
    host(Logged(0, {}))
    host.verdict("completed", updates=1)
    assert (heard, host.path) == ([Logged(0, {})], None)


def test_the_first_verdict_counts(tmp_path: Path) -> None:
    heard: list[HostEvent] = []
    host = open_host(tmp_path / "run", observer=heard.append)
    assert status(tmp_path / "run")["state"] == "running"
    host(EpochDone(0, 5, 10, 0.0))
    host.watch(lambda: 7)
    host.verdict("interrupted", reason="x" * 100_000)
    host.verdict("completed", updates=9)
    said = status(tmp_path / "run")
    assert (said["state"], said["updates"]) == ("interrupted", 7)
    assert len(said["reason"]) < 10_000
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["update"] for line in lines] == [5]
    host(EpochDone(1, 8, 10, 0.0))  # no line after the verdict, but the observer goes on
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(heard) == 2


def test_the_verdict_names_the_lost(tmp_path: Path) -> None:
    host = open_host(tmp_path)
    assert "lost" not in status(tmp_path)
    host.watch(lambda: 7, lambda: ({2, 1}, {2}))
    host.verdict("completed", updates=9)
    said = status(tmp_path)
    assert (said["lost"], said["replaced"]) == ([1, 2], [2])


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    open_host(tmp_path).verdict("completed", updates=3)
    with pytest.raises(RunDirError, match="another run's"):
        open_host(tmp_path)
    open_host(tmp_path, overwrite=True).verdict("failed", updates=0, reason="why")
    assert status(tmp_path)["reason"] == "why"


# ---- the witness -----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from psframe.events import EpochDone
from psframe.host import Host
host = Host.open(sys.argv[1], overwrite=False, config={}, observer=None)
host(EpochDone(0, 12, 10, 0.0))
host(EpochDone(1, 24, 10, 0.0))
if sys.argv[2] == "verdict":
    host.verdict("completed", updates=24)
witness = host._witness._process
print(witness.pid if witness else 0, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("verdict", [False, True])
def test_a_killed_process_has_a_verdict(tmp_path: Path, verdict: bool) -> None:
    """Nobody could handle SIGKILL; the witness writes what is missing, and leaves."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run", "verdict" if verdict else ""],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    assert (pid == 0) == verdict
    if pid:
        _wait_until_gone(pid)
    said = status(tmp_path / "run")
    assert said["state"] == ("completed" if verdict else "failed")
    assert ("was killed" in said["reason"]) != verdict
    assert not list((tmp_path / "run").glob(".status*"))


def _wait_until_gone(pid: int) -> None:
    """Wait for a process that is no child of ours, by its process file descriptor."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 30.0)[0], "the witness stays"
    finally:
        os.close(fd)


def test_a_witness_that_is_dismissed_leaves_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running"}', encoding="utf-8")
    witness = Witness(tmp_path)
    witness.dismiss()
    witness.dismiss()
    assert status(tmp_path) == {"state": "running"}


def test_a_witness_that_was_killed_is_no_error(tmp_path: Path) -> None:
    host = open_host(tmp_path)
    assert host._witness is not None
    assert host._witness._process is not None
    host._witness._process.kill()
    host._witness._process.wait()
    host.verdict("completed", updates=1)
    assert status(tmp_path)["state"] == "completed"


# ---- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_verdict_and_an_exception(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with Interrupts(said.append), pytest.raises(KeyboardInterrupt, match=number.name):
        os.kill(os.getpid(), number)
    assert said == [f"{number.name} received"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("entered", [interrupting, lambda: Interrupts(pytest.fail)])
def test_a_signal_that_is_to_be_ignored_stays_ignored(entered: Any) -> None:
    """As SIGINT is in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with entered():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_held_waits_for_the_check() -> None:
    said: list[str] = []
    with Interrupts(said.append) as interrupts:
        with interrupts.held():
            interrupts.check()
            os.kill(os.getpid(), signal.SIGINT)
            assert said == ["SIGINT received"]
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):  # a second does not wait
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt, match="SIGINT"):
                interrupts.check()
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_nothing_is_handled() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Interrupts(lambda reason: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_is_passed_on_where_it_does_not_raise() -> None:
    """To rank 0, which takes it as its own."""
    passed: list[int] = []
    said: list[str] = []
    first = Interrupts(said.append)
    with Interrupts(lambda reason: None) as other, other.held():
        other.pass_on = passed.append
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert passed == [signal.SIGUSR1, signal.SIGTERM]
    for one in passed:
        first.take(one)
    assert (first.asked, first.pending, said) == ("SIGUSR1", "SIGTERM", ["SIGTERM received"])


@pytest.mark.parametrize("order", list(itertools.permutations("here 1 2".split())))
def test_a_signal_to_all_ranks_interrupts_once(order: tuple[str, ...]) -> None:
    """However late it comes to each; and then again, for somebody has lost patience."""
    said: list[str] = []
    interrupted = 0
    with Interrupts(said.append) as interrupts, interrupts.held():
        for where in order:
            if where == "here":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                interrupts.take(signal.SIGTERM)
            try:
                interrupts.check()
            except KeyboardInterrupt:
                interrupted += 1
        assert (interrupted, said[0]) == (1, "SIGTERM received")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_signal_that_another_rank_told_of_first_is_not_lost_where_none_is_held() -> None:
    """As while a run is set up, where the next check may be far."""
    with Interrupts(lambda reason: None) as interrupts:
        interrupts.take(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_held_is_raised_where_it_is_released() -> None:
    with Interrupts(lambda reason: None) as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), interrupts.released():
            pass
        with pytest.raises(KeyboardInterrupt, match="SIGINT"), interrupts.released():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending == "SIGINT"


def test_a_signal_in_the_middle_of_a_delicate_function_waits() -> None:
    """Whatever that has called."""
    delicate: dict[str, Any] = {"__name__": "psframe.client", "os": os}
    exec("def call(function): function()", delicate)

    def receive() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with Interrupts(lambda reason: None) as interrupts, interrupts.held():
        passed: list[int] = []
        interrupts.pass_on = passed.append
        with interrupts.released(["psframe.client"]):
            delicate["call"](receive)
            assert passed == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):  # a second does not wait
                delicate["call"](receive)
        interrupts.pending = ""
        with pytest.raises(KeyboardInterrupt), interrupts.released(["psframe.client"]):
            receive()
