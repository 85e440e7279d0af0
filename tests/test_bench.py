"""The benchmark's arithmetic and its checks; what needs ranks is in tests/mpi/test_bench.py."""

import json

import numpy as np
import pytest

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
    payload,
)
from psframe.benchmarks.push_pull import PushPull, operations
from psframe.benchmarks.report import Spread, format_rows, parse_count, size_text

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
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psframe.benchmarks.push_pull.find_launcher", lambda: None)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (PushPull(bytes=("1KiB", "2x")), "--bytes: '2x'"),
        (PushPull(bytes=("100",)), "--bytes 100: expected a multiple of 64"),
        (PushPull(bytes=("1KiB",), servers=3), "expected a multiple of 192"),
        (PushPull(rounds=0), "--rounds and --seconds"),
        (PushPull(seconds=0.0), "--rounds and --seconds"),
    ],
)
def test_sizes_that_cannot_be_checked_exactly(settings: PushPull, says: str) -> None:
    with pytest.raises(psframe.ArgumentError, match=says):
        settings._sizes()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out
