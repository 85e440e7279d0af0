"""The command, in this process: precedence, what is written and printed, and every way to fail."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import resuming, toml, train
from psframe.launcher import Launcher
from psframe.settings import Settings
from psframe.train import main, parse


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, as a process that no launcher started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "find_launcher", lambda: None)
    # Other ranks' logger is turned down; monkeypatch puts it back.
    logger = logging.getLogger("psframe")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(logger, "_cache", {})


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `run` find none either, where the tests themselves run under one."""
    import psframe.runtime

    monkeypatch.setattr(psframe.runtime, "find_launcher", lambda: None)


def small(tmp_path: Path) -> list[str]:
    """Write a small problem; return the flags that train on it in no time."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.standard_normal((90, 4)) + 4 * np.eye(3, 4)[y]
    np.savez(tmp_path / "small.npz", x=x, y=y)
    return ["--data", "small.npz", "--model", "softmax", "--lr", "0.1", "--epochs", "3"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    """Run the command, check that it fails with one plain message, and return that."""
    assert main(argv) == status
    err = capsys.readouterr().err
    assert err.startswith("psframe: error: ")
    assert err.count("psframe: error: ") == 1
    assert "Traceback" not in err
    return err


def test_a_run_leaves_everything_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    assert main([*small(tmp_path), "--run-dir", "r", "--clip-norm", "5"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert re.match(r"3 epochs in \d", lines[0])
    for word in ("updates 9 ", "loss ", "test accuracy ", "samples/s", "staleness "):
        assert word in lines[0]
    assert lines[1] == "softmax, small.npz, async, adagrad, cpu"
    assert re.search(r"^pushes +9 received = 9 applied$", out, re.M)
    assert re.search(r"^updates +9  samples ", out, re.M)
    assert re.search(r"^next +.*psframe[. ]report r$", out, re.M)
    config = toml.load("r/config.toml")
    assert (config["data"], config["clip_norm"], config["epochs"]) == ("small.npz", 5.0, 3)
    assert not {"resume", "overwrite", "config"} & set(config)
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["updates"]) == ("completed", 9)
    assert re.search(rf"^test accuracy +{status['test_accuracy']:.2%} ", out, re.M)
    weights = load_file("r/checkpoints/final.safetensors")
    assert {name: w.shape for name, w in weights.items()} == {
        "w1": (4, 3),
        "b1": (3,),
        "preprocessing.mean": (4,),
        "preprocessing.deviation": (4,),
    }
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["accuracy"] == status["test_accuracy"]
    assert sum(worker["pushes"] for worker in summary["workers"]) == 9
    assert sum(map(sum, summary["confusion"])) > 0
    assert json.loads(Path("r/timeline.jsonl").read_text().splitlines()[-1])["update"] == 9
    assert len(Path("r/metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_goes_on_with_its_own_data_and_amount_of_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*small(tmp_path), "--run-dir", "r"]
    assert main(flags) == 0
    file = Path("r/status.json")
    status = json.loads(file.read_text())
    capsys.readouterr()
    for more, text in (
        (["--epochs", "5"], "--epochs: the run to go on with has 3, not 5; --config r/config.toml"),
        (["--data", "digits"], "--data: the run to go on with has 'small.npz', not 'digits'"),
        (["--split-seed", "2"], "--split-seed: the run to go on with has 1, not 2"),
        (["--seed", "7"], "--seed: the run to go on with has 0, not 7"),
        (["--model", "mlp"], "--model: the run to go on with has 'softmax', not 'mlp'"),
        (["--optimizer", "sgd"], "--optimizer: the run to go on with has 'adagrad', not 'sgd'"),
    ):
        file.write_text(json.dumps({**status, "state": "interrupted"}))
        assert text in fails([*flags, *more, "--resume"], capsys)
        assert json.loads(file.read_text())["state"] == "interrupted"
    err = fails(["--config", "r/config.toml", "--resume", "--epochs", "5"], capsys)
    assert "has 3, not 5; the number of epochs cannot change when a run goes on" in err
    assert err.count("--config") == 0
    assert main(["--config", "r/config.toml", "--resume", "--lr", "0.05"]) == 0
    assert "--lr: was 0.1, and is 0.05 from here on" in caplog.text
    assert json.loads(file.read_text()) == status


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--mode", "ssp"], "--mode: was 'async', and is 'ssp' from here on"),
        (["--stale", "inverse"], "--stale: was 'accept', and is 'inverse' from here on"),
        (["--codec", "float16"], "--codec: was 'none', and is 'float16' from here on"),
        (["--pull-codec", "sign"], "--pull-codec: was 'none', and is 'sign' from here on"),
        (["--clip-norm", "2"], "--clip-norm: was 5.0, and is 2.0 from here on"),
        (["--schedule", "cosine"], "--schedule: was 'constant', and is 'cosine' from here on"),
    ],
    ids=lambda one: one[0] if isinstance(one, list) else "",
)
def test_what_changes_when_a_run_goes_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: list[str], text: str
) -> None:
    flags = [*small(tmp_path), "--run-dir", "r", "--clip-norm", "5"]
    assert main(flags) == 0
    status = json.loads(Path("r/status.json").read_text())
    Path("r/status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    assert main([*flags, *more, "--resume"]) == 0
    assert text in caplog.text


def test_of_every_setting_it_is_known_what_it_means_to_change_it_on_going_on() -> None:
    free = "servers workers device server_device gpu_direct no_prefetch timeout_s respawn run_dir"
    free += " show tensorboard trace checkpoint_every keep_checkpoints resume overwrite config"
    known = [*resuming._FIXED, *resuming._TOLD, *free.split()]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(Settings))


def test_the_digits_reach_the_promised_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run-dir", "r"]) == 0
    status = json.loads(Path("r/status.json").read_text())
    assert status["test_accuracy"] >= 0.975
    assert capsys.readouterr().out.splitlines()[-1].startswith("next  ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode", "ssp", "--staleness", "1"],
        ["--mode", "bsp", "--backup", "1"],
        ["--optimizer", "sgd", "--momentum", "0.5", "--nesterov", "--weight-decay", "0.01"],
        ["--optimizer", "adamw", "--schedule", "cosine", "--warmup", "2"],
        ["--servers", "2", "--workers", "2", "--device", "cpu"],
        ["--servers", "per-node", "--trace"],
        ["--batch-size", "1000"],
    ],
    ids=lambda flags: flags[0] + flags[1],
)
def test_flags_reach_the_run(tmp_path: Path, flags: list[str]) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", *flags]) == 0


@pytest.mark.parametrize(
    ("servers", "words", "status"),
    [
        ("0,2", r"servers: \[0, 2\] are ranks of an MPI job, and this is one process", 1),
        ("2,0", "--servers: .* rank 0 is server 0", 2),
        ("two", "--servers: expected a number of servers, per-node, or ranks such as 0,4,8", 2),
    ],
)
def test_servers_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], servers: str, words: str, status: int
) -> None:
    assert re.search(words, fails([*small(tmp_path), "--servers", servers], capsys, status))


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("epochs = 7\nmode = 'ssp'\nstaleness = 2\n")
    for config in (["--config", "c.toml"], ["--config=c.toml"]):
        settings = parse([*config, "--epochs", "5"])
        assert (settings.epochs, settings.mode, settings.staleness) == (5, "ssp", 2)
        assert settings.batch_size == 32


def test_a_flag_that_changes_the_mode_or_optimizer_drops_what_went_with_the_old_one(
    tmp_path: Path,
) -> None:
    ssp = ["--mode", "ssp", "--staleness", "2", "--optimizer", "sgd", "--momentum", "0.5"]
    assert main([*small(tmp_path), "--run-dir", "a", *ssp, "--weight-decay", "0.1"]) == 0
    file = ["--config", "a/config.toml"]
    same = parse([*file, "--epochs", "5"])
    assert (same.mode, same.staleness, same.lr, same.momentum) == ("ssp", 2, 0.1, 0.5)
    settings = parse([*file, "--mode", "bsp"])
    assert (settings.mode, settings.staleness, settings.backup) == ("bsp", None, 0)
    assert (settings.optimizer, settings.lr, settings.weight_decay) == ("sgd", 0.1, 0.1)
    settings = parse([*file, "--optimizer=adamw"])
    assert (settings.lr, settings.weight_decay, settings.momentum) == (0.001, 0.01, 0.0)
    assert (settings.mode, settings.staleness) == ("ssp", 2)
    settings = parse([*file, "--optimizer", "adamw", "--weight-decay=0.1", "--mode", "async"])
    assert (settings.weight_decay, settings.staleness) == (0.1, None)
    assert main([*file, "--mode", "bsp", "--run-dir", "b"]) == 0


def test_a_usual_rate_follows_the_momentum_and_a_chosen_one_stays(tmp_path: Path) -> None:
    sgd = [*small(tmp_path), "--optimizer", "sgd", "--epochs", "1"]
    for folder, flags in (("a", ["--lr", "0.2"]), ("b", [])):
        rest = sgd if flags else [flag for flag in sgd if flag not in ("--lr", "0.1")]
        assert main([*rest, "--run-dir", folder, *flags]) == 0
    assert parse(["--config", "a/config.toml", "--momentum", "0.9"]).lr == 0.2
    assert parse(["--config", "b/config.toml", "--momentum", "0.9"]).lr == pytest.approx(0.01)


def test_a_runs_configuration_starts_the_same_run_again(tmp_path: Path) -> None:
    assert main([*small(tmp_path), "--run-dir", "a"]) == 0
    assert main(["--config", "a/config.toml", "--run-dir", "b"]) == 0
    first, second = toml.load("a/config.toml"), toml.load("b/config.toml")
    assert first.pop("run_dir") == "a"
    assert second.pop("run_dir") == "b"
    assert first == second


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--staleness", "2"], "--staleness goes with --mode ssp or"),
        (["--mode", "ssp", "--backup", "1"], "--backup goes with --mode bsp"),
        (["--epochs", "0"], "--epochs: expected 1 or more"),
        (["--config", "none.toml"], "none.toml: cannot be read"),
        (["--resume"], "give its folder with --run-dir"),
        (["--config="], "--config: expected a name, got an empty one"),
        (["--config", ""], "--config: expected a name, got an empty one"),
        (["--run-dir", ""], "--run-dir: expected a name"),
        (["--workers", "100000000"], "--workers: expected 1000 or less"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in fails(flags, capsys, status=2)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("epochs = 0", [], "--config: c.toml: epochs: expected 1 or more, got 0"),
        (
            "staleness = 2",
            [],
            "--config: c.toml: staleness goes with --mode ssp or",
        ),
        ("seed = 18446744073709551616", [], "--config: c.toml: seed: expected 4611686018427387904"),
        ("epochs = 3", ["--batch-size", "0"], "psframe: error: --batch-size: expected 1 or more"),
        ("epochs = 0", ["--epochs", "-1"], "psframe: error: --epochs: expected 1 or more, got -1"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_of_the_file(
    tmp_path: Path, text: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(text + "\n")
    assert words in fails(["--config", "c.toml", *flags], capsys, status=2)


def test_an_unknown_key_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("epoch = 3\n")
    assert "did you mean 'epochs'" in fails(["--config", "c.toml"], capsys, status=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--config"], "--config"),
    ],
)
def test_wrong_flags_end_with_2_and_name_the_right_ones(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--mode", "asnyc"], ["--mode=asnyc"]])
def test_a_wrong_word_suggests_the_right_one(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(flags, capsys, status=2)
    assert "--mode: expected one of async, ssp, bsp, " in said
    assert "; got 'asnyc'; did you mean 'async'?" in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in ("--mode ssp --staleness 3", "--mode bsp", "--model my.module:Class"):
        assert word in out
    assert "resume" in out


def test_the_examples_in_the_help_are_right() -> None:
    examples = [
        line.split("psframe.train")[1]
        for line in train._DESCRIPTION.splitlines()
        if "-m psframe.train" in line
    ]
    assert len(examples) == 4
    for example in examples:
        parse(example.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "none.npz"], "data 'none.npz': no such file"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--model", "mpl"], "did you mean 'mlp'"),
        (["--model", "nowhere:Model"], "importing nowhere raised ModuleNotFoundError"),
        (["--run-dir", "file"], "a file is in the way"),
        (
            ["--validation-fraction", "0.7999"],
            "with a validation fraction of 0.7999 nothing is left of 1797 samples to train on",
        ),
        (["--mode", "bsp", "--backup", "3"], "--backup: 3 of 3 workers cannot all be backups"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    err = fails(["--run-dir", "r", *flags], capsys)
    assert words in err
    assert err.count("\n") == 1


def test_another_runs_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*small(tmp_path), "--run-dir", "r"]
    assert main(flags) == 0
    capsys.readouterr()
    assert "holds another run's config.toml" in fails(flags, capsys)
    assert main([*flags, "--overwrite"]) == 0


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*small(tmp_path), "--run-dir", "r", "--resume"]
    assert main(flags) == 0  # there is none yet: it starts
    before = sorted((p.name, p.stat().st_mtime_ns) for p in Path("r").rglob("*"))
    capsys.readouterr()
    assert main(flags) == 0
    assert capsys.readouterr().out.startswith("r: already completed, test accuracy ")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in Path("r").rglob("*")) == before
    status = {"state": "interrupted", "updates": 5, "test_accuracy": None, "reason": ""}
    Path("r/status.json").write_text(json.dumps(status))
    assert main([*flags, "--checkpoint-every", "4"]) == 0  # from the end of the run before
    found = json.loads(Path("r/status.json").read_text())
    assert (found["state"], found["updates"]) == ("completed", 9)
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert sorted(line["epoch"] for line in lines) == [0, 1, 2]


@pytest.mark.parametrize("value", ["0", "-1", "soon", "5 days", "0s", "1e3", ""])
def test_a_cadence_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    err = fails([*small(tmp_path), "--checkpoint-every", value], capsys, status=2)
    assert "--checkpoint-every: expected" in err


def test_without_checkpoints(tmp_path: Path) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", "--checkpoint-every", "never"]) == 0
    assert [file.name for file in Path("r/checkpoints").iterdir()] == ["final.safetensors"]


USER_MODEL = """
    import sys
    from psframe.models import MLP

    class Good(MLP):
        pass

    class Lacking:
        def __init__(self, input_shape, n_classes): ...
        def init(self, rng): ...

    class Broken(MLP):
        def loss_and_gradients(self, params, x, y, out=None):
            raise ZeroDivisionError("mine")

    class BrokenInit(MLP):
        def init(self, rng):
            raise ZeroDivisionError("mine")

    class Interrupted(MLP):
        def evaluate(self, params, x, y):
            raise KeyboardInterrupt

    class Exits(MLP):
        def loss_and_gradients(self, params, x, y, out=None):
            sys.exit(0)

    class ExitsAtOnce(MLP):
        def __init__(self, input_shape, n_classes):
            sys.exit(0)

    class ExitsAtInit(MLP):
        def init(self, rng):
            sys.exit(0)

    class GivesUp(MLP):
        def loss_and_gradients(self, params, x, y, out=None):
            raise GeneratorExit

    class NoWords(Exception):
        def __str__(self):
            raise RuntimeError("none")

    class Wordless(MLP):
        def loss_and_gradients(self, params, x, y, out=None):
            raise NoWords

    class Talkative(MLP):
        def loss_and_gradients(self, params, x, y, out=None):
            raise ValueError("x" * 3_000_000)

    class WordlessAtTheEnd(MLP):
        def probabilities(self, params, x):
            raise NoWords

    class ExitsAtTheEnd(MLP):
        def probabilities(self, params, x):
            sys.exit(0)

    class BrokenAtTheEnd(MLP):
        def probabilities(self, params, x):
            raise ZeroDivisionError("mine")
