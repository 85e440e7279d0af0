"""What `psframe.train` is told, by defaults, a TOML file and flags; and whether it makes sense."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import re
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from psframe import optim, toml
from psframe.cadence import parse_cadence
from psframe.choices import ModeName, make_mode, mode_of, parse_codec, parse_stale
from psframe.consistency import Mode
from psframe.data import Augmentation
from psframe.errors import ArgumentError
from psframe.models.precision import Precision
from psframe.placement import Checked, parse_servers
from psframe.plan import COUNT_MAX, RESPAWN_MAX, THREADS_MAX, TIMEOUT_S, TIMEOUT_S_MIN
from psframe.starting import INTERRUPTED, PREEMPTED

__all__ = [
    "INTERRUPTED",
    "PREEMPTED",
    "THREADS",
    "Settings",
    "blamed",
    "check_choice",
    "from_file",
]

THREADS = 3  # workers of a command without a launcher, if it is not told how many

# Safe for stale gradients: Adagrad's steps shrink, which keeps it stable where SGD, at a rate that
# serves one worker well, diverges under a delay of 15 updates. (Dean et al., Large Scale
# Distributed Deep Networks, 2012, chose Adagrad for their asynchronous SGD for robustness.)
_LR = {"sgd": 0.1, "adagrad": 0.01, "rmsprop": 0.0005, "adam": 0.001, "adamw": 0.001}
_RULES: dict[str, Any] = {
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rmsprop": optim.RMSProp,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
}
# They say how one start was meant, not what the run is.
_NOT_STORED = ("resume", "overwrite", "config")
_LIMITS = {
    "staleness": 0,
    "staleness_max": 0,
    "pushes": 1,
    "warm_start": 0,
    "backup": 0,
    "warmup": 0,
    "epochs": 1,
    "batch_size": 1,
    "servers": 1,
    "workers": 1,
    "seed": 0,
    "split_seed": 0,
    "patience": 1,
    "keep_checkpoints": 1,
    "respawn": 0,
}
# What is not here is an int of C's.
_LIMITS_MAX = {
    "workers": THREADS_MAX,
    "seed": COUNT_MAX,
    "split_seed": COUNT_MAX,
    "respawn": RESPAWN_MAX,
}
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Settings:
    """Settings of one training; each is a flag of the command and a key of its TOML file."""

    model: str = "mlp"
    """mlp, softmax, cnn (images), or package.module:Class for a class of your own"""

    data: str = "digits"
    """digits; a file: .npz, .csv, .tsv, .parquet; a folder: MNIST's, CIFAR-10's, shards of .npy"""

    label: str | None = None
    """label column of a table; else its last one"""

    test_fraction: float = 0.2
    """part of the samples that is held out for testing, if the data has no such part"""

    validation_fraction: float = 0.0
    """part of the samples that decides which epoch's weights are kept; 0 keeps the last"""

    augment: str = ""
    """random changes to training images: shift=PIXELS, flip, or both: shift=2,flip"""

    # Of 16 splits of the digits, 1 is one of the easier: the MLP reaches 98.8%, and over all of
    # them 98.0% with a standard deviation of 0.7.
    split_seed: int = 1
    """chooses the held-out samples; not tied to --seed, so that seeds compare on the same ones"""

    mode: ModeName = "async"
    """async: nobody waits; ssp, dynamic-ssp: bounded clock lag; bsp: all workers in step; rennala,
    buffered: the mean of some pushes; ringleader: the mean of each worker's latest gradient"""

    staleness: int | None = None
    """with --mode ssp: steps that a worker may be ahead of the slowest; else 3"""

    staleness_max: int | None = None
    """with --mode dynamic-ssp: how far --staleness may be overstepped; else 12"""

    pushes: int | None = None
    """with --mode rennala or buffered: pushes that make an update; else 4"""

    warm_start: int = 0
    """with --mode async, ssp or dynamic-ssp: rounds of bsp to begin with"""

    stale: str = "accept"
    """what becomes of stale gradients: inverse, delay-adaptive=4, compensate=2.0, gap-aware,
    drop=16, clip=1.0, or some with + between; accept applies them as they are"""

    backup: int | None = None
    """with --mode bsp: workers that a round does not wait for; else 0"""

    codec: str = "none"
    """what travels in place of gradients: float16, bfloat16, topk=0.01, sign, qsgd=127 or
    powersgd=4"""

    pull_codec: str = "none"
    """the same for parameters, of their difference to those that the worker has"""

    optimizer: Literal["sgd", "adagrad", "rmsprop", "adam", "adamw"] = "adagrad"
    """update rule, applied by the servers; adagrad bears stale gradients best"""

    lr: float | None = None
    """learning rate; else sgd 0.1 (1 - momentum), adagrad 0.01, rmsprop 0.0005, adam(w) 0.001"""

    momentum: float = 0.0
    """with sgd; stale gradients then take a smaller --lr; from 8 async workers on prefer bsp"""

    nesterov: bool = False
    """Nesterov's momentum, with sgd and --momentum"""

    weight_decay: float | None = None
    """decay of weights, not of biases (all of one dimension); else 0.01 with adamw and 0"""

    clip_norm: float | None = None
    """scale gradients of a larger Euclidean norm down to this one"""

    schedule: Literal["constant", "cosine"] = "constant"
    """learning rate over the run; cosine ends at 0 with the last epoch"""

    warmup: int = 0
    """updates over which the learning rate rises from 0 first"""

    epochs: int = 30
    """how often each training sample is used"""

    patience: int | None = None
    """stop after so many epochs without a better accuracy, not loss, on the validation part"""

    batch_size: int = 32
    """samples in a batch of one worker"""

    no_prefetch: bool = False
    """load a batch only when it is its turn, not while the one before is computed"""

    servers: int | str = 1
    """ranks that hold the parameters: how many, the first; per-node; or which, such as 0,4,8"""

    workers: int | None = None
    """worker threads without mpirun; else 3; under mpirun the ranks decide"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where workers compute; auto takes a GPU if CuPy finds one"""

    precision: Precision = "float32"
    """arithmetic on a GPU; float16 scales the loss. Parameters and gradients stay float32"""

    server_device: Literal["cpu", "cuda"] = "cpu"
    """where servers keep and update parameters; cuda gives them the GPUs of their node in turn"""

    gpu_direct: Literal["auto", "on", "off"] = "auto"
    """under mpirun: give MPI arrays on GPUs between nodes; auto, if MPI is known to take them. With
    off, ranks of a node do not open each other's GPU memory either"""

    timeout_s: float = TIMEOUT_S
    """under mpirun: seconds without a sign of life after which a rank counts as lost"""

    respawn: int = 0
    """under mpirun --with-ft ulfm: replacements for lost workers, at most so many in all"""

    seed: int = 0
    """of the initial parameters and of the order of samples"""

    run_dir: str = "runs/{time}"
    """folder for configuration, metrics, status and weights; {time} becomes date and time"""

    show: Literal["auto", "live", "lines", "none"] = "auto"
    """what is shown meanwhile; auto: a live display on a terminal, else a line now and then"""

    tensorboard: bool = False
    """write event files for TensorBoard into the run directory"""

    trace: bool = False
    """write trace.json, a timeline of all ranks for Perfetto or chrome://tracing"""

    checkpoint_every: str = "60s"
    """how often a checkpoint is written: 1000 (updates), 30s, 5min, 2h, or never"""

    keep_checkpoints: int = 3
    """how many of them stay, beside that of the best epoch"""

    resume: bool = False
    """go on in --run-dir from its newest checkpoint; if the run is completed, do nothing"""

    overwrite: bool = False
    """replace the run in --run-dir"""

    config: str | None = None
    """TOML file of these settings, such as a run's config.toml; flags override it, and one that
    changes the mode or optimizer also what the file says of the old one"""

    def resolved(self) -> Settings:
        """Fill in the defaults that depend on other settings, after checking them all.

        Raises:
            ArgumentError: a number is out of range, or two settings contradict each other.
        """
        self._check_ranges()
        self._check_contradictions()
        lr = self._usual_lr() if self.lr is None else self.lr
        decay = self.weight_decay
        if decay is None:
            decay = 0.01 if self.optimizer == "adamw" else 0.0
        return dataclasses.replace(self, lr=lr, weight_decay=decay, **self._with_mode())

    def changed_from(self, file: Settings, given: Container[str]) -> Settings:
        """Drop what the file says of a mode or an optimizer that flags have changed.

        A run's config.toml has all settings, those too that only went with its mode or optimizer.

        Args:
            file: the settings before the flags.
            given: the names of the settings that were given as flags; they stay.
        """
        default, dependent = Settings(), list[str]()
        if self.mode != file.mode:
            dependent += [*self._of_mode()]
        if self.optimizer != file.optimizer:
            dependent += ["lr", "weight_decay", "momentum", "nesterov"]
        elif self.momentum != file.momentum and file.lr == file._usual_lr():
            dependent += ["lr"]
        stale = {name: getattr(default, name) for name in dependent if name not in given}
        return dataclasses.replace(self, **stale)

    def _with_mode(self) -> Any:
        return mode_of(self.mode, self._of_mode())

    def _of_mode(self) -> dict[str, int | None]:
        names = ("staleness", "staleness_max", "backup", "pushes")
        return {name: getattr(self, name) for name in names}

    def _usual_lr(self) -> float:
        return _LR[self.optimizer] * (1.0 - self.momentum)

    def placement(self) -> Checked:
        """Say what `psframe.run` is told of servers.

        Raises:
            ArgumentError: it makes no sense.
        """
        return parse_servers(self.servers) if isinstance(self.servers, str) else self.servers

    def consistency(self) -> Mode:
        """Make the mode.

        Raises:
            ArgumentError: settings of the mode do not go together.
        """
        return make_mode(self.mode, self._of_mode(), self.warm_start)

    def rule(self, params: Mapping[str, Any], samples: int, workers: int | None) -> Any:
        """Make the update rule.

        Args:
            params: the model's; those of at most one dimension are biases, which do not decay.
            samples: in the training part.
            workers: their number, None if not known.

        Raises:
            ArgumentError: the schedule needs the number of workers, and that is not known.
        """
        arguments: dict[str, Any] = {
            "weight_decay": self.weight_decay or 0.0,
            "no_decay": tuple(glob.escape(name) for name, p in params.items() if p.ndim <= 1),
        }
        if self.optimizer == "sgd":
            arguments.update(momentum=self.momentum, nesterov=self.nesterov)
        return _RULES[self.optimizer](self._schedule(samples, workers), **arguments)

    def _schedule(self, samples: int, workers: int | None) -> Any:
        lr = _LR[self.optimizer] if self.lr is None else self.lr
        after: Any = optim.schedules.Constant(lr)
        if self.schedule == "cosine":
            updates = self.epochs * -(-samples // min(self.batch_size, samples))
            if self.mode == "bsp":
                if not workers or workers < 1:
                    raise ArgumentError(
                        "--schedule cosine with --mode bsp: the launcher does not say how many "
                        "ranks there are, and so how many rounds; use --schedule constant"
                    )
                updates = -(-updates // workers)
            after = optim.schedules.Cosine(lr, max(1, updates - self.warmup))
        if not self.warmup:
            return lr if self.schedule == "constant" else after
        rise = optim.schedules.LinearWarmup(lr, self.warmup)
        return optim.schedules.Composed((rise, after), (self.warmup,))

    def idle(self, *, launched: bool) -> list[str]:
        """Say which settings do nothing here, each in a line; nothing is wrong with them.

        Args:
            launched: whether ranks have been started, and not one process.
        """
        told = []
        names = [part.strip().partition("=")[0] for part in self.stale.split("+")]
        idle = [name for name in names if name not in ("accept", "clip")]
        if self.mode == "bsp" and idle:
            told.append(
                f"--stale: {' and '.join(idle)} will do nothing: with --mode bsp no gradient is"
                " stale"
            )
        if self.respawn and not launched:
            told.append(
                f"--respawn {self.respawn} is ignored: without a launcher the workers are threads,"
                " and none is lost; start with Open MPI's mpirun --with-ft ulfm"
            )
        return told

    def cadence(self) -> str | None:
        """Give how often there are checkpoints, as `psframe.run` takes it.

        Raises:
            ArgumentError: it makes no sense.
        """
        if self.checkpoint_every == "never":
            return None
        try:
            parse_cadence(self.checkpoint_every, "--checkpoint-every")
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return self.checkpoint_every

    def as_config(self) -> dict[str, Any]:
        """Give what belongs into config.toml, which can be given back as --config."""
        config = dataclasses.asdict(self)
        return {key: config[key] for key in config if key not in _NOT_STORED}

    def _check_ranges(self) -> None:
        for name, least in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ArgumentError(f"{_flag(name)}: expected {least} or more, got {value}")
            most = _LIMITS_MAX.get(name, _INT_MAX)
            if isinstance(value, int) and value > most:
                raise ArgumentError(f"{_flag(name)}: expected {most} or less, got {value}")
        for name in ("data", "run_dir", "model", "config"):
            if getattr(self, name) == "":
                raise ArgumentError(f"{_flag(name)}: expected a name, got an empty one")
        self.placement()
        self.cadence()
        if not 0.0 < self.test_fraction < 1.0:
            raise ArgumentError(
                f"--test-fraction: expected a number between 0 and 1, got {self.test_fraction}"
            )
        if not 0.0 <= self.validation_fraction < 1.0 - self.test_fraction:
            raise ArgumentError(
                "--validation-fraction: expected 0 or more and, with --test-fraction, less than 1; "
                f"got {self.validation_fraction}"
            )
        Augmentation.parse(self.augment)
        if not 0.0 <= self.momentum < 1.0:
            raise ArgumentError(f"--momentum: expected a number in [0, 1), got {self.momentum}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ArgumentError(f"{_flag(name)}: expected 0 or more, got {value}")
        if not TIMEOUT_S_MIN <= self.timeout_s < float("inf"):
            raise ArgumentError(
                f"--timeout-s: expected {TIMEOUT_S_MIN:g} or more, got {self.timeout_s}"
            )
        if self.clip_norm is not None and not 0.0 < self.clip_norm < float("inf"):
            raise ArgumentError(f"--clip-norm: expected more than 0, got {self.clip_norm}")

    def _check_contradictions(self) -> None:
        pairs = [
            (self.momentum > 0, self.optimizer == "sgd", "momentum", "--optimizer sgd"),
            (self.nesterov, self.momentum > 0, "nesterov", "--momentum above 0"),
        ]
        for given, fits, name, other in pairs:
            if given and not fits:
                raise ArgumentError(f"{_flag(name)} goes with {other} only; add that, or drop it")
        self.consistency()
        parse_stale(self.stale)
        parse_codec(self.codec, "--codec")
        parse_codec(self.pull_codec, "--pull-codec")
        servers = self.placement()
        count = len(servers) if isinstance(servers, tuple) else servers
        if self.respawn and isinstance(count, int) and count > 1:
            raise ArgumentError(f"--respawn goes with one server only, not {count}; drop it")
        if self.resume and self.overwrite:
            raise ArgumentError("--resume and --overwrite contradict each other; drop one of them")
        if self.resume and "{time}" in self.run_dir:
            raise ArgumentError("--resume: which run? give its folder with --run-dir")


_MEANT = {"gpu": "cuda"}  # by its letters it is nearer to cpu


def from_file(path: str | Path) -> Settings:
    """Read settings from a TOML file; what it does not mention keeps its default.

    Raises:
        ArgumentError: it cannot be read, a key is unknown (the nearest is named), or a value is
            of the wrong type.
    """
    try:
        table = toml.load(path)
    except ValueError as error:
        raise ArgumentError(f"--config: {error}") from error
    hints = get_type_hints(Settings)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints or name in _NOT_STORED:
            near = difflib.get_close_matches(name, set(hints) - set(_NOT_STORED), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"--config: {path}: unknown key {key!r}{hint}")
        if name == "servers" and isinstance(value, list):
            value = ",".join(map(str, value))  # as its flag has it
        values[name] = _typed(hints[name], value, f"--config: {path}: {key}")
    return Settings(**values)


def blamed(
    error: ArgumentError, file: Settings, path: str | None, given: Container[str]
) -> ArgumentError:
    """Blame the file of settings, in the error's words, if what is wrong is not of a flag.

    Args:
        error: about a flag, which its text begins with.
        file: the settings before the flags.
        path: of the file, if there is one.
        given: the names of the settings that were given as flags.
    """
    found = re.match(r"--([a-z-]+)", str(error))
    name = found[1].replace("-", "_") if found else ""
    if (
        path is None
        or name in given
        or getattr(file, name, None) == getattr(Settings(), name, None)
    ):
        return error
    return ArgumentError(f"--config: {path}: {str(error).removeprefix('--')}")


def check_choice(flag: str, value: str) -> None:
    """Raise ArgumentError if the flag is one of a few words, and this is none of them."""
    hint = get_type_hints(Settings).get(flag.removeprefix("--").replace("-", "_"))
    if get_origin(hint) is Literal:
        _typed(hint, value, flag)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return `value` if it is what `hint` says; an integer may stand for a float."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(_MEANT.get(str(value), str(value)), choices, n=1)
            extra = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(map(str, choices))
            raise ArgumentError(f"{where}: expected one of {listed}; got {value!r}{extra}")
        return value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(o.__name__ for o in options if o is not type(None))
    raise ArgumentError(f"{where}: expected {expected}, got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
