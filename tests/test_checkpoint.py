"""Checkpoints: what is written is read, by any number of servers; old ones go, others stay."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    LAYOUT,
    STATE,
    P,
    arrays_of,
    contents,
    no_descriptor_left,
    open_newest,
    same_as,
    save,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from psframe.checkpoint import (
    Shard,
    abandon,
    checkpoint_name,
    commit,
    committed_versions,
    newest,
    open_checkpoint,
    prune,
    remove_all,
    versions,
    write_shard,
)
from psframe.checkpoint.names import temporary_name, version_of
from psframe.errors import CheckpointError, RunDirError
from psframe.layout import Layout
from psframe.rundir import RunDir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- written and read --------------------------------------------------------------------------


@pytest.mark.parametrize("servers", [1, 2, 3, 7])
def test_what_is_written_is_read(tmp_path: Path, servers: int) -> None:
    with no_descriptor_left():
        manifest = save(tmp_path, 5, servers)
        with open_newest(tmp_path) as reader:
            assert same_as(reader, 5)
            assert (reader.version, reader.manifest, reader.digest) == (
                5,
                manifest,
                manifest.digest,
            )
        reader.close()
    folder = tmp_path / "v000000005"
    shards = [f"shard-{index}-of-{servers}.safetensors" for index in range(servers)]
    assert names(folder) == ["manifest.json", *shards, "state.json"]
    assert json.loads((folder / "state.json").read_text()) == {**STATE, "version": 5}


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = tmp_path / "v000000005"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("servers", [1, 2, 7])
def test_shards_are_safetensors_files(tmp_path: Path, servers: int) -> None:
    save(tmp_path, 5, servers)
    for index, (begin, end) in enumerate(LAYOUT.shards(servers)):
        file = tmp_path / f"v000000005/shard-{index}-of-{servers}.safetensors"
        found = load_file(file)
        assert found.keys() == arrays_of(5).keys()
        for name, array in arrays_of(5).items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array[begin:end])
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {
                "format": "psframe-shard-1",
                "version": "5",
                "begin": str(begin),
                "end": str(end),
            }


def test_the_bytes_of_a_shard(tmp_path: Path) -> None:
    arrays = {"params": np.array([1, 2], np.float32), "kept": np.array([3, 4.0])}
    shard = write_shard(tmp_path, 7, 0, 1, arrays, begin=0, end=2)
    header = (
        b'{"__metadata__":{"format":"psframe-shard-1","version":"7","begin":"0","end":"2"},'
        b'"kept":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},'
        b'"params":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header
    expected += np.array([3, 4], "<f8").tobytes() + np.array([1, 2], "<f4").tobytes()
    assert (tmp_path / "v000000007/shard-0-of-1.safetensors").read_bytes() == expected
    assert shard.bytes == len(expected)


def test_arrays_larger_than_a_piece(tmp_path: Path) -> None:
    params = np.arange(1_500_001, dtype=np.float32)
    layout = Layout.of({"w": params})
    shard = write_shard(tmp_path, 1, 0, 1, {"params": params}, begin=0, end=params.size)
    commit(tmp_path, 1, [shard], {}, layout)
    out = np.empty(1_300_000, np.float32)
    with open_checkpoint(tmp_path, 1, layout) as reader:
        reader.read("params", 77_777, 1_377_777, out)
    np.testing.assert_array_equal(out, params[77_777:1_377_777])


def test_ranges_cross_files(tmp_path: Path) -> None:
    save(tmp_path, 5, 3)
    wanted = arrays_of(5)
    with open_checkpoint(tmp_path, 5, LAYOUT) as reader:
        for begin in range(P + 1):
            for end in range(begin, P + 1):
                out = np.full(end - begin, -1.0)
                reader.read("kept", begin, end, out)
                np.testing.assert_array_equal(out, wanted["kept"][begin:end])


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 3), (3, 2), (7, 1)])
def test_another_number_of_servers_reads_its_ranges(
    tmp_path: Path, before: int, after: int
) -> None:
    save(tmp_path, 5, before)
    with open_checkpoint(tmp_path, 5, LAYOUT) as reader:
        digest = reader.digest
    for begin, end in LAYOUT.shards(after):
        with (
            no_descriptor_left(),
            open_checkpoint(tmp_path, 5, LAYOUT, begin=begin, end=end, digest=digest) as reader,
        ):
            for name, array in arrays_of(5).items():
                out = np.empty(end - begin, array.dtype)
                reader.read(name, begin, end, out)
                np.testing.assert_array_equal(out, array[begin:end])


def test_a_range_needs_its_files_only(tmp_path: Path) -> None:
    save(tmp_path, 5, 3)
    (tmp_path / "v000000005/shard-2-of-3.safetensors").unlink()
    with open_checkpoint(tmp_path, 5, LAYOUT, begin=0, end=20) as reader:
        reader.read("params", 3, 20, np.empty(17, np.float32))
        with pytest.raises(ValueError, match="not what the reader is open for"):
            reader.read("params", 3, P, np.empty(P - 3, np.float32))
    with pytest.raises(CheckpointError, match=r"shard-2-of-3\.safetensors is missing"):
        open_checkpoint(tmp_path, 5, LAYOUT)


def test_another_checkpoint_of_the_same_version_is_noticed(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    save(tmp_path, 5, seed=6)
    with pytest.raises(CheckpointError, match="another one than was expected"):
        open_checkpoint(tmp_path, 5, LAYOUT, begin=0, end=1, digest=first.digest)


def test_what_was_verified_is_what_is_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with open_checkpoint(tmp_path, 5, LAYOUT) as reader:
        save(tmp_path, 5, seed=6)
        assert same_as(reader, 5)
        remove_all(tmp_path)
        assert same_as(reader, 5)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("weights", 0, 1, np.empty(1, "f4")), "no array 'weights'; there are params"),
        (("params", 0, P + 1, np.empty(P + 1, "f4")), r"expected a range in \[0, 54\)"),
        (("params", -1, 1, np.empty(2, "f4")), "expected a range"),
        (("params", 2, 1, np.empty(0, "f4")), "expected a range"),
        (("params", 0, 2, np.empty(3, "f4")), "expected 2 elements of float32, got shape"),
        (("params", 0, 2, np.empty(2, "f8")), "expected 2 elements of float32, got shape"),
        (("params", 0, 2, np.empty((2, 1), "f4")), "expected 2 elements of float32, got shape"),
        (("params", 0, 2, np.empty(4, "f4")[::2]), "contiguous, writable"),
        (("params", 0, 2, np.frombuffer(bytes(8), "f4")), "contiguous, writable"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, request_: Any, words: str) -> None:
    save(tmp_path, 5)
    with open_checkpoint(tmp_path, 5, LAYOUT) as reader, pytest.raises(ValueError, match=words):
        reader.read(*request_)


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with open_checkpoint(tmp_path, 5, LAYOUT) as reader:
        os.truncate(tmp_path / "v000000005/shard-1-of-2.safetensors", 300)
        with pytest.raises(CheckpointError, match=r"shard-1-of-2\.safetensors ends at byte"):
            contents(reader)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"version": -1}, "version: expected 0 to"),
        ({"index": 1}, "got 1 of 1"),
        ({"count": 5000}, "at most 4096"),
        ({"begin": 3, "end": 2}, r"expected a range \[begin, end\)"),
        ({"end": 3}, r"'params': expected a NumPy array of shape \(3,\), got \(2,\)"),
        ({"arrays": {"params": [1.0, 2.0]}}, "'params': expected a NumPy array .* got list"),
        ({"arrays": {"params": np.zeros(4)[::2]}}, "'params': expected contiguous"),
        ({"arrays": {"params": np.zeros(2, ">f4")}}, "native byte order"),
        ({"arrays": {"params": np.zeros(2, int)}}, "params: expected float32 or float64, got 'int"),
        ({"arrays": {"../x": np.zeros(2)}}, "expected names of letters"),
        ({"arrays": {"__metadata__": np.zeros(2)}}, "expected names of letters"),
        ({"arrays": {}}, "expected 1 to 4096 arrays, got 0"),
    ],
)
def test_what_makes_no_shard(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    whole = {"version": 1, "index": 0, "count": 1, "begin": 0, "end": 2}
    whole |= {"arrays": {"params": np.zeros(2, np.float32)}, **arguments}
    with pytest.raises(ValueError, match=words):
        write_shard(tmp_path, **whole)
    assert names(tmp_path) == []


# ---- committed ---------------------------------------------------------------------------------


def test_nothing_is_there_before_the_commit(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", LAYOUT) is None
    assert newest(tmp_path, LAYOUT) is None
    save(tmp_path, 5)
    write_shards(tmp_path, 9)
    assert (versions(tmp_path), committed_versions(tmp_path)) == ([5, 9], [5])
    with open_newest(tmp_path) as reader:
        assert same_as(reader, 5)


def test_what_is_whole_may_be_committed_again(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    before = {path: path.stat().st_ino for path in (tmp_path / "v000000005").glob("*.json")}
    assert save(tmp_path, 5) == first
    assert {path: path.stat().st_ino for path in before} == before
    with open_newest(tmp_path) as reader:
        assert same_as(reader, 5)


@pytest.mark.parametrize("damaged", ["state.json", "manifest.json", "shard-1-of-2.safetensors"])
def test_what_is_damaged_is_repaired_by_the_next_commit(tmp_path: Path, damaged: str) -> None:
    save(tmp_path, 5)
    file = tmp_path / "v000000005" / damaged
    file.write_bytes(file.read_bytes()[:-3] + b"xxx")
    with pytest.raises(CheckpointError):
        newest(tmp_path, LAYOUT)
    save(tmp_path, 5)
    with open_newest(tmp_path) as reader:
        assert same_as(reader, 5)


def test_a_shard_of_another_content_withdraws_the_manifest_first(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 9)
    shards = write_shards(tmp_path, 9, seed=10)
    assert committed_versions(tmp_path) == [5]
    commit(tmp_path, 9, shards, {**STATE, "version": 10}, LAYOUT)
    with open_newest(tmp_path) as reader:
        assert reader.version == 9
        assert same_as(reader, 10)


def test_shards_of_another_count_leave_it_whole(tmp_path: Path) -> None:
    save(tmp_path, 5, 2)
    shards = write_shards(tmp_path, 5, 3)
    with open_newest(tmp_path) as reader:
        assert len(reader.manifest.shards) == 2
    commit(tmp_path, 5, shards, {**STATE, "version": 5}, LAYOUT)
    with open_newest(tmp_path) as reader:
        assert len(reader.manifest.shards) == 3
        assert same_as(reader, 5)
    prune(tmp_path, 1)
    assert len(names(tmp_path / "v000000005")) == 5


def test_what_does_not_make_up_a_checkpoint(tmp_path: Path) -> None:
    one, two = write_shards(tmp_path, 5)
    other = write_shard(tmp_path, 5, 1, 2, {"params": np.zeros(38, "f4")}, begin=16, end=54)
    wide = write_shard(tmp_path, 5, 0, 1, {"params": np.zeros(P)}, begin=0, end=P)
    short = write_shard(tmp_path, 5, 0, 1, {"params": np.zeros(P - 1, "f4")}, begin=0, end=P - 1)
    for shards, words in [
        ([], "shards: expected 1 to 4096, got 0"),
        ([one], "shards: 0: expected shard 0 of 1, got 'shard-0-of-2"),
        ([two, one], "shards: 0: expected shard 0 of 2"),
        ([one, other], "shards: 1: arrays: expected"),
        ([wide], "'params' of float32"),
        ([short], "ranges up to 54, the number of parameters, got 53"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            commit(tmp_path, 5, shards, STATE, LAYOUT)
    with pytest.raises(
        CheckpointError, match=r"v000000005: cannot be committed: shard-1-of-2.* has \d+ bytes, exp"
    ):
        commit(tmp_path, 5, [one, two], STATE, LAYOUT)  # the file of `two` was written over
    (tmp_path / "v000000005" / two.file).unlink()
    with pytest.raises(CheckpointError, match="not there; is the folder on a file system that all"):
        commit(tmp_path, 5, [one, two], STATE, LAYOUT)
    assert committed_versions(tmp_path) == []


@pytest.mark.parametrize("state", [{"x": float("nan")}, {"x": {1}}, {"x": b""}])
def test_a_state_that_is_no_json_is_our_callers_mistake(tmp_path: Path, state: Any) -> None:
    shards = write_shards(tmp_path, 5)
    with pytest.raises((TypeError, ValueError)):
        commit(tmp_path, 5, shards, state, LAYOUT)


def test_too_many_names_are_refused_when_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psframe.checkpoint.manifest.MANIFEST_BYTES_MAX", 900)
    with pytest.raises(CheckpointError, match="more than the 900 allowed"):
        save(tmp_path, 5)
    monkeypatch.setattr("psframe.checkpoint.writing.STATE_BYTES_MAX", 10)
    with pytest.raises(CheckpointError, match=r"state.json has \d+ bytes, more than 10"):
        save(tmp_path, 5)


def test_a_shard_travels_as_json(tmp_path: Path) -> None:
    for shard in write_shards(tmp_path, 5):
        assert Shard.parse(json.loads(json.dumps(shard.fields())), 5) == shard
        with pytest.raises(CheckpointError, match=f"shard: bytes: expected {shard.bytes}"):
            Shard.parse({**shard.fields(), "bytes": shard.bytes + 1}, 5)


NAMES = st.text(max_size=5) | st.sampled_from(["w", "b", 'quo"te', "\\", "\ud800", "Ω", "\0"])


@given(
    st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    st.sampled_from(["f4", "f8"]),
    st.integers(1, 4),
)
def test_any_layout_is_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Any], dtype: str, servers: int
) -> None:
    layout = Layout.of(
        {"first": np.ones(1, dtype)} | {n: np.ones(s, dtype) for n, s in shapes.items()}
    )
    params = np.arange(layout.size, dtype=dtype)
    folder = tmp_path_factory.mktemp("run")
    shards = [
        write_shard(folder, 1, i, servers, {"params": params[b:e]}, begin=b, end=e)
        for i, (b, e) in enumerate(layout.shards(servers))
    ]
    commit(folder, 1, shards, {}, layout)
    with newest(folder, layout) or pytest.fail("none") as reader:
        assert reader.manifest.layout == layout
        out = np.empty_like(params)
        reader.read("params", 0, layout.size, out)
        np.testing.assert_array_equal(out, params)


# ---- pruned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [4]),
        (2, None, [3, 4]),
        (9, None, [1, 2, 3, 4]),
        (1, 2, [2, 4]),
        (2, 4, [3, 4]),
        (1, 77, [4]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for version in (1, 2, 3, 4):
        save(tmp_path, version)
    with no_descriptor_left():
        assert prune(tmp_path, keep, best) == left
    assert versions(tmp_path) == committed_versions(tmp_path) == left


def test_what_is_half_written_goes_if_it_is_old(tmp_path: Path) -> None:
    write_shards(tmp_path, 1)
    save(tmp_path, 2)
    write_shards(tmp_path, 3)
    half = tmp_path / "v000000002" / temporary_name("shard-0-of-2.safetensors")
    half.write_bytes(b"half")
    assert prune(tmp_path, 3) == [2]
    assert versions(tmp_path) == [2, 3]  # 3 is being written
    assert not half.exists()


def test_a_damaged_checkpoint_costs_no_good_one_its_place(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        save(tmp_path, version)
    for version, name in ((2, "state.json"), (3, "manifest.json")):
        with (tmp_path / checkpoint_name(version) / name).open("ab") as stream:
            stream.write(b"x")
    assert prune(tmp_path, 1) == [1]
    assert versions(tmp_path) == [1, 2, 3]
    save(tmp_path, 4)
    assert prune(tmp_path, 2) == [1, 4]
    assert versions(tmp_path) == [1, 4]
    (tmp_path / "v000000001/manifest.json").unlink()
    (tmp_path / "v000000004/manifest.json").unlink()
    assert prune(tmp_path, 1) == []
    assert versions(tmp_path) == [1, 4]


def test_what_an_earlier_attempt_left_goes_with_the_first_commit_of_the_new(tmp_path: Path) -> None:
    for version in (1, 3, 8, 9):
        save(tmp_path, version)
    write_shards(tmp_path, 10)
    assert prune(tmp_path, 2, 8, current=3) == [1, 3]
    assert versions(tmp_path) == [1, 3, 10]


def test_only_our_files_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    elsewhere = tmp_path.parent / "elsewhere"
    save_to = elsewhere / "v000000000"
    save_to.mkdir(parents=True)
    (save_to / "manifest.json").write_text("precious")
    (tmp_path / "v000000000").symlink_to(save_to)
    strange = ["v1", "v0000000001", "v000000001x", "V000000001", "v00000000a", "final.safetensors"]
    for name in strange:
        (tmp_path / name).mkdir()
    mine = tmp_path / "v000000001/notes.txt"
    mine.write_text("mine")
    linked = tmp_path / "v000000001/shard-7-of-9.safetensors"
    linked.symlink_to(save_to / "manifest.json")
    assert prune(tmp_path, 1) == [2]
    assert names(tmp_path / "v000000001") == ["notes.txt", linked.name]
    assert (save_to / "manifest.json").read_text() == "precious"
    assert set(names(tmp_path)) == {*strange, "v000000000", "v000000001", "v000000002"}


def test_names_are_exact() -> None:
    assert [version_of(checkpoint_name(v)) for v in (0, 7, 10**9, 2**63 - 1)] == [
        0,
        7,
        10**9,
        2**63 - 1,
    ]
    for name in ("v0", "v0000000001", "v00000000١", "v000000001\n", f"v{2**63}", " v000000001"):
        assert version_of(name) is None


def test_keep_none_is_our_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        prune(tmp_path, 0)


def test_what_was_not_committed_may_be_abandoned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_shards(tmp_path, 2)
    assert [abandon(tmp_path, version) for version in (1, 2, 3)] == [False, True, False]
    assert versions(tmp_path) == [1]


def test_remove_all(tmp_path: Path) -> None:
    remove_all(tmp_path / "none")
    save(tmp_path, 1)
    write_shards(tmp_path, 2)
    (tmp_path / "mine").mkdir()
    remove_all(tmp_path)
    assert names(tmp_path) == ["mine"]


# ---- the run directory -------------------------------------------------------------------------


def test_a_run_directory_with_a_checkpoint_is_another_runs(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints", 5)
    with pytest.raises(RunDirError, match="holds another run's v000000005"):
        RunDir.create(tmp_path, config={})
    assert committed_versions(tmp_path / "checkpoints") == [5]


def test_overwriting_removes_checkpoints_and_no_other_folders(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save(folder, 5)
    write_shards(folder, 6)
    (folder / "v7").mkdir()
    (folder / "mine").mkdir()
    RunDir.create(tmp_path, overwrite=True, config={}).close()
    assert names(folder) == ["mine", "v7"]


# ---- what is said ------------------------------------------------------------------------------


def test_what_does_not_verify_is_named_and_the_next_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2, 3):
        save(tmp_path, version)
    file = tmp_path / "v000000003/shard-1-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    (tmp_path / "v000000002/state.json").unlink()
    with (
        caplog.at_level(logging.WARNING, "psframe"),
        no_descriptor_left(),
        open_newest(tmp_path) as reader,
    ):
        assert same_as(reader, 1)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        f"{tmp_path}/v000000003: is no checkpoint that can be used: shard-1-of-2.safetensors is "
        "damaged: its sha256 is not that of the manifest"
    )
    assert second.endswith("v000000002: is no checkpoint that can be used: state.json is missing")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"w1": np.zeros((4, 5))}, "expected float64, got 'float32'"),
        ({"w1": np.zeros((4, 5), "f4")}, "expected no more names, got 'w2'"),
        ({"w": np.zeros((4, 5), "f4")}, "expected 'w' in the place, got 'w1'"),
        (
            {"w1": np.zeros(20, "f4"), "w2": np.zeros((5, 6), "f4"), "b": np.zeros(4, "f4")},
            r"expected 'w1' of shape \(20,\), got \(4, 5\)",
        ),
    ],
)
def test_another_model(tmp_path: Path, params: dict[str, Any], words: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"of 1 checkpoints none can be used.*{words}"):
        newest(tmp_path, Layout.of(params))
