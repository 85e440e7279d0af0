"""The hosts that `hosts` makes: apart from each other, and gone without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HOSTS, ON_HOST = HERE / "hosts", HERE / "on-host"

# Makes memory to share, says how to open it, and lives until its input ends.
_MAKER = """
import os, sys
from psframe.transports.shared_memory import Segment
segment = Segment.create(1, 4, "f4")
print(os.getpid(), segment.fd, segment.nonce.hex(), flush=True)
sys.stdin.read()
"""
# Tries the numbers of that process and its file, which on another host mean another or none.
_OPENER = """
import sys
from psframe.transports.shared_memory import Segment, node_id
pid, fd, nonce = sys.argv[1:]
opened = Segment.open(int(pid), int(fd), bytes.fromhex(nonce), 1, 4, "f4")
print(node_id().hex(), opened is not None)
"""
_SHARING = """
set -e
mkfifo "$PSFRAME_HOSTS/said" "$PSFRAME_HOSTS/end"
"$ON_HOST" h1 "$PYTHON" "$MAKER" <"$PSFRAME_HOSTS/end" >"$PSFRAME_HOSTS/said" &
exec 3>"$PSFRAME_HOSTS/end"
read -r segment <"$PSFRAME_HOSTS/said"
for host in h1 h1 h2; do
    "$ON_HOST" $host "$PYTHON" "$OPENER" $segment
done
exec 3>&-
wait
"""


@pytest.fixture(autouse=True, scope="module")
def _can() -> None:
    """Skip where there can be no hosts, for the reason that the tool gives."""
    said = run("true").stdout
    if said.startswith("skipped:"):
        pytest.skip(said.strip())


def run(*command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HOSTS), *options, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_each_host_has_its_name_and_its_card() -> None:
    done = run(
        "sh", "-c", f"{ON_HOST} h2 'hostname; tc qdisc'; {ON_HOST} h3 hostname", options=["-n3"]
    )
    assert (done.returncode, done.stderr) == (0, "")
    name, *cards, other = done.stdout.splitlines()
    assert (name, other) == ("h2", "h3")
    assert any("tbf" in line and "rate 1Gbit" in line for line in cards)


@pytest.mark.parametrize("status", [0, 7])
def test_the_status_is_the_commands(status: int) -> None:
    assert run("sh", "-c", f"exit {status}", options=["-n", "1", "-r", "none"]).returncode == status


@pytest.mark.parametrize("options", [["-n", "0"], ["-n", "x"], ["-q"], []])
def test_wrong_options(options: list[str]) -> None:
    done = run(options=options)
    assert done.returncode == 2
    assert "tests/cluster/hosts [-n HOSTS]" in done.stderr


def test_hosts_are_nodes_that_share_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("maker", _MAKER), ("opener", _OPENER)):
        (tmp_path / name).write_text(text)
        monkeypatch.setenv(name.upper(), str(tmp_path / name))
    monkeypatch.setenv("ON_HOST", str(ON_HOST))
    monkeypatch.setenv("PYTHON", sys.executable)
    done = run("bash", "-c", _SHARING)
    assert done.returncode == 0, done.stderr
    (here, one), (again, two), (there, three) = (line.split() for line in done.stdout.splitlines())
    assert (one, two, three) == ("True", "True", "False")
    assert here == again != there


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_all_is_gone_with_it(how: signal.Signals) -> None:
    """Its processes hold the other end of a pipe, which ends with the last of them."""
    before = os.listdir("/sys/class/net")
    command = f"{ON_HOST} h2 sleep 1000 & echo up; exec sleep 1000"
    with subprocess.Popen(
        [str(HOSTS), "sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as tool:
        assert tool.stdout is not None
        assert tool.stdout.readline() == b"up\n"
        tool.send_signal(how)
        assert tool.stdout.read() == b""
        assert tool.wait(timeout=20) == (143 if how is signal.SIGTERM else -how)
    assert sorted(os.listdir("/sys/class/net")) == sorted(before)
