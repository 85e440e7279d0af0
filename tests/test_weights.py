"""Files of weights that are damaged, or not what they claim: one error, which names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from psframe import evaluate
from psframe.data import Dataset, Preprocessing
from psframe.errors import ArgumentError, RunDirError
from psframe.weights import load_weights, save_weights

CLASSES = ("ant", "bee", "cat")
PARAMS = {"w1": np.ones((6, 3), np.float32), "b1": np.zeros(3, np.float32)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    scale = Preprocessing(np.zeros((2, 3)), np.ones((2, 3)))
    x = np.zeros((3, 2, 3), np.float32)
    train = Dataset(x, np.arange(3), 3, "made", CLASSES, preprocessing=scale)
    return save_weights(tmp_path, PARAMS, "softmax", train)


def rewrite(file: Path, *, drop: str = "", **changed: Any) -> None:
    """Change tensors by their names, and metadata given as text."""
    tensors = load(file.read_bytes())
    metadata = {
        "format": "psframe-weights-1",
        "model": "softmax",
        "input_shape": "[2, 3]",
        "classes": json.dumps(CLASSES),
    }
    for name, value in changed.items():
        if isinstance(value, str):
            metadata[name] = value
        else:
            tensors[name.replace("p_", "preprocessing.")] = value
    metadata.pop(drop, None)
    file.write_bytes(save(tensors, metadata))


def test_what_was_saved_is_loaded(file: Path) -> None:
    weights = load_weights(file)
    assert (weights.input_shape, weights.classes) == ((2, 3), CLASSES)
    assert set(weights.params) == set(PARAMS)
    rewrite(file, p_mean=np.zeros(()), p_deviation=np.ones((2, 1)))
    assert load_weights(file).preprocessing.deviation.shape == (2, 1)


NAN = np.full((6, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"w1": np.ones((6, 3), np.float16)}, "parameters of float32, or of float64, found float1"),
        ({"w1": np.ones((6, 3), np.int64)}, "parameters of float32, or of float64, found float32,"),
        ({"w1": np.ones((6, 3), bool)}, "parameters of float32, or of float64, found bool"),
        ({"w1": np.ones((6, 3))}, "found float32, float64"),
        ({"w1": NAN}, "18 of the 18 numbers of parameter 'w1' are NaN or infinite"),
        ({"b1": np.array([0, np.inf, 0], np.float32)}, "1 of the 3 numbers of parameter 'b1'"),
        ({"input_shape": "[-2, -3]"}, "expected a list of sizes from 1 on, got [-2, -3]"),
        ({"input_shape": "[0, 8]"}, "expected a list of sizes"),
        ({"input_shape": "[1e30]"}, "expected a list of sizes"),
        ({"input_shape": "[Infinity]"}, "expected a list of sizes"),
        ({"input_shape": "[2.5, 3]"}, "expected a list of sizes"),
        ({"input_shape": "[true, 3]"}, "expected a list of sizes"),
        ({"input_shape": '"23"'}, "expected a list of sizes from 1 on, got '23'"),
        ({"input_shape": "null"}, "expected a list of sizes"),
        ({"input_shape": "[]"}, "expected a list of sizes"),
        ({"input_shape": "[100000000, 10000000]"}, "numbers in a sample"),
        ({"input_shape": "[" * 100_000}, "input_shape: is no JSON"),
        ({"input_shape": "[" + "9" * 5000 + "]"}, "input_shape: "),
        ({"classes": '"abc"'}, "classes: expected a list of names, got 'abc'"),
        ({"classes": '["ant", "ant", "bee"]'}, "classes: 'ant' is the name of more than one"),
        ({"classes": '["ant", null, "bee"]'}, "classes: expected a list of names"),
        ({"classes": '["ant", "\\ud800", "bee"]'}, "classes: a name is no text"),
        ({"classes": "[]"}, "classes: expected a list of names"),
        ({"p_mean": np.zeros((5, 7))}, "'preprocessing.mean' has shape (5, 7), which does not fit"),
        ({"p_mean": np.zeros((4, 2, 3))}, "'preprocessing.mean' has shape (4, 2, 3)"),
        ({"p_deviation": np.ones(6)}, "'preprocessing.deviation' has shape (6,)"),
        ({"p_deviation": np.zeros(3)}, "positive deviations"),
        ({"drop": "model"}, "its metadata have no 'model'"),
        ({"drop": "classes"}, "its metadata have no 'classes'"),
    ],
)
def test_damaged_weights_are_refused(file: Path, changed: dict[str, Any], words: str) -> None:
    rewrite(file, **changed)
    with pytest.raises(ArgumentError) as caught:
        load_weights(file)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_why_weights_cannot_be_written_is_told_whatever_became_of_the_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").touch()  # where a folder was
    train = Dataset(np.zeros((3, 2, 3), np.float32), np.arange(3), 3, "made", CLASSES)
    with pytest.raises(RunDirError, match="final weights could not be written: Not a directory"):
        save_weights(tmp_path, PARAMS, "softmax", train)


def test_no_parameters(file: Path) -> None:
    tensors = load(file.read_bytes())
    kept = {name: tensors[name] for name in tensors if name not in PARAMS}
    file.write_bytes(save(kept))
    rewrite(file)
    with pytest.raises(ArgumentError, match="it holds no parameters"):
        load_weights(file)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "cnn"}, "images of 2 x 3 are too small"),
        ({"model": "mlp"}, "its weights are not those of the model 'mlp'"),
        ({"model": "softmaks"}, "did you mean 'softmax'"),
        ({"classes": '["ant", "bee"]'}, "for samples of shape (2, 3) and 2 classes"),
        ({"w1": np.ones((5, 3), np.float32)}, "its weights are not those of the model 'softmax'"),
    ],
)
def test_weights_of_another_model(
    file: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], words: str
) -> None:
    rewrite(file, **changed)
    assert evaluate.main([str(file), "digits"]) == 1
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith(f"psframe: error: {file}: ")
    assert (out, err.count("\n")) == ("", 1)
