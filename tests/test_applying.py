"""`psframe.evaluate` and `psframe.predict`, with the weights that a training has left."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import evaluate, predict, train
from psframe.data import Preprocessing
from psframe.errors import ArgumentError
from psframe.trainer import Trainer
from psframe.weights import load_weights

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, whose labels are names."""
    folder = tmp_path_factory.mktemp("applying")
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 2)) + 5 * np.array([[1, 0], [0, 1], [-1, -1]])[y]
    rows = [[f"{a:.5f}", f"{b:.5f}", CLASSES[k]] for (a, b), k in zip(x, y, strict=True)]
    (folder / "t.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    (folder / "bare.csv").write_text("".join(",".join(row[:2]) + "\n" for row in rows))
    np.savez(folder / "x.npz", x=x)
    np.save(folder / "x.npy", x)
    flags = ["--data", str(folder / "t.csv"), "--run-dir", str(folder / "r"), "--epochs", "5"]
    assert train.main([*flags, "--model", "softmax", "--show", "none", "--lr", "0.3"]) == 0
    return folder / "r"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_evaluate_on_the_test_part_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(run), "--json"]) == 0
    found = json.loads(said(capsys))
    status = json.loads((run / "status.json").read_text())
    assert found["accuracy"] == status["test_accuracy"]
    assert found["samples"] == 18
    assert found["confusion"] == json.loads((run / "summary.json").read_text())["confusion"]


