"""Settings: precedence is tested with the command; here what is refused, and what is derived."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import (
    BSP,
    SSP,
    Async,
    Buffered,
    DynamicSSP,
    Rennala,
    Ringleader,
    WarmStart,
    optim,
    stale,
    toml,
)
from psframe.choices import parse_stale
from psframe.errors import ArgumentError
from psframe.settings import Settings, from_file

PARAMS = {"w1": np.zeros((2, 3), np.float32), "b[1]": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"staleness": 2},
            "staleness goes with --mode ssp or dynamic-ssp only .the mode is",
        ),
        ({"staleness": 2, "mode": "bsp"}, "--staleness goes with --mode ssp"),
        ({"backup": 1, "mode": "ssp"}, "--backup goes with --mode bsp"),
        ({"pushes": 1}, "--pushes goes with --mode rennala or buffered only .the mode is async"),
        ({"staleness_max": 1, "mode": "ssp"}, "--staleness-max goes with --mode dynamic-ssp only"),
        (
            {"staleness": 5, "staleness_max": 4, "mode": "dynamic-ssp"},
            "--staleness-max: .* less than",
        ),
        ({"warm_start": 3, "mode": "bsp"}, "--warm-start goes with --mode async, ssp, dynamic-ssp"),
        ({"warm_start": -1}, "--warm-start: expected 0 or more"),
        ({"pushes": 0, "mode": "rennala"}, "--pushes: expected 1 or more, got 0"),
        ({"stale": "inverted"}, r"--stale: expected one of accept, .*; got 'inverted'"),
        ({"stale": "gapaware"}, r"; got 'gapaware'; did you mean 'gap-aware'\?"),
        ({"stale": "clip=1+invers"}, r"; got 'clip=1\+invers'; did you mean 'inverse'\?"),
        ({"stale": "dropp=9"}, r"; did you mean 'drop=9'\?"),
        ({"stale": "drop"}, "--stale: drop needs a number, such as drop=16; got 'drop'"),
        ({"stale": "drop=x"}, "--stale: drop needs a number, such as drop=16; got 'drop=x'"),
        ({"stale": "inverse=2"}, "--stale: inverse takes no number; got 'inverse=2'"),
        ({"stale": "drop=0.5"}, "--stale: Drop: threshold"),
        ({"stale": "clip=-1"}, "--stale: Clip: norm"),
        ({"codec": "gzip"}, "--codec: expected none or one of float16, .*; got 'gzip'"),
        ({"codec": "topk=2"}, "--codec: TopK: fraction is 2"),
        ({"codec": "top-k=0.02"}, r"; got 'top-k=0.02'; did you mean 'topk=0.02'\?"),
        ({"codec": "fp16"}, r"; got 'fp16'; did you mean 'float16'\?"),
        ({"codec": "topk"}, "--codec: topk needs a number, such as topk=0.01; got 'topk'"),
        ({"pull_codec": "qsgd=x"}, "--pull-codec: qsgd needs a number, such as qsgd=127"),
        ({"stale": "inverse+"}, "--stale: expected one of"),
        ({"momentum": 0.9, "optimizer": "adam"}, "--momentum goes with --optimizer sgd"),
        ({"nesterov": True, "optimizer": "sgd"}, "--nesterov goes with --momentum"),
        ({"resume": True, "overwrite": True, "run_dir": "x"}, "--resume and --overwrite"),
        ({"resume": True}, "--resume: which run"),
        ({"staleness": -1, "mode": "ssp"}, "--staleness: expected 0 or more, got -1"),
        ({"backup": -1, "mode": "bsp"}, "--backup: expected 0 or more"),
        ({"epochs": 0}, "--epochs: expected 1 or more, got 0"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more"),
        ({"servers": 0}, "--servers: expected 1 or more"),
        ({"servers": "per-rack"}, "--servers: expected a number of servers, per-node, or ranks"),
        ({"servers": "1,2"}, r"--servers: .* got \[1, 2\]; rank 0 is server 0"),
        ({"workers": 0}, "--workers: expected 1 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"warmup": -1}, "--warmup: expected 0 or more"),
        ({"lr": -0.1}, "--lr: expected 0 or more"),
        ({"lr": float("nan")}, "--lr: expected 0 or more, got nan"),
        ({"weight_decay": float("inf")}, "--weight-decay: expected 0 or more"),
        ({"momentum": 1.0}, r"--momentum: expected a number in \[0, 1\)"),
        ({"clip_norm": 0.0}, "--clip-norm: expected more than 0"),
        ({"timeout_s": 0.1}, r"--timeout-s: expected 0\.5 or more, got 0\.1"),
        ({"timeout_s": float("inf")}, "--timeout-s: expected"),
        ({"seed": 2**64}, "--seed: expected 4611686018427387904 or less, got 18446744073709551616"),
        ({"split_seed": 2**63}, "--split-seed: expected 4611686018427387904 or less"),
        ({"respawn": -1}, "--respawn: expected 0 or more, got -1"),
        ({"respawn": 1001}, "--respawn: expected 1000 or less, got 1001"),
        ({"respawn": 1, "servers": 2}, "--respawn goes with one server only, not 2"),
        ({"respawn": 1, "servers": "0,3"}, "--respawn goes with one server only, not 2"),
        ({"workers": 1001}, "--workers: expected 1000 or less, got 1001"),
        ({"epochs": 2**31}, "--epochs: expected 2147483647 or less"),
        ({"run_dir": ""}, "--run-dir: expected a name, got an empty one"),
        ({"data": ""}, "--data: expected a name"),
        ({"model": ""}, "--model: expected a name"),
        ({"config": ""}, "--config: expected a name"),
        ({"test_fraction": 1.0}, "--test-fraction: expected a number between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Settings(**changes).resolved()


def test_defaults_that_depend_on_others() -> None:
    assert Settings().resolved().lr == 0.01
    assert Settings(optimizer="sgd", momentum=0.9).resolved().lr == pytest.approx(0.01)
    assert Settings(optimizer="adamw").resolved().weight_decay == 0.01
    assert Settings().resolved().weight_decay == 0.0
    assert Settings(mode="ssp").resolved().staleness == 3
    assert Settings(mode="bsp").resolved().backup == 0
    assert Settings().resolved().staleness is None


def test_modes() -> None:
    assert isinstance(Settings().consistency(), Async)
    assert Settings(mode="ssp", staleness=5).consistency() == SSP(5)
    assert Settings(mode="bsp", backup=2).consistency() == BSP(2)
    assert Settings(mode="dynamic-ssp").consistency() == DynamicSSP(3, 12)
    assert Settings(mode="rennala", pushes=7).consistency() == Rennala(7)
    assert Settings(mode="buffered").consistency() == Buffered(4)
    assert Settings(mode="ringleader").consistency() == Ringleader()
    assert Settings(mode="ssp", warm_start=9).consistency() == WarmStart(9, SSP(3))


def test_rules_for_stale_gradients() -> None:
    assert parse_stale("accept") == stale.Accept()
    assert parse_stale("drop=16 + inverse") == stale.chain(stale.Drop(16), stale.Inverse())
    assert parse_stale("compensate=0.04") == stale.DelayCompensation(0.04)
    assert parse_stale("delay-adaptive=4") == stale.DelayAdaptive(4)
    assert parse_stale("gap-aware+clip=1.5") == stale.chain(stale.GapAware(), stale.Clip(1.5))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
def test_each_rule_decays_weights_and_not_biases(name: Any) -> None:
    rule = Settings(optimizer=name, lr=0.5, weight_decay=0.1).resolved().rule(PARAMS, 100, None)
    assert type(rule).__name__.lower() == name
    assert (rule.lr, rule.weight_decay, rule.no_decay) == (0.5, 0.1, ("b[[]1]",))


def test_momentum_reaches_the_rule() -> None:
    settings = Settings(optimizer="sgd", momentum=0.5, nesterov=True).resolved()
    rule = settings.rule(PARAMS, 100, None)
    assert (rule.momentum, rule.nesterov) == (0.5, True)


@pytest.mark.parametrize(
    ("mode", "workers", "updates"), [("async", None, 20), ("ssp", 3, 20), ("bsp", 3, 7)]
)
def test_cosine_ends_with_the_last_update(mode: Any, workers: int | None, updates: int) -> None:
    settings = Settings(mode=mode, schedule="cosine", epochs=2, batch_size=10, lr=1.0).resolved()
    assert settings.rule(PARAMS, 95, workers).lr == optim.schedules.Cosine(1.0, updates)


def test_warmup_comes_before() -> None:
    schedules = optim.schedules
    warm = Settings(warmup=5, lr=1.0).resolved().rule(PARAMS, 100, None).lr
    rise = schedules.LinearWarmup(1.0, 5)
    assert warm == schedules.Composed((rise, schedules.Constant(1.0)), (5,))
    both = Settings(warmup=5, schedule="cosine", epochs=2, batch_size=10, lr=1.0)
    lr = both.resolved().rule(PARAMS, 100, None).lr
    assert (lr(0), lr(5), lr(20)) == (0.0, 1.0, 0.0)


def test_cosine_in_rounds_needs_the_number_of_workers() -> None:
    settings = Settings(mode="bsp", schedule="cosine").resolved()
    with pytest.raises(ArgumentError, match="how many rounds; use --schedule constant"):
        settings.rule(PARAMS, 100, None)


@pytest.mark.parametrize(
    ("changes", "launched", "told"),
    [
        ({}, False, []),
        ({"mode": "bsp", "stale": "clip=1"}, True, []),
        ({"stale": "inverse"}, True, []),
        ({"mode": "bsp", "stale": "inverse"}, True, ["--stale: inverse will do nothing: with"]),
        ({"mode": "bsp", "stale": "clip=1 + drop=8"}, True, ["--stale: drop will do nothing"]),
        ({"respawn": 2}, True, []),
        ({"respawn": 2}, False, ["--respawn 2 is ignored: without a launcher"]),
    ],
)
def test_what_does_nothing_is_told(
    changes: dict[str, Any], launched: bool, told: list[str]
) -> None:
    lines = Settings(**changes).resolved().idle(launched=launched)
    assert [line[: len(words)] for line, words in zip(lines, told, strict=True)] == told


def test_the_stored_configuration_gives_the_same_settings(tmp_path: Path) -> None:
    settings = Settings(
        mode="ssp", lr=0.5, clip_norm=1.0, run_dir="a b", overwrite=True, config="x"
    ).resolved()
    path = tmp_path / "config.toml"
    path.write_text(toml.dumps(settings.as_config()))
    again = from_file(path).resolved()
    assert again == dataclasses.replace(settings, overwrite=False, config=None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'"),
        ("zzz = 3", "unknown key 'zzz'$"),
        ("resume = true", "unknown key 'resume'"),
        ("[train]\nepochs = 3", "unknown key 'train'"),
        ("epochs = 3.5", "epochs: expected int, got 3.5"),
        ("epochs = true", "epochs: expected int, got True"),
        ("lr = 'fast'", "lr: expected float, got 'fast'"),
        ("nesterov = 1", "nesterov: expected bool, got 1"),
        ("data = 1", "data: expected str, got 1"),
        ("mode = 'asnyc'", "mode: expected one of .*; did you mean 'async'"),
        ("epochs = [3]", "epochs: expected int"),
        ("= 3", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=rf"--config: .*c\.toml.*{words}"):
        from_file(path)


def test_a_file_may_write_keys_as_flags_and_floats_as_integers(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("batch-size = 8\nlr = 1\nclip_norm = 2.5\n")
    settings = from_file(path)
    assert (settings.batch_size, settings.lr, settings.clip_norm) == (8, 1.0, 2.5)
    assert isinstance(settings.lr, float)


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        ("servers = 2", 2),
        ('servers = "per-node"', "per-node"),
        ("servers = [0, 4, 8]", (0, 4, 8)),
        ('servers = "0,4"', (0, 4)),
    ],
)
def test_servers_may_be_a_number_a_word_or_ranks(tmp_path: Path, text: str, placement: Any) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    settings = from_file(path).resolved()
    assert settings.placement() == placement
    path.write_text(toml.dumps(settings.as_config()))
    assert from_file(path).resolved().placement() == placement


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"--config: none\.toml: cannot be read"):
        from_file("none.toml")
