"""The benchmark's arithmetic and its checks; what needs ranks is in tests/mpi/test_bench.py."""

import importlib.util
import json
import mmap
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tyro

import psframe
from psframe import optim
from psframe.bench import BENCHMARKS, main
from psframe.benchmarks.apply import RULES
from psframe.benchmarks.checks import (
    PAIRS_A_PAGE,
    PAIRS_ALL,
    SUM_MAX,
    code,
    codes_sum,
    compile_check,
    compile_fill,
    payload,
)
from psframe.benchmarks.idle import processor_seconds
from psframe.benchmarks.job import WrongAnswer
from psframe.benchmarks.latency import PERCENTILES, percentiles
from psframe.benchmarks.loops import LOOPS
from psframe.benchmarks.memory import expected, pss
from psframe.benchmarks.push_pull import PushPull
from psframe.benchmarks.regime import round_trip_ns
from psframe.benchmarks.report import Spread, format_rows, parse_count, size_text
from psframe.benchmarks.scaling import combinations
from psframe.benchmarks.tensors import Tensors
from psframe.benchmarks.ways import operations

# ---- sizes, spreads, rows ----


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("1024", 1024),
        ("64KiB", 65536),
        ("16MiB", 2**24),
        ("1 GiB", 2**30),
        ("2kB", 2000),
        ("3KB", 3000),
        ("5Mi", 5 * 2**20),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_count(text, "B") == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5MiB", "MiB", "1TiB", "1 Mi B", "x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a count such as"):
        parse_count(text, "B")


def test_sizes_are_written_as_they_were_read() -> None:
    for n_bytes in (1, 1000, 1024, 65536, 2**20, 2**24, 3 * 2**30):
        assert parse_count(size_text(n_bytes), "B") == n_bytes


def test_a_spread_is_the_median_and_the_extremes() -> None:
    assert Spread([3.0, 1.0, 100.0]).fields("x") == {"x": 3.0, "x_range": [1.0, 100.0]}
    assert Spread([123456.0]).median == 123500.0


def test_rows_as_json_and_as_a_table() -> None:
    rows = [
        {"what": "psframe", "bytes": 1024, "ratio": 0.5, "range": [0.4, 0.6], "more": 1},
        {"what": "echo", "bytes": 1024},
    ]
    assert [json.loads(line) for line in format_rows(rows, {}, True).splitlines()] == rows
    table = format_rows(rows, {"bytes": "", "what": "", "ratio": ".2f", "range": ".1f"}, False)
    assert [line.split() for line in table.splitlines()] == [
        ["bytes", "what", "ratio", "range"],
        ["1", "KiB", "psframe", "0.50", "0.4", "to", "0.6"],
        ["1", "KiB", "echo"],
    ]


# ---- what is checked ----


def steps_of(workers: int, steps: int, size: int = 4096) -> np.ndarray:
    """The parameters after `steps` steps of every worker, by adding them up one by one."""
    params = np.zeros(size, np.float32)
    for step in range(steps):
        for worker in range(workers):
            params -= payload(size, worker, step & 1)
    return params


def test_the_oracle_of_the_parameters_is_their_sum() -> None:
    params = steps_of(workers=3, steps=6)
    assert compile_check()(params, -18, PAIRS_ALL) == -codes_sum(3, 6)


def test_codes_tell_workers_and_slots_apart() -> None:
    assert len({code(worker, parity) for worker in range(4) for parity in (0, 1)}) == 8
    assert all(1 <= code(worker, 1) <= 8 for worker in range(100))


@pytest.mark.parametrize("stride", [PAIRS_ALL, PAIRS_A_PAGE])
def test_a_wrong_buffer_is_noticed(stride: int) -> None:
    check = compile_check()
    right, older = steps_of(2, 4), steps_of(2, 2)
    version = -8
    assert check(right, version, stride) == right[1]
    assert np.isnan(check(older, version, stride))  # another version
    half = len(right) // 2
    for torn in ((right[:half], older[half:]), (older[:half], right[half:])):
        assert np.isnan(check(np.concatenate(torn), version, stride))
    one_page = right.copy()
    one_page[1024:2048] = older[1024:2048]
    assert np.isnan(check(one_page, version, stride))
    no_tail = right.copy()
    no_tail[-1] = 0
    assert np.isnan(check(no_tail, version, stride))
    other_slot = right + payload(4096, 0, 0) - payload(4096, 0, 1)
    assert check(other_slot, version, stride) != -codes_sum(2, 4)