def test_evaluate_on_other_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes are numbered otherwise; their names count."""
    table = run.parent / "other.csv"
    table.write_text("5,0,ant\n-5,-5,cat\n-5,-5,cat\n")
    assert evaluate.main([str(run), str(table)]) == 0
    text = said(capsys)
    assert text.startswith(f"{table}: accuracy 100.00%  (0 of 3 wrong)")
    assert "bee" in text
    table.write_text("5,0,ant\n-5,-5,dog\n")
    assert evaluate.main([str(run), str(table)]) == 1
    assert "label 'dog', which is not among the 3 classes" in capsys.readouterr().err


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.parametrize("name", ["t.csv", "bare.csv", "x.npz", "x.npy"])
def test_predict_in_the_datas_order(
    run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = str(run.parent / name)
    assert predict.main([str(run), data, "-o", "-", "--workers", "2"]) == 0
    header, *found = rows(said(capsys))
    assert header == ["sample", "label", "probability"]
    assert [int(row[0]) for row in found] == list(range(90))
    expected = [CLASSES[i % 3] for i in range(90)]
    right = sum(row[1] == label for row, label in zip(found, expected, strict=True))
    assert right >= 88
    assert all(1 / 3 <= float(row[2]) <= 1 for row in found)


def test_predict_probabilities_into_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(run.parent / "x.npy")
    for suffix in ("csv", "npz"):
        out = str(tmp_path / f"p.{suffix}")
        assert predict.main([str(run), data, "-o", out, "--probabilities"]) == 0
        assert said(capsys) == f"{out}: 90 predictions\n"
    with np.load(tmp_path / "p.npz", allow_pickle=False) as arrays:
        assert arrays["classes"].tolist() == list(CLASSES)
        np.testing.assert_allclose(arrays["probabilities"].sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(arrays["probabilities"].argmax(axis=1), arrays["labels"])
        header, *found = rows((tmp_path / "p.csv").read_text())
        assert header == ["sample", "label", *CLASSES]
        values = np.array([[float(v) for v in row[2:]] for row in found])
        np.testing.assert_allclose(values, arrays["probabilities"], rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.csv", "p.npz"]


def test_weights_have_all_that_is_needed(run: Path) -> None:
    weights = load_weights(run)
    assert (weights.model, weights.input_shape, weights.classes) == ("softmax", (2,), CLASSES)
    assert set(weights.params) == {"w1", "b1"}
    assert isinstance(weights.preprocessing, Preprocessing)
    same = load_weights(run / "checkpoints" / "final.safetensors")
    np.testing.assert_array_equal(same.params["w1"], weights.params["w1"])


def damaged(kind: str, run: Path, folder: Path) -> Path:
    from safetensors.numpy import save

    file = folder / "w.safetensors"
    whole = (run / "checkpoints" / "final.safetensors").read_bytes()
    contents = {
        "missing": None,
        "cut": whole[:-3],
        "text": b"not weights",
        "foreign": save({"w": np.zeros(3)}),
        "without metadata": save(
            {"w1": np.zeros((2, 3), np.float32)}, {"format": "psframe-weights-1"}
        ),
        "without preprocessing": save(
            {"w1": np.zeros((2, 3), np.float32)},
            {
                "format": "psframe-weights-1",
                "model": "softmax",
                "input_shape": "[2]",
                "classes": '["a", "b", "c"]',
            },
        ),
    }
    content = contents[kind]
    if content is not None:
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("cut", "is no safetensors file, or a damaged one"),
        ("text", "is no safetensors file, or a damaged one"),
        ("foreign", "expected weights that psframe.train has written"),
        ("without metadata", "its metadata"),
        ("without preprocessing", "preprocessing.mean is missing"),
    ],
)
def test_weights_that_are_none(run: Path, tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        load_weights(damaged(kind, run, tmp_path))


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (predict, ["{run}", "nope.npz"], "data 'nope.npz': no such file"),
        (predict, ["{run}/none", "digits"], "none: no such file"),
        (predict, ["{run}/checkpoints", "digits"], "this run has left no weights"),
        (predict, ["{run}", "digits"], "expects (2,)"),
        (predict, ["{run}", "{run}/../x.npy", "-o", "x.json"], "expected a file .csv or .npz"),
        (predict, ["{run}", "{run}/../x.npy", "-o", "no/such/p.csv"], "cannot be written"),
        (predict, ["{run}", "{run}/../x.npy", "--part", "test"], "there is no part 'test'"),
        (evaluate, ["{run}", "--part", "validation"], "only ['train', 'test']"),
        (evaluate, ["{run}/checkpoints/final.safetensors"], "name the data"),
        (evaluate, ["{run}", "{run}/../bare.csv"], "expects (2,)"),
        (evaluate, ["{run}", "--servers", "0"], "--servers: expected at least 1, got 0"),
        (evaluate, ["{run}", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (predict, ["{run}", "{run}/../x.npy", "--servers", "-1"], "--servers: expected at least"),
        (predict, ["{run}", "{run}/../x.npy", "--workers", "-1"], "--workers: expected at least"),
        (predict, ["{run}", "{run}/../x.npy", "--workers", "100000000"], "expected at most 1000"),
        (predict, ["{run}", "{run}/../x.npy", "-o", "d.csv/"], "'d.csv/' is the name of a folder"),
    ],
)
def test_what_is_wrong_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], command: Any, flags: list[str], words: str
) -> None:
    assert command.main([flag.format(run=run) for flag in flags]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("psframe: error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [predict, evaluate])
def test_a_model_that_ends_the_program_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    def leave(*_: Any) -> None:
        sys.exit(0)

    monkeypatch.setattr("psframe.models.softmax.Softmax.probabilities", leave)
    assert command.main([str(run), str(run.parent / "t.csv")]) == 1
    assert capsys.readouterr() == ("", "psframe: error: rank 0: the model called sys.exit(0)\n")


@pytest.mark.parametrize("command", [predict, evaluate])
def test_a_device_that_is_not_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any
) -> None:
    monkeypatch.setattr("psframe.devices.choosing.visible_gpus", lambda: 0)
    flags = [str(run), str(run.parent / "t.csv"), "--device", "cuda"]
    assert command.main(flags) == 1
    out, err = capsys.readouterr()
    assert err.startswith("psframe: error: device: 'cuda' needs a GPU")
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--servers", "0"], "--servers: expected at least 1, got 0"),
        (["--device", "cuda"], "rank 1: ArgumentError: device: 'cuda' needs a GPU"),
    ],
)
def test_wrong_flags_on_all_ranks_are_said_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = [sys.executable, "-m", "psframe.launch", "-n", "3", "--", "evaluate", str(run), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    errors = [text for text in done.stderr.splitlines() if text.startswith("psframe: error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"psframe: error: {words}")
    assert "Traceback" not in done.stderr


def test_what_a_terminal_would_obey_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{x},{x},{'a' if x % 2 else chr(27) + '[31mb'}\n" for x in range(20)]
    (tmp_path / "t.csv").write_text("".join(lines))
    flags = ["--data", str(tmp_path / "t.csv"), "--run-dir", str(tmp_path / "r"), "--epochs", "1"]
    assert train.main([*flags, "--model", "softmax", "--show", "none"]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "r")]) == 0
    text = said(capsys)
    assert "\\x1b[31mb" in text
    assert "\x1b" not in text
    assert evaluate.main([str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(said(capsys))["classes"] == ["\x1b[31mb", "a"]


def test_all_parts_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for part in ("train", "test", "all"):
        assert evaluate.main([str(run), "--part", part, "--json"]) == 0
        counts[part] = np.array(json.loads(said(capsys))["confusion"])
    assert counts["all"].sum() == 90
    np.testing.assert_array_equal(counts["train"] + counts["test"], counts["all"])


def centres(labels: list[int]) -> Any:
    return 5.0 * np.array([[1, 0], [0, 1], [-1, -1]])[labels]


def test_all_parts_of_data_that_has_some(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, though they are of different dtypes; and each alone."""
    labels = {"train": [0, 1, 2, 1, 1], "val": [2, 0, 1], "test": [1, 0, 2, 2]}
    arrays = {f"x_{name}": centres(y) for name, y in labels.items()}
    arrays["x_train"] = arrays["x_train"].astype(np.int8)
    file = tmp_path / "parts.npz"
    np.savez(file, **arrays, **{f"y_{name}": np.array(y) for name, y in labels.items()})  # type: ignore[arg-type]
    names = {"train": "train", "validation": "val", "test": "test"}
    for part, expected in {
        **{part: labels[name] for part, name in names.items()},
        "all": [*labels["train"], *labels["val"], *labels["test"]],
    }.items():
        assert predict.main([str(run), str(file), "-o", "-", "--part", part]) == 0
        assert [row[1] for row in rows(said(capsys))[1:]] == [CLASSES[k] for k in expected]


