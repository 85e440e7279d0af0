"""`make bench-gpu` and `make test-gpu` without a GPU: what they skip, the table, what is measured.

What a card would compute is computed here by stand-ins, or by the CPU: no figure means anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_cupy import FakeCupy, installed

from psframe.benchmarks.job import WrongAnswer
from psframe.optim import cuda

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_parts
    import on_gpu

    return SimpleNamespace(gpu=gpu, parts=gpu_parts, on_gpu=on_gpu)


def place_of(scripts: Any, mpirun: str | None = None) -> Any:
    return scripts.on_gpu.Place("python9", ["Card"], ["Card; driver 1"], mpirun, {"A": "b"})


def done(scripts: Any, status: int | None, *rows: Mapping[str, Any], err: str = "") -> Any:
    out = "\n".join(["what a library says", *map(json.dumps, rows), "{}"])
    return scripts.on_gpu.Done(status, out, err, 12.0)


def row(name: str, figure: float, detail: str = "more") -> dict[str, Any]:
    return {"row": name, "figure": figure, "figure_range": [figure, figure], "detail": detail}


def model(name: str, torch_ms: float) -> dict[str, Any]:
    """A line of gpu_models.py."""
    return {
        "model": name,
        "precision": f"float{torch_ms:.0f}",
        "ratio": torch_ms / 2,
        "psframe_ms": 2.0,
        "psframe_ms_range": [1.0, 4.0],
        "torch_ms": torch_ms,
        "torch_ms_range": [torch_ms, torch_ms],
    }


# ---- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "figure", "verdict"),
    [
        ("kernels", 0.84, "short"),
        ("kernels", 0.85, "pass"),
        ("kernels", 0.95, "aim reached"),
        ("step", 1.16, "short"),
        ("step", 1.15, "pass"),
        ("step", 1.02, "aim reached"),
    ],
)
def test_a_figure_against_its_targets(scripts: Any, name: str, figure: float, verdict: str) -> None:
    rows = {row.name: row for part in scripts.gpu.PARTS for row in part.rows}
    assert rows[name].verdict(figure) == verdict


def test_a_part_that_fails_or_hangs_costs_its_own_rows(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    gpu, limits = scripts.gpu, []
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(gpu, "HERE", tmp_path / "benchmarks")
    for name in ("gpu_parts.py", "gpu_models.py"):
        (tmp_path / "benchmarks" / name).touch()
    answers = {
        "kernels": done(scripts, 0, row("kernels", 0.9)),
        "bus": done(scripts, None),
        "step": done(scripts, 1, err="Traceback\n  ...\nWrongAnswer: another | gradient\n--\n"),
        "--json": done(
            scripts, -11, *(model("mlp", k) for k in (3.0, 2.2)), err="Segmentation fault"
        ),
        "workers": done(scripts, 0, row("workers", 1.2)),
    }

    def run(line: Sequence[str], limit_s: float, environ: Mapping[str, str]) -> Any:
        assert environ == {"A": "b"}
        limits.append(limit_s)
        return answers[line[-1]]

    monkeypatch.setattr(gpu, "find_place", lambda python: place_of(scripts))
    out = tmp_path / "R.md"
    kept = (ROOT / "benchmarks/RESULTS-GPU.md").read_text(encoding="utf-8").partition("<!--")[0]
    out.write_text(f"{kept}<!-- bench: gpu -->\nNo row yet.\n<!-- /bench -->\n", encoding="utf-8")
    assert gpu.main(["--out", str(out)], run) == 1
    printed = capsys.readouterr().out.splitlines()
    verdicts = [line.split("|")[5].strip() for line in printed[2:]]
    not_measured = "not measured"
    assert verdicts == ["pass", not_measured, not_measured, "aim reached", not_measured, "pass"]
    assert "no end within 12 s" in printed[3]
    assert "WrongAnswer: another / gradient" in printed[4]
    assert "1.1 (0.55 to 2.2)" in printed[5]
    assert "float3 1.50 (3.00 over 2.00 ms), float2 1.10" in printed[5]
    assert "exit status -11: Segmentation fault" in printed[6]
    assert sum(limits) < 540
    text = out.read_text(encoding="utf-8")
    assert text.startswith(kept)
    assert "No row" not in text
    assert text.count("<!-- bench: gpu -->") == 1
    assert all(line in text for line in printed)
    assert "* Card; driver 1" in text
    assert "$ make bench-gpu" in text
    before = text.replace("0.9 (0.9 to 0.9)", "")
    assert gpu.main(["--out", str(out), "--only", "kernels"], run) == 0
    assert out.read_text(encoding="utf-8").replace("0.9 (0.9 to 0.9)", "") == before


def test_what_has_no_time_left_or_no_script_is_not_run(scripts: Any) -> None:
    def run(*arguments: Any) -> Any:
        raise AssertionError("it was run")

    (part,) = (part for part in scripts.gpu.PARTS if part.name == "bus")
    (found,) = scripts.gpu.measure(part, place_of(scripts), 0.5, run)
    assert (found.figure, found.detail) == (None, "no time was left")
    gone = scripts.gpu.Part("x", 0, ("benchmarks/x.py",), 10.0, part.rows)
    (found,) = scripts.gpu.measure(gone, place_of(scripts), 9.0, run)
    assert found.detail == "there is no benchmarks/x.py"


def test_all_bounds_together_are_below_nine_minutes(scripts: Any) -> None:
    assert scripts.gpu.LIMIT_S < 540
    assert sum(part.limit_s for part in scripts.gpu.PARTS) <= scripts.gpu.LIMIT_S


def test_ranks_need_an_mpirun_and_go_without(scripts: Any) -> None:
    with_one, without = place_of(scripts, "/opt/bin/mpirun"), place_of(scripts)
    assert with_one.launch(2, "x.py") == ["/opt/bin/mpirun", "-n", "2", "python9", "x.py"]
    assert with_one.launch(0, "x.py") == without.launch(2, "x.py") == ["python9", "x.py"]


# ---- the tests' table ----------------------------------------------------------------------------


def test_tests_that_fail_hang_or_cannot_run_have_a_line_each(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/gpu"))
    import run as runner

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "compute-sanitizer").touch(mode=0o755)
    place = place_of(scripts, "/opt/bin/mpirun")
    place.environ["CUDA_HOME"] = str(tmp_path)
    monkeypatch.setattr(runner, "find_place", lambda python: place)
    Done, lines = scripts.on_gpu.Done, []

    def run(line: Sequence[str], limit_s: float, environ: Mapping[str, str]) -> Any:
        lines.append(line)
        assert ("PSFRAME_TEST_NO_POOL" in environ) == ("memcheck" in line)
        return [
            Done(0, "....\n239 passed, 10 skipped in 12.00s\n", "", 13.0),
            Done(1, "F\nFAILED x\n1 failed, 24 passed in 2.00s\n", "", 3.0),
            Done(None, "", "", 100.0),
            Done(0, "17 passed in 90.00s (0:01:30)\n", "", 90.0),
        ][len(lines) - 1]

    assert runner.main([], run) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-2].strip() for line in printed[2:]] == [
        "passed",
        "FAILED",
        "FAILED",
        "passed",
    ]
    assert "239 passed, 10 skipped" in printed[2]
    assert "no end within 100 s" in printed[4]
    assert lines[2][:3] == ["/opt/bin/mpirun", "-n", "3"]
    assert lines[3][0] == str(tools / "compute-sanitizer")

    without = place_of(scripts)
    without.environ["PATH"] = str(tmp_path)
    monkeypatch.setattr(runner, "_TOOLKITS", ())
    monkeypatch.setattr(runner, "find_place", lambda python: without)
    lines.clear()
    assert runner.main(["--limit", "1"], run) == 0
    printed = capsys.readouterr().out.splitlines()
    assert lines == []
    assert [line.split("  ")[-1] for line in printed[2:]] == [
        "no time was left",
        "no time was left",
        "there is no mpirun that works",
        "compute-sanitizer is not installed",
    ]


# ---- where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["benchmarks/gpu.py", "tests/gpu/run.py"])
def test_without_a_gpu_it_says_so_and_ends(script: str, tmp_path: Path) -> None:
    fake = "__version__ = '9'\ndef is_available():\n    return False\n"
    (tmp_path / "cupy.py").write_text(fake, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (line,) = found.stdout.splitlines()
    assert "-gpu: skipped: " in line
    assert "CuPy sees no CUDA device" in line
    assert found.stderr == ""


def test_an_interpreter_that_lacks_something_says_what(scripts: Any, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')", encoding="utf-8")
    found = scripts.on_gpu.find_place(sys.executable, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert isinstance(found, str)
    assert "no numpy here" in found


def test_an_interpreter_that_is_not_there(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.on_gpu, "ROOT", tmp_path)
    reason = scripts.on_gpu.find_place("no-such-python")
    assert reason == "no-such-python is no interpreter (PYTHON=... names another one)"


def test_a_command_is_ended_with_its_children(scripts: Any) -> None:
    code = "import subprocess as s; s.run(['sleep', '60'])"
    found = scripts.on_gpu.run_bounded([sys.executable, "-c", code], 0.5, os.environ)
    assert found.status is None
    assert found.seconds < 30
    assert "no end within" in found.reason
    quick = scripts.on_gpu.run_bounded([sys.executable, "-c", "print(5)"], 60, os.environ)
    assert (quick.status, quick.out.strip()) == (0, "5")


# ---- what is measured ----------------------------------------------------------------------------


def run_part(scripts: Any, *arguments: str) -> dict[str, Any]:
    settings = scripts.parts.read_settings(arguments)
    found = scripts.parts.PARTS[settings.part](settings)
    assert found is not None
    assert json.loads(json.dumps(found)) == found
    assert found["figure"] > 0
    return dict(found)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    cuda.compile_kernel.cache_clear()
    yield fake
    cuda.compile_kernel.cache_clear()


KERNELS = ("kernels", "--size", "3000", "--rounds", "2", "--repeat", "2")


def test_update_kernels_on_a_stand_in(scripts: Any, card: FakeCuda) -> None:
    found = run_part(scripts, *KERNELS)
    assert found["row"] == "kernels"
    assert "adam" in found["detail"]
    assert len(card.kernels) == 3 * 3 * 2


def test_an_update_that_is_wrong_is_found(
    scripts: Any, card: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = scripts.parts.Update._apply

    def twice(self: Any) -> None:
        apply(self)
        self._done -= self._done > 2

    monkeypatch.setattr(scripts.parts.Update, "_apply", twice)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run_part(scripts, *KERNELS)


def test_the_bus_on_a_stand_in(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(FakeCupy()) as fake:
        found = run_part(scripts, "bus", "--size", "300000", "--rounds", "2")
        assert found["row"] == "bus"
        assert not fake.cuda.runtime.registered, "it was unregistered"
        fetch = scripts.parts.CudaDevice.fetch

        def late(self: Any, index: int, grads: Any, slot: Any, *more: Any) -> Any:
            result = fetch(self, index, grads, slot, *more)
            slot.flat[-1] = np.nan
            return result

        monkeypatch.setattr(scripts.parts.CudaDevice, "fetch", late)
        with pytest.raises(WrongAnswer, match="another gradient"):
            run_part(scripts, "bus", "--size", "300000", "--rounds", "2")


SMALL = ("--device", "cpu", "--server-devices", "cpu", "--widths", "8", "16", "4", "--batch", "4")


def test_steps_are_those_without_psframe(scripts: Any) -> None:
    found = run_part(scripts, "step", *SMALL, "--rounds", "2", "--seconds", "0.01")
    assert "server on cpu" in found["detail"]
    assert "in one process" in found["detail"]


def test_steps_that_differ_are_found(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = scripts.parts.Problem.samples
    seeds = iter(range(9))
    monkeypatch.setattr(
        scripts.parts.Problem, "samples", lambda self, xp, seed: samples(self, xp, next(seeds))
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run_part(scripts, "step", *SMALL, "--rounds", "1", "--seconds", "0.01")


def test_several_workers_on_one_card(scripts: Any) -> None:
    found = run_part(scripts, "workers", *SMALL, "--rounds", "1", "--steps", "3")
    assert "updates a second of 4 workers" in found["detail"]


def test_the_targets_of_the_makefile_install_nothing() -> None:
    for target in ("test-gpu", "bench-gpu"):
        listed = subprocess.run(
            ["make", "-n", target, "PYTHON=somepython"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        assert "somepython" in listed
        assert "venv" not in listed
        assert "pip" not in listed
