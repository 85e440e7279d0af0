"""`python -m psframe.data`: what it says, what it writes, and a disk that is full."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import write_run

from psframe.data import Parts, load
from psframe.data.__main__ import main
from psframe.data.converting import convert


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert (err if status == 0 else out) == ""
    return out or err


def test_describe_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "describe", "digits").splitlines()
    assert lines[0] == "digits: digits, samples of 8 x 8 uint8"
    assert lines[1] == "classes     10"
    assert lines[2].startswith("train       1,797 samples, values 0 to 16, ")
    assert lines[3].split()[:4] == ["by", "class", "0:", "178"]
    found = json.loads(told(capsys, "describe", "digits", "--json"))
    assert sum(found["parts"]["train"]["by_class"]) == 1797
    assert found["input_shape"] == [8, 8]


def test_describe_data_without_a_finite_value(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s").mkdir()
    np.save("s/x.npy", np.full((4, 2), np.nan, np.float32))
    np.save("s/y.npy", np.arange(4) % 2)
    entry = {"x": "x.npy", "y": "y.npy", "n": 4}
    index = {"format": "psframe-shards", "version": 1, "classes": ["a", "b"]}
    Path("s/index.json").write_text(json.dumps({**index, "parts": {"train": [entry]}}))
    assert "4 samples, no finite value, 8 NOT FINITE" in told(capsys, "describe", "s")
    found = json.loads(told(capsys, "describe", "s", "--json"))["parts"]["train"]
    assert (found["least"], found["largest"], found["not_finite"]) == (None, None, 8)


def test_describe_a_table_by_its_label(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text("kind,a\nx,1\ny,2.5\nx,-3\n")
    text = told(capsys, "describe", "t.csv", "--label", "kind")
    assert "values -3 to 2.5" in text
    assert "x: 2  y: 1" in text
    wrong = told(capsys, "describe", "t.csv", "--label", "king", status=1)
    assert "did you mean 'kind'?" in wrong


def test_what_is_converted_is_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (25, 4, 3), dtype=np.uint8), np.arange(25) % 4
    np.savez("d.npz", x_train=x, y_train=y, x_test=x[:7], y_test=y[:7])
    assert told(capsys, "convert", "d.npz", "out", "--samples-per-shard", "10") == "out: 4 shards\n"
    data = load("out")
    assert isinstance(data, Parts)
    assert data.test is not None
    for part, n in ((data.train, 25), (data.test, 7)):
        np.testing.assert_array_equal(part.raw(slice(None)), x[:n])
        np.testing.assert_array_equal(part.labels, y[:n])
        assert part.x.dtype == np.uint8
    assert sorted(p.name for p in Path().iterdir()) == ["d.npz", "out"]


def test_what_is_there_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("mine")
    Path("folder").mkdir()
    for name in ("file", "folder"):
        for more in ([], ["--overwrite"]):
            assert "there is such a file" in told(
                capsys, "convert", "digits", name, *more, status=1
            )
    told(capsys, "convert", "digits", "out")
    assert "--overwrite shards" in told(capsys, "convert", "digits", "out", status=1)
    told(capsys, "convert", "digits", "out", "--overwrite", "--samples-per-shard", "900")
    assert len(list(Path("out").glob("*-x.npy"))) == 2
    wrong = told(capsys, "convert", "digits", "new", "--samples-per-shard", "0", status=1)
    assert "expected 1 or more, got 0" in wrong


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits")
    convert(data, Path("out"))
    before = sorted((p.name, p.stat().st_size) for p in Path("out").iterdir())
    save, count = np.save, 0

    def full(*args: Any, **how: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **how)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(Exception, match="out: cannot be written: No space left on device"):
        convert(data, Path("out"), samples_per_shard=100, overwrite=True)
    assert sorted((p.name, p.stat().st_size) for p in Path("out").iterdir()) == before
    assert [p.name for p in Path().iterdir()] == ["out"]


def test_a_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "convert", "digits", "a" * 300, status=1)
    assert said.endswith(": cannot be written: File name too long\n")
    assert list(Path().iterdir()) == []


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    label = "red\x1b[31m\u202e"
    Path("t.csv").write_text(f'1,2,{label}\n3,4,"a\rb"\n5,6,ümlaut\n', encoding="utf-8")
    lines = told(capsys, "describe", "t.csv").splitlines()
    assert lines[-1].split("  ")[-3:] == ["a\\rb: 1", "red\\x1b[31m\\u202e: 1", "ümlaut: 1"]
    found = json.loads(told(capsys, "describe", "t.csv", "--json"))
    assert found["classes"] == ["a\rb", label, "ümlaut"]
    said = told(capsys, "describe", "t.csv", "--label", "x", status=1)
    assert "\x1b" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("flags", [["data", "describe", "digits"], ["report", "r"]])
def test_output_into_a_full_disk(flags: list[str]) -> None:
    if flags[0] == "report":
        write_run(Path("r"))
    line = [sys.executable, "-m", f"psframe.{flags[0]}", *flags[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr == "psframe: error: [Errno 28] No space left on device\n"


def test_wrong_flags_end_with_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["describe", "digits", "--lable", "x"])
    assert caught.value.code == 2