def test_every_single_element_counts_in_the_whole_check() -> None:
    check, right = compile_check(), steps_of(1, 2, size=64)
    for i in range(64):
        wrong = right.copy()
        wrong[i] += 1
        assert check(wrong, -2, PAIRS_ALL) != -codes_sum(1, 2)


@pytest.mark.parametrize("workers", [1, 2, 3, 31, 1000])
@pytest.mark.parametrize("rate", [1e-3, 17.0, 1e6, 1e12])
@pytest.mark.parametrize("seconds", [1e-9, 0.2, 1e6])
def test_measurements_are_even_and_sums_stay_exact(
    workers: int, rate: float, seconds: float
) -> None:
    warm_up, measured = operations(rate, workers, seconds)
    assert warm_up % 2 == measured % 2 == 0
    assert warm_up >= workers + 3
    assert measured >= 4
    assert codes_sum(workers, warm_up + measured) <= SUM_MAX


def test_a_measurement_takes_as_long_as_it_was_told() -> None:
    assert operations(100_000.0, 4, 0.2)[1] == 5000


def test_a_server_that_mixes_up_slots_fails_the_final_sum() -> None:
    """The check of a run's end, on a run in threads that pushes one code too many."""

    def work(worker: psframe.Worker) -> None:
        for parity in (0, 1, 0, 0):  # the last should have been 1
            worker.push_pull({"w": payload(64, worker.index, parity)})

    result = psframe.run(work, {"w": np.zeros(64, "f4")}, optimizer=optim.SGD(lr=1.0))
    assert result.params is not None
    got = compile_check()(result.params["w"], -result.version, PAIRS_ALL)
    assert not np.isnan(got)  # whole, and of one version
    assert got != -codes_sum(1, 4)


# ---- tensors ----


@pytest.mark.parametrize(("servers", "tensors"), [(1, 1), (1, 40), (2, 1), (2, 6), (3, 3)])
@pytest.mark.parametrize("apart", [PAIRS_ALL, PAIRS_A_PAGE])
def test_tensors_fill_the_shards_and_lie_in_one_each(
    servers: int, tensors: int, apart: int
) -> None:
    cut = Tensors(96 * servers, servers, tensors, apart=apart)
    assert len(cut.sizes) == max(tensors, servers)
    assert sum(cut.sizes.values()) == 96 * servers
    assert all(size > 0 and size % 2 == 0 for size in cut.sizes.values())
    layout = psframe.layout.Layout.of(cut.zeros())
    for begin, end in layout.shards(servers):
        assert {begin, end} <= {*layout.offsets, layout.size}
    even, odd = cut.gradients(0)
    params = {name: -even[name] - odd[name] for name in cut.sizes}
    for number in range(2 * len(params)):
        cut.look(params, [2] * servers, number)
    cut.read(params, [2] * servers)
    cut.check_end(params, 2, workers=1, steps=2)


def looks_right(cut: Tensors, params: dict[str, np.ndarray], number: int) -> bool:
    try:
        cut.look(params, [1], number)
    except WrongAnswer:
        return False
    return True


@pytest.mark.parametrize("apart", [PAIRS_ALL, PAIRS_A_PAGE])
def test_a_wrong_tensor_is_noticed_in_its_turn(apart: int) -> None:
    cut = Tensors(960, 1, 10, apart=apart)
    params = {name: -grad for name, grad in cut.gradients(0)[0].items()}
    for name in params:
        wrong = {**params, name: 2 * params[name]}
        with pytest.raises(WrongAnswer, match=f"{name} is not of version 1"):
            cut.read(wrong, [1])
        noticed = [not looks_right(cut, wrong, number) for number in range(len(params))]
        assert any(noticed)
        with pytest.raises(WrongAnswer, match=name):
            cut.check_sum(wrong, 1, 1, code(0, 0))
    with pytest.raises(WrongAnswer, match="2 updates, expected 1"):
        cut.check_sum(params, 2, 1, code(0, 0))


