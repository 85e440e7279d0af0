"""Checkpoints that are damaged, or made by somebody else: one kind of error, nothing is read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    LAYOUT,
    contents,
    no_descriptor_left,
    open_newest,
    rewrite_manifest,
    same_as,
    save,
    seal,
    write_shards,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psframe.checkpoint import Manifest, Reader, newest, open_checkpoint, write_shard
from psframe.errors import CheckpointError

FILES = ("manifest.json", "state.json", "shard-0-of-2.safetensors", "shard-1-of-2.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, 5)
    return tmp_path / "v000000005"


def refused(folder: Path) -> str:
    """Open the checkpoint, which must fail, and give the reason."""
    with no_descriptor_left(), pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder.parent, 5, LAYOUT)
    reason = str(caught.value)
    prefix = f"{folder}: is no checkpoint that can be used: "
    assert reason.startswith(prefix)
    assert "\n" not in reason
    assert len(reason) < len(prefix) + 600
    return reason.removeprefix(prefix)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_byte_counts(
    folder: Path, name: str, mask: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Flip one byte after the other: each is found, and the checkpoint before is taken."""
    save(folder.parent, 4)
    whole = (folder / name).read_bytes()
    fd = os.open(folder / name, os.O_WRONLY)
    for place, byte in enumerate(whole):
        os.pwrite(fd, bytes([byte ^ mask]), place)
        with open_newest(folder.parent) as reader:
            assert reader.version == 4, f"{name}: byte {place} does not count"
        os.pwrite(fd, bytes([byte]), place)
    os.close(fd)
    assert len(caplog.records) == len(whole)
    caplog.clear()
    with open_newest(folder.parent) as reader:
        assert same_as(reader, 5)


