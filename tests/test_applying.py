"""`psframe.evaluate` and `psframe.predict`, with the weights that a training has left."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import evaluate, predict, train
from psframe.data import Preprocessing
from psframe.errors import ArgumentError
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
        "without preprocessing": save(
            {"w1": np.zeros((2, 3), np.float32)}, {"format": "psframe-weights-1"}
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
        ("without preprocessing", "its metadata make no sense"),
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
