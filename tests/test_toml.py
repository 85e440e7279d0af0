"""TOML: whatever is written reads back equal, judged by the standard library's reader."""

from __future__ import annotations

import doctest
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe import toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12
)


@given(st.dictionaries(TEXT, VALUES, max_size=6))
def test_what_is_written_reads_back_equal(config: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(config)) == config


def test_values_that_toml_spells_otherwise() -> None:
    config = {
        "none": None,
        "path": Path("a/b"),
        "integer": np.int64(3),
        "number": np.float32(0.5),
        "tuple": (1, 2),
        "nan": math.nan,
        "inner": {"deep": {"x": 1e30}, "none": None},
    }
    read = tomllib.loads(toml.dumps(config))
    assert math.isnan(read.pop("nan"))
    assert read == {
        "path": "a/b",
        "integer": 3,
        "number": 0.5,
        "tuple": [1, 2],
        "inner": {"deep": {"x": 1e30}},
    }


@pytest.mark.parametrize("config", [{"x": object()}, {1: 2}, {"x": [None]}, {"x": b"bytes"}])
def test_what_toml_cannot_hold_is_a_type_error(config: dict[Any, Any]) -> None:
    with pytest.raises(TypeError, match="config"):
        toml.dumps(config)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bad, binary = tmp_path / "bad.toml", tmp_path / "binary.toml"
    bad.write_text("a = 1\nb = = 2\n")
    binary.write_bytes(b"\xff\xfe")
    for path, words in [
        (bad, r"bad.toml: is not a TOML file: .*line 2"),
        (binary, r"binary.toml: is not a TOML file"),
        (tmp_path / "none.toml", r"none.toml: cannot be read: No such file"),
        (tmp_path, r"cannot be read: Is a directory"),
    ]:
        with pytest.raises(ValueError, match=words):
            toml.load(path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe: is no regular file"):
        toml.load(pipe)


@pytest.mark.parametrize(
    ("text", "words"),
    [("x = " + "[" * 3000, "nested too deeply"), ("x = " + "1" * 5000, "is not a TOML file: ")],
    ids=["deep", "long"],
)
def test_what_python_cannot_read_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"odd.toml: .*{words}"):
        toml.load(file)


def test_doctests() -> None:
    assert doctest.testmod(toml).failed == 0