"""


@pytest.fixture
def user_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's module into the current folder; return its name."""
    (tmp_path / "user_model_of_train.py").write_text(textwrap.dedent(USER_MODEL))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "user_model_of_train", raising=False)
    return "user_model_of_train"


def test_a_model_of_ones_own(tmp_path: Path, user_model: str) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", "--model", f"{user_model}:Good"]) == 0
    assert toml.load("r/config.toml")["model"] == f"{user_model}:Good"


def test_a_model_that_lacks_methods(
    tmp_path: Path, user_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails([*small(tmp_path), "--model", f"{user_model}:Lacking"], capsys)
    assert "lacks the methods loss_and_gradients, evaluate, predict" in err


@pytest.mark.parametrize("name", ["Broken", "BrokenInit"])
def test_a_bug_in_the_model_is_shown_with_its_place(
    tmp_path: Path, user_model: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small(tmp_path), "--run-dir", "r", "--model", f"{user_model}:{name}"]
    assert main(flags) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "psframe: error: rank 0: ZeroDivisionError: mine" in err
    assert f"{user_model}.py, line" in err
    if name == "Broken":
        assert json.loads(Path("r/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("name", ["Exits", "ExitsAtOnce", "ExitsAtInit", "GivesUp"])
def test_a_model_that_ends_the_program_has_failed(
    tmp_path: Path, user_model: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", "--model", f"{user_model}:{name}"]) == 1
    err = capsys.readouterr().err
    assert re.search(r"psframe: error: .*(SystemExit: 0|sys.exit\(0\)|GeneratorExit)", err)
    if name == "Exits":
        assert f"{user_model}.py, line" in err
        assert json.loads(Path("r/status.json").read_text())["state"] == "failed"


def test_a_module_that_ends_the_program_has_failed(
    tmp_path: Path, user_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{user_model}_b.py").write_text("import sys\nsys.exit(0)\n")
    err = fails([*small(tmp_path), "--model", f"{user_model}_b:Model"], capsys)
    assert "raised SystemExit: 0" in err


@pytest.mark.parametrize("name", ["Wordless", "Talkative"])
def test_an_exception_however_it_is_worded(
    tmp_path: Path, user_model: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", "--model", f"{user_model}:{name}"]) == 1
    err = capsys.readouterr().err
    assert len(err) < 10_000
    assert "psframe: error: rank 0: " in err
    assert f"{user_model}.py, line" in err


def test_an_interrupt_ends_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("psframe.trainer.run", interrupt)
    assert main(small(tmp_path)) == 130
    assert capsys.readouterr().err == "psframe: interrupted\n"


def test_a_gpu_that_is_not_there_is_missed_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psframe.devices.choosing.visible_gpus", lambda: 0)
    err = fails(["--precision", "bfloat16", "--device", "cpu", "--run-dir", "r"], capsys)
    assert "--precision: 'bfloat16' needs a GPU; on the CPU there is only 'float32'" in err
    err = fails(["--device", "cuda", "--run-dir", "r"], capsys)
    assert "--device: 'cuda' needs a GPU that CuPy can use, and there is none" in err
    assert err.count("\n") == 1


def test_weights_that_do_not_fit_make_the_run_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    err = fails([*small(tmp_path), "--run-dir", "r"], capsys)
    assert "final weights could not be written: No space left on device" in err
    status = json.loads(Path("r/status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left" in status["reason"]


def test_a_failed_evaluation_costs_the_evaluation_only(
    tmp_path: Path, user_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file

    data = small(tmp_path)
    flags = [*data, "--run-dir", "r", "--model", f"{user_model}:BrokenAtTheEnd"]
    assert main(flags) == 1
    out, err = capsys.readouterr()
    assert "psframe: error: rank 0: ZeroDivisionError: mine" in err
    assert "the training itself is done and its weights are saved" in err
    assert load_file("r/checkpoints/final.safetensors").keys() > {"w1", "b1"}
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["updates"]) == ("failed", 9)
    assert status["reason"] == "ZeroDivisionError: mine"
    summary = json.loads(Path("r/summary.json").read_text())
    last = json.loads(Path("r/metrics.jsonl").read_text().splitlines()[-1])
    assert summary["confusion"] is None
    assert summary["accuracy"] == status["test_accuracy"] == last["test_accuracy"]
    assert re.search(r"^test accuracy +\d", out, re.M)
    assert main([*flags, "--resume"]) == 1
    out, err = capsys.readouterr()
    assert "already completed" not in out
    assert "ZeroDivisionError: mine" in err, "it was trained, and is evaluated again"
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["updates"]) == ("failed", 9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("WordlessAtTheEnd", "NoWords: (its __str__ raised RuntimeError)"),
        ("ExitsAtTheEnd", "SystemExit: 0"),
    ],
)
def test_an_evaluation_may_fail_in_any_way(
    tmp_path: Path, user_model: str, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(tmp_path), "--run-dir", "r", "--model", f"{user_model}:{name}"]) == 1
    assert f"psframe: error: rank 0: {reason}" in capsys.readouterr().err
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", reason)


def test_an_interrupted_evaluation_leaves_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        status = json.loads(Path("r/status.json").read_text())
        assert (status["state"], status["updates"]) == ("running", 9), "it is not over yet"
        assert Path("r/checkpoints/final.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("psframe.trainer.predict", interrupt)
    assert main([*small(tmp_path), "--run-dir", "r"]) == 130
    status = json.loads(Path("r/status.json").read_text())
    assert (status["state"], status["updates"]) == ("interrupted", 9)


def test_a_run_that_is_killed_while_evaluated_has_failed(tmp_path: Path) -> None:
    program = f"""
import os, signal
import psframe.trainer
from psframe.train import main

psframe.trainer.predict = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
main({[*small(tmp_path), "--run-dir", "r"]})
"""
    environ = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])}
    # The witness has no stdout of ours, so that the pipe's end is not its end; it is polled for.
    subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=100)
    state, ends = "running", time.monotonic() + 30
    while state == "running" and time.monotonic() < ends:
        state = json.loads(Path("r/status.json").read_text())["state"]
    assert state == "failed"
    assert Path("r/checkpoints/final.safetensors").exists()


@pytest.mark.parametrize("flags", [["--nonsense"], ["--help"]])
def test_other_ranks_keep_silent_about_usage(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "find_launcher", lambda: Launcher("test", 1, 4))
    with pytest.raises(SystemExit):
        main(flags)
    assert capsys.readouterr() == ("", "")


def test_importing_psframe_loads_no_face() -> None:
    program = "import sys\nfrom psframe import *\n"
    program += "print([m for m in ('tyro', 'rich', 'safetensors', 'mpi4py') "
    program += "if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_as_a_program(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "SLURM"))}
    package = Path(train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "psframe.train", *small(tmp_path)],
        env={**environ, "PYTHONPATH": str(package)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1].split()[-1])
    assert folder.parent == Path("runs")
    assert (tmp_path / folder / "checkpoints" / "final.safetensors").exists()


def test_nobody_has_to_read_what_is_printed(tmp_path: Path) -> None:
    """A full disk or a closed pipe at the output does not fail a run that is completed."""
    command = [sys.executable, "-m", "psframe.train", *small(tmp_path), "--run-dir", "r"]
    environ = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, timeout=100
        )
    assert done.returncode == 0, done.stderr
    assert "the summary could not be printed: No space left on device" in done.stderr
    assert json.loads(Path("r/status.json").read_text())["state"] == "completed"
    assert json.loads(Path("r/summary.json").read_text())["updates"] == 9