def test_what_was_measured_is_not_measured_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Preprocessing, "measure", None)  # it would be called in vain
    for command, flags in (
        (evaluate, [str(run)]),
        (evaluate, [str(run), str(run.parent / "t.csv")]),
        (predict, [str(run), str(run.parent / "t.csv"), "-o", "-"]),
    ):
        assert command.main(flags) == 0  # type: ignore[attr-defined]
        said(capsys)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of one channel, 2 x 3."""
    folder = tmp_path_factory.mktemp("images")
    y = np.arange(40) % 2
    x = y[:, None, None, None] + np.random.default_rng(0).normal(0, 0.1, (40, 1, 2, 3))
    np.savez(folder / "images.npz", x=x, y=y)
    flags = ["--data", str(folder / "images.npz"), "--run-dir", str(folder / "r"), "--epochs", "2"]
    assert train.main([*flags, "--model", "softmax", "--show", "none"]) == 0
    return folder / "r"


@pytest.mark.parametrize("shape", [(1, 2, 3), (6,), (2, 3)])
def test_flat_images_and_those_without_a_channel_are_taken(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    y = np.array([0, 1, 1])
    np.savez(tmp_path / "x.npz", x=np.broadcast_to(y[:, None], (3, 6)).reshape(3, *shape))
    assert predict.main([str(image_run), str(tmp_path / "x.npz"), "-o", "-"]) == 0
    assert [row[1] for row in rows(said(capsys))[1:]] == ["0", "1", "1"]


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (2, 1, 3), (1, 1, 2, 3), (3, 2, 1), (5,)])
def test_other_shapes_are_refused_though_they_have_as_many_numbers(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, *shape)))
    assert predict.main([str(image_run), str(tmp_path / "x.npy"), "-o", "-"]) == 1
    assert "expects (1, 2, 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "{tmp}/none/p.csv"], "cannot be written: No such file or directory"),
        (["-o", "{tmp}/folder.csv"], "cannot be written: Is a directory"),
        (["-o", "{tmp}/p.csv", "--part", "test"], "there is no part 'test'"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(Trainer, "predict", None)  # it would be called in vain
    (tmp_path / "folder.csv").mkdir()
    given = [flag.format(tmp=tmp_path) for flag in flags]
    assert predict.main([str(run), str(run.parent / "x.npy"), *given]) == 1
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["folder.csv"], "nothing is left behind"


def test_a_disk_that_fills_leaves_what_was_there(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "p.npz").write_text("before")
    monkeypatch.setattr(np, "savez", full)
    flags = [str(run), str(run.parent / "x.npy"), "-o", str(tmp_path / "p.npz")]
    assert predict.main(flags) == 1
    assert "p.npz: cannot be written: No space left" in capsys.readouterr().err
    assert (tmp_path / "p.npz").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_what_fails_on_another_rank_is_said(run: Path, tmp_path: Path, command: str) -> None:
    """The data is on rank 0's file system and not on rank 1's."""
    script = tmp_path / "s.py"
    output = "'-o', '-'" if command == "predict" else "'--json'"
    script.write_text(
        "import os, sys\n"
        "from psframe.launcher import find_launcher\n"
        f"from psframe import {command}\n"
        f"os.chdir({str(run.parent)!r} if find_launcher().rank != 1 else {str(tmp_path)!r})\n"
        f"sys.exit({command}.main([{str(run)!r}, 't.csv', {output}]))\n"
    )
    line = [sys.executable, "-m", "psframe.launch", "-n", "3", "--", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    errors = [text for text in done.stderr.splitlines() if text.startswith("psframe: error")]
    assert errors == ["psframe: error: rank 1: ArgumentError: data 't.csv': no such file"]
    assert done.stdout.count("\n") == 1, "the command line of mpirun, and no predictions"


@pytest.mark.parametrize(
    "y",
    [[1, 1, 1], ["no", "such", "label"], [-1, 0, 99], [0.5, 1.5, 2.5], [[0, 1], [1, 0], [0, 0]]],
    ids=str,
)
def test_predict_reads_no_labels(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], y: Any
) -> None:
    np.savez(tmp_path / "x.npz", x=centres([2, 0, 1]), y=np.array(y))
    assert predict.main([str(run), str(tmp_path / "x.npz"), "-o", "-"]) == 0
    assert [row[1] for row in rows(said(capsys))[1:]] == ["cat", "ant", "bee"]


@pytest.mark.parametrize("y", [[2, 2, 2], [2], [0, 2]], ids=str)
def test_evaluate_takes_few_samples_and_one_class(
    tmp_path: Path, image_run: Path, capsys: pytest.CaptureFixture[str], y: list[int]
) -> None:
    """What one cannot train on; but a label that the model does not know is refused."""
    labels = np.array(y) // 2
    x = np.broadcast_to(labels[:, None, None, None], (len(y), 1, 2, 3))
    np.savez(tmp_path / "few.npz", x=x, y=labels)
    assert evaluate.main([str(image_run), str(tmp_path / "few.npz"), "--json"]) == 0
    assert json.loads(said(capsys))["accuracy"] == 1.0
    np.savez(tmp_path / "few.npz", x=x, y=np.array(y))
    assert evaluate.main([str(image_run), str(tmp_path / "few.npz")]) == 1
    assert "label '2', which is not among the 2 classes" in capsys.readouterr().err