def test_a_gradient_written_in_place_is_the_payload() -> None:
    array = np.empty(64, np.float32)
    compile_fill()(array, code(3, 1))
    assert np.array_equal(array, payload(64, 3, 1))


# ---- what the other benchmarks reckon with ----


@pytest.mark.parametrize("name", LOOPS)
def test_loops_compute_on_what_they_say(name: str) -> None:
    """In each, every gradient is applied, and the version that it was computed on is true."""
    steps = 12

    def work(worker: psframe.Worker) -> None:
        own = {"w": np.empty(64, np.float32)}
        fill = compile_fill()

        def produce(arrays: dict[str, np.ndarray]) -> None:
            fill(arrays["w"], 3.0)

        loop = LOOPS[name](worker, own, produce)
        versions = [0]
        for step in range(steps):
            params, version, pushed = next(loop)
            assert version == versions[-1]
            versions.append(params.version)
            assert compile_check()(params["w"], -params.version, PAIRS_ALL) == -3.0 * params.version
            receipt = pushed.wait() if hasattr(pushed, "wait") else pushed
            assert receipt.applied
            stale = receipt.version - 1 - version
            ahead = name not in ("push_pull", "in-slot") and step > 0
            assert stale == ahead

    result = psframe.run(work, {"w": np.zeros(64, "f4")}, optimizer=optim.SGD(lr=1.0))
    assert result.version == steps


@pytest.mark.parametrize("rule", RULES)
def test_the_oracle_of_any_rule_is_a_run_of_one_worker(rule: str) -> None:
    pairs = expected(RULES[rule], 5)
    assert len(pairs) == 6
    grad = np.empty(64, np.float32)
    compile_fill()(grad, 2.0)

    def work(worker: psframe.Worker) -> None:
        for version in range(1, 6):
            params = worker.push_pull({"w": grad})
            assert compile_check()(params["w"], pairs[version][0], PAIRS_ALL) == pairs[version][1]

    psframe.run(work, {"w": np.zeros(64, "f4")}, optimizer=RULES[rule])


def test_combinations_of_workers_and_servers() -> None:
    assert combinations(2, (), ()) == [(1, 1)]
    assert combinations(4, (), ()) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert combinations(9, (8, 3), (1,)) == [(1, 1), (1, 8), (1, 3)]
    assert (8, 8) in combinations(16, (), ())
    for size in (2, 3, 5, 8, 33):
        found = combinations(size, (), ())
        assert found[0] == (1, 1)
        assert len(set(found)) == len(found)
        assert all(s + w <= size for s, w in found)
        assert (1, size - 1) in found
    with pytest.raises(psframe.ArgumentError, match="--servers 4: expected 1 to 3"):
        combinations(4, (), (4,))


def test_percentiles_are_times_that_were_seen() -> None:
    seconds = [i / 1e6 for i in range(1, 1001)]
    found = dict(zip(PERCENTILES, percentiles(seconds), strict=True))
    assert found["max_us"] == pytest.approx(1000)
    assert found["p50_us"] == pytest.approx(501)
    assert found["p99_9_us"] == pytest.approx(1000)
    assert percentiles([2e-6]) == pytest.approx([2.0] * 5)


def test_the_memory_of_a_process_grows_by_what_it_touches() -> None:
    me = [os.getpid()]
    before = pss(me)
    with mmap.mmap(-1, 4 << 20) as memory:  # which nobody has had before
        memory.write(b"\1" * len(memory))
        assert pss(me) - before >= 3 << 20
    with pytest.raises(FileNotFoundError):
        pss([2**22 + 1])


def test_the_processor_time_of_a_process_is_its_own() -> None:
    before = time.process_time()
    seen = processor_seconds(os.getpid())
    assert before <= seen <= time.process_time()


def test_a_round_trip_between_cores_has_a_length() -> None:
    for _ in range(2):
        trip = round_trip_ns()
        assert trip is None or trip > 0


def test_one_core_has_no_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert round_trip_ns() is None


# ---- the tables ----