@pytest.mark.parametrize("name", FILES)
def test_every_length_counts(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for size in range(0, len(whole), 7):
        (folder / name).write_bytes(whole[:size])
        assert name in refused(folder)
    (folder / name).write_bytes(whole + b"\n")
    assert name in refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_not_followed(folder: Path, name: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    assert refused(folder) == f"{name} is a link, which is not followed"


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert refused(folder) == f"{name} is not a regular file"
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refused(folder) == f"{name} is not a regular file"


def test_a_linked_folder_is_not_followed(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")
    assert newest(folder.parent, LAYOUT) is None
    assert refused(folder) == "Not a directory"


def test_the_folder_of_all_may_be_linked(folder: Path) -> None:
    link = folder.parent.parent / f"link-{folder.parent.name}"
    link.symlink_to(folder.parent)
    with open_newest(link) as reader:
        assert same_as(reader, 5)


def test_a_folder_renamed_to_another_version(folder: Path) -> None:
    folder.rename(folder.parent / "v000000006")
    with pytest.raises(CheckpointError, match="expected 6, as the folder says, got 5"):
        newest(folder.parent, LAYOUT)


BIG = 1 << 61


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": "zip"}, "expected the format psframe-checkpoint"),
        ({"format_version": 2}, "is of format version 2, this psframe reads 1"),
        ({"format_version": 1.0}, "format_version: expected an integer"),
        ({"version": True}, "version: expected int"),
        ({"version": 6}, "expected 5, as the folder says, got 6"),
        ({"time_s": float("inf")}, "time_s: expected a finite number"),
        ({"time_s": 3}, "time_s: expected float"),
        ({"psframe": "1\n2"}, "psframe: expected a version"),
        ({"psframe": "1" * 200}, "psframe: expected a version"),
        ({"more": 1}, "expected an object of format"),
        ({"layout": []}, "layout: expected dict, got []"),
        ({"layout__names": []}, "layout: names: expected names, got []"),
        ({"layout__names": ["a", "a", "b"]}, "names that differ"),
        ({"layout__names__0": 3}, "layout: names: expected names"),
        ({"layout__shapes": [[4]]}, "expected 3 shapes"),
        ({"layout__shapes__0": 4}, "expected 3 shapes"),
        ({"layout__shapes__0": [-1]}, "shapes: expected an integer from 0"),
        ({"layout__shapes__0": [1.5]}, "shapes: expected an integer from 0"),
        ({"layout__shapes__0": [1 << 59] * 64}, "elements: expected an integer"),
        ({"layout__shapes__0": [1] * 65}, "at most 64 dimensions"),
        ({"layout__shapes": [[0], [0], [0]]}, "elements: expected an integer from 1"),
        ({"layout__dtype": "float16"}, "layout: dtype: expected float32 or float64"),
        ({"layout__sha256": "0" * 64}, "layout: sha256: expected that of the layout"),
        ({"shards": []}, "shards: expected 1 to 4096, got 0"),
        ({"shards": [{}] * 5000}, "shards: expected at most 4096, got 5000"),
        ({"shards__0": 7}, "shards: 0: expected an object of"),
        ({"shards__0__count": 1}, "shards: 0: file: expected shard-0-of-1"),
        ({"shards__1__index": 0}, "file: expected shard-0-of-2"),
        ({"shards__1__index": 2}, "shards: 1: index: expected an integer from 0 to 1"),
        ({"shards__0__count": 1 << 40}, "shards: 0: count: expected an integer from 1 to 4096"),
        ({"shards__0__file": "../../../etc/passwd"}, "file: expected shard-0-of-2.safetensors"),
        ({"shards__0__file": "shard-1-of-2.safetensors"}, "file: expected shard-0-of-2"),
        ({"shards__0__begin": -1}, "shards: 0: begin: expected an integer from 0"),
        ({"shards__0__begin": 33}, "shards: 0: begin: expected an integer from 0 to 32"),
        ({"shards__0__end": BIG}, "shards: 0: end: expected an integer from 0"),
        ({"shards__0__end": 15}, "shards: 0: bytes: expected"),
        ({"shards__0__bytes": 10**15}, "shards: 0: bytes: expected"),
        ({"shards__0__sha256": "f" * 63}, "sha256: expected 64 hexadecimal digits"),
        ({"shards__0__sha256": "F" * 64}, "sha256: expected 64 hexadecimal digits"),
        ({"shards__0__sha256": "f" * 64}, "shard-0-of-2.safetensors is damaged: its sha256"),
        ({"shards__0__arrays": {}}, "arrays: expected 1 to 4096 arrays, got 0"),
        ({"shards__0__arrays": {"a b": "float32"}}, "arrays: expected names of letters"),
        ({"shards__0__arrays__params": "float16"}, "params: expected float32 or float64"),
        ({"shards__0__arrays__params": ["float32"]}, "params: expected float32 or float64"),
        ({"state__file": "config.toml"}, "state: file: expected state.json"),
        ({"state__bytes": 1 << 40}, "state: bytes: expected an integer from 2 to"),
        ({"state__bytes": 3}, "state.json has 90 bytes, more than the 3 allowed"),
        ({"state__sha256": None}, "state: sha256: expected str"),
    ],
)
def test_a_manifest_that_says_something_else(
    folder: Path, changed: dict[str, Any], words: str
) -> None:
    rewrite_manifest(folder / "manifest.json", **changed)
    tracemalloc.start()
    reason = refused(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in reason
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 16), (16, 16), (16, 54), (54, 54)], None),
        ([(0, 16), (17, 54)], "shards: 1: begin: expected 16, got 17"),
        ([(0, 16), (15, 54)], "shards: 1: begin: expected 16, got 15"),
        ([(1, 54)], "shards: 0: begin: expected 0, got 1"),
        ([(0, 54), (0, 0)], "shards: 1: begin: expected 54, got 0"),
        ([(0, 16), (16, 53)], "expected ranges up to 54"),
        ([(0, 16), (16, 55)], "expected ranges up to 54"),
    ],
)
def test_shards_tile_the_vector(
    tmp_path: Path, ranges: list[tuple[int, int]], words: str | None
) -> None:
    save(tmp_path, 5, 1)
    shards = [
        write_shard(
            tmp_path, 5, i, len(ranges), {"params": np.zeros(e - b, "f4")}, begin=b, end=e
        ).fields()
        for i, (b, e) in enumerate(ranges)
    ]
    save(tmp_path, 5, 1)  # the only shard of one may have been written over
    rewrite_manifest(tmp_path / "v000000005/manifest.json", shards=shards)
    if words is not None:
        assert words in refused(tmp_path / "v000000005")
    else:
        open_checkpoint(tmp_path, 5, LAYOUT).close()