def load_remake() -> types.ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/remake.py"
    spec = importlib.util.spec_from_file_location("remake", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_tables_are_replaced_and_notes_are_kept() -> None:
    remake = load_remake()
    first = remake.Table("openmpi x 2", "x, 1 worker", 2, ("x",))
    other = remake.Table("openmpi x 20", "x, 19 workers", 20, ("x",))
    text = remake.put("# Results\n\nBefore.\n", first, "one")
    text = remake.put(text, other, "many")
    text = text.replace("### x, 19 workers", "A note, by hand.\n\n### x, 19 workers")
    text = remake.put(text, first, r"two \1")
    assert r"two \1" in text
    assert "one" not in text
    assert text.index("Before.") < text.index("two") < text.index("A note") < text.index("many")
    assert text.count("<!-- bench:") == text.count(remake.END) == 2
    assert remake.put(text, first, r"two \1") == text


def test_everything_is_remade_and_every_command_is_one(tmp_path: Path) -> None:
    remake = load_remake()
    settings = remake.read_settings(["--ranks", "2", "3", "--rounds", "1", "--seconds", "0.1"])
    tables = list(remake.tables(settings))
    assert len({table.name for table in tables}) == len(tables)
    assert {table.arguments[0] for table in tables} == set(BENCHMARKS) == set(remake.BENCHMARKS)
    for table in tables:
        parse(table.arguments)


def test_remake_writes_the_machine_and_a_table(tmp_path: Path) -> None:
    remake = load_remake()
    out = tmp_path / "R.md"
    out.write_text("# Mine\n", encoding="utf-8")
    venv = str(Path(sys.prefix))
    arguments = ["--only", "apply", "--rounds", "1", "--out", str(out), "--venv", venv]
    remake.tables = lambda settings: [
        remake.Table("openmpi apply", "apply", 0, ("apply", "--params", "1000", "--rounds", "1"))
    ]
    assert remake.main(arguments) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n")
    assert "$ python -m psframe.bench apply --params 1000 --rounds 1" in text
    assert "numpy" in text
    assert "adamw" in text


def parse(arguments: tuple[str, ...]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        BENCHMARKS, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,)
    )


# ---- the commands ----


def test_apply_prints_one_object_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "--json", "--params", "1000", "--rounds", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["optimizer"] for row in rows] == list(RULES)
    for row in rows:
        assert (row["what"], row["params"]) == ("apply", 1000)
        assert row["seconds"] > 0
        assert row["ratio"] > 0
        least, most = row["ratio_range"]
        assert least <= row["ratio"] <= most


def test_apply_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["apply", "--params", "1Ki", "--rounds", "1", "--optimizers", "sgd", "adam"]
    assert main([*arguments, "--dtype", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["optimizer", "sgd", "adam"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["apply", "--optimizers", "lion"], "--optimizers among sgd"),
        (["apply", "--params", "many"], "--params: 'many'"),
        (["apply", "--rounds", "0"], "--rounds of 1 or more"),
        (["push-pull"], "mpirun -n 2 python -m psframe.bench push-pull"),
        (["overlap"], "mpirun -n 2 python -m psframe.bench overlap"),
        (["overlap", "--loops", "perpetual"], "--loops among push_pull"),
        (["scaling", "--rounds", "0"], "--rounds and --seconds"),
        (["latency", "--seconds", "0"], "--rounds and --seconds"),
        (["memory", "--optimizers", "lion"], "--optimizers among sgd"),
        (["idle", "--silence", "0.1"], "--silence above 0.1"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psframe.benchmarks.job.find_launcher", lambda: None)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (PushPull(bytes=("1KiB", "2x")), "--bytes: '2x'"),
        (PushPull(bytes=("100",)), "--bytes 100: expected a multiple of 64"),
        (PushPull(bytes=("1KiB",), servers=3), "expected a multiple of 192"),
        (PushPull(bytes=("1KiB",), servers=2, tensors=5), "--tensors 5: expected a multiple of 2"),
        (PushPull(bytes=("1KiB",), tensors=129), "--tensors 129: expected 1 to 128"),
        (PushPull(bytes=("1KiB",), tensors=0), "--tensors 0: expected 1 to 128"),
        (PushPull(rounds=0), "--rounds and --seconds"),
        (PushPull(seconds=0.0), "--rounds and --seconds"),
    ],
)
def test_sizes_that_cannot_be_checked_exactly(settings: PushPull, says: str) -> None:
    with pytest.raises(psframe.ArgumentError, match=says):
        settings.sizes()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out