@pytest.mark.parametrize(
    "body",
    [
        *(b"[" * 100_000, b"{" + b'"a":{' * 50_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":\xff}'),
        *(b"[]", b"1}", b"null", b'{"format":"psframe-checkpoint","format_version":1}', b"{}"),
        b'{"format":{"psframe-checkpoint":1}}',
    ],
)
def test_a_manifest_that_is_no_such_object(folder: Path, body: bytes) -> None:
    (folder / "manifest.json").write_bytes(seal(body[:-1] + b"}"))
    refused(folder)


def test_a_large_manifest_is_not_read(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 40)
    assert "more than the 16777216 allowed" in refused(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[1]", b"{}x", b"3.0", b'{"a":1e'])
def test_a_state_that_is_no_object(folder: Path, text: bytes) -> None:
    (folder / "state.json").write_bytes(text)
    sha256 = hashlib.sha256(text).hexdigest()
    rewrite_manifest(folder / "manifest.json", state__bytes=len(text), state__sha256=sha256)
    assert refused(folder).startswith("state.json: ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"I32"'),
        (b'"begin":"0"', b'"begin":"1"'),
        (b'"shape":[32]', b'"shape":[23]'),
        (b'"params"', b'"sarmap"'),
        (b"\x00\x00{", b"\x00\x7f{"),
    ],
)
def test_a_header_that_says_something_else(folder: Path, old: bytes, new: bytes) -> None:
    file = folder / FILES[2]
    data = file.read_bytes()
    assert old in data
    data = data.replace(old, new, 1)
    file.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    rewrite_manifest(folder / "manifest.json", shards__0__sha256=sha256)
    assert refused(folder) == f"{FILES[2]} is damaged: its header is not that of the manifest"


# ---- fuzz --------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-1, 60)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float32", "params", FILES[2], "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["params", "file"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    save(folder, 5)
    return folder / "v000000005"


def places(value: Any, way: tuple[str, ...] = ()) -> list[str]:
    """All places of a JSON value, as `rewrite_manifest` takes them."""
    steps: Any = ()
    if isinstance(value, dict):
        steps = value.items()
    elif isinstance(value, list):
        steps = enumerate(value)
    inner = [place for key, one in steps for place in places(one, (*way, str(key)))]
    return (["__".join(way)] if way else []) + inner


def ours_or_whole(folder: Path) -> None:
    """Open what may be damaged: an error of ours, or the content that was written."""
    try:
        reader: Reader = open_checkpoint(folder.parent, 5, LAYOUT)
    except CheckpointError:
        return
    with reader:
        assert same_as(reader, 5)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_the_manifest_is_ours_to_refuse(made: Path, data: st.DataObject) -> None:
    file = made / "manifest.json"
    whole = file.read_bytes()
    fields = json.loads(whole)
    del fields["sha256"]
    chosen = data.draw(st.sampled_from(places(fields)))
    try:
        rewrite_manifest(file, **{chosen: data.draw(JSON)})
        ours_or_whole(made)
    finally:
        file.write_bytes(whole)


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300)
def test_any_bytes_as_a_manifest(body: bytes) -> None:
    for data in (body, seal(body)):
        with pytest.raises(CheckpointError):
            Manifest.parse(data, 5)


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_header_is_ours_to_refuse(made: Path, data: st.DataObject) -> None:
    """With a sum and a size that fit, as if another program had written it."""
    shard, manifest = made / FILES[2], made / "manifest.json"
    whole = shard.read_bytes(), manifest.read_bytes()
    size = 8 + int.from_bytes(whole[0][:8], "little")
    at = data.draw(st.integers(0, size - 1))
    change = data.draw(st.binary(min_size=1, max_size=9))
    changed = bytearray(whole[0])
    changed[at : at + len(change)] = change
    try:
        shard.write_bytes(changed)
        sha256 = hashlib.sha256(changed).hexdigest()
        rewrite_manifest(manifest, shards__0__sha256=sha256, shards__0__bytes=len(changed))
        if changed[:size] != whole[0][:size]:
            refused(made)
        elif changed == whole[0]:
            open_checkpoint(made.parent, 5, LAYOUT).close()
    finally:
        shard.write_bytes(whole[0])
        manifest.write_bytes(whole[1])


@given(st.lists(st.tuples(st.sampled_from(FILES), st.integers(0, 1400), st.binary(max_size=20))))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_found_or_does_none(
    tmp_path_factory: pytest.TempPathFactory, made: Path, damage: list[tuple[str, int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / made.name
    shutil.copytree(made, folder)
    for name, at, change in damage:
        data = bytearray((folder / name).read_bytes())
        data[at : at + len(change)] = change
        (folder / name).write_bytes(data)
    ours_or_whole(folder)
    shutil.rmtree(folder.parent)


def test_newest_needs_no_log_of_what_is_half_written(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(folder.parent, 6)
    with caplog.at_level(logging.INFO, "psframe"), open_newest(folder.parent) as reader:
        assert contents(reader)
    assert caplog.records == []
