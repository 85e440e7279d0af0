"""What a step of the built-in models takes on a GPU, against PyTorch's of the same models.

    python benchmarks/gpu_models.py
    python benchmarks/gpu_models.py --models mlp --precisions tf32 bfloat16 --rounds 15 --json

A step is the forward pass, the loss, and all gradients; no update, which is a server's. `mlp` is
4096-4096-4096-1000 with ReLU at batch 1024; `cnn` is `psframe.models.CNN` for images of 3 x 32 x 32
(convolutions of 32, 64 and 64 channels, each with batch normalisation, ReLU and pooling, two dense
layers, dropout) at batch 256. Both libraries compute in one process on one GPU, in turn, `--rounds`
times `--steps` steps between two events; the figures are medians, with the least and the most.
Before that both are given the same parameters and the same batch, and their gradients must agree.

PyTorch runs as its users run it: eager, cuDNN choosing its fastest algorithms, autocast for
bfloat16 and float16, a gradient scaler for the latter. `ratio` is psframe's rate over PyTorch's;
the last column is what it should be at least. With --require a smaller one is exit status 1.
Needs a GPU, CuPy, and PyTorch for the same CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.models import CNN, MLP
from psframe.models.precision import PRECISIONS

MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int, int]] = {
    # model, shape of a sample, classes, batch size
    "mlp": (lambda: MLP((4096,), 1000, hidden=(4096, 4096)), (4096,), 1000, 1024),
    "cnn": (lambda: CNN((3, 32, 32), 10), (3, 32, 32), 10, 256),
}
ENOUGH = {"mlp": 0.8, "cnn": 0.5}
# How far gradients may be apart, in the norm of each tensor: rounding of factors to 2^-24, 2^-11,
# 2^-8 and 2^-11, and the ReLUs and pools that decide otherwise for it.
AGREE = {"float32": 1e-3, "tf32": 0.05, "bfloat16": 0.3, "float16": 0.1}
Step = Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30, help="in a round of one library")
    parser.add_argument("--json", action="store_true", help="one object a line, not a table")
    parser.add_argument("--require", action="store_true", help="fail if a ratio is too small")
    args = parser.parse_args()
    cupy, torch = libraries()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    if not args.json:
        print(f"{name}, CuPy {cupy.__version__}, PyTorch {torch.__version__}\n")
        print("| model | precision | psframe ms | PyTorch ms | ratio | at least |")
        print("|---|---|---|---|---|---|")
    enough = True
    for model in args.models:
        for precision in args.precisions:
            row = measure(cupy, torch, model, precision, args.rounds, args.steps)
            enough &= row["ratio"] >= ENOUGH[model]
            if args.json:
                print(json.dumps({"device": name, **row}), flush=True)
                continue
            times = " | ".join(
                f"{row[f'{who}_ms']:.3f} ({row[f'{who}_ms_range'][0]:.3f} to "
                f"{row[f'{who}_ms_range'][1]:.3f})"
                for who in ("psframe", "torch")
            )
            line = f"| {model} | {precision} | {times} | {row['ratio']:.2f} | {ENOUGH[model]} |"
            print(line, flush=True)
    return 0 if enough or not args.require else 1


def libraries() -> tuple[Any, Any]:
    """Import CuPy and PyTorch, or say why this cannot run here."""
    try:
        import cupy
        import torch
    except ImportError as error:
        sys.exit(f"gpu_models: {error}; needs CuPy (psframe[cuda12] or [cuda13]) and PyTorch")
    if not cupy.is_available():
        sys.exit("gpu_models: there is no GPU that CuPy can use; nothing can be measured here")
    if not torch.cuda.is_available():
        sys.exit("gpu_models: this PyTorch sees no GPU; install one for the machine's CUDA")
    return cupy, torch


def measure(
    cupy: Any, torch: Any, name: str, precision: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Time both libraries' steps of one model in one precision."""
    make, shape, classes, batch = MODELS[name]
    model = make()
    model.precision = precision
    rng = np.random.default_rng(0)
    params = model.init(rng)
    x = rng.standard_normal((batch, *shape)).astype(np.float32)
    y = rng.integers(0, classes, batch)
    net = torch_model(torch, name, params).cuda()
    compare(
        torch,
        precision,
        ours(cupy, model, params, x, y, None),
        theirs(torch, net, precision, x, y, dropout=False),
    )
    contenders = {
        "psframe": ours(cupy, model, params, x, y, rng),
        "torch": theirs(torch, net, precision, x, y, dropout=True),
    }
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for who, (step, _) in contenders.items():
        for _ in range(10):
            step()
        cupy.cuda.Device().synchronize()
        assert who in times
    for _ in range(rounds):
        for who, (step, _) in contenders.items():
            times[who].append(timed(cupy, step, steps))
    row: dict[str, Any] = {"model": name, "precision": precision, "batch": batch}
    for who, found in times.items():
        row[f"{who}_ms"] = statistics.median(found)
        row[f"{who}_ms_range"] = [min(found), max(found)]
    row["ratio"] = row["torch_ms"] / row["psframe_ms"]
    return row


def timed(cupy: Any, step: Step, steps: int) -> float:
    """Time steps between two events, in milliseconds each; both libraries' stream is the same."""
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end)) / steps


def ours(
    cupy: Any, model: Any, params: Any, x: Any, y: Any, rng: Any
) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Make psframe's step, and what gives its gradients by their names here."""
    flat = cupy.empty(sum(p.size for p in params.values()), np.float32)  # as a worker's
    there, begin = {}, 0
    for name, p in params.items():
        there[name] = flat[begin : begin + p.size].reshape(p.shape)
        there[name].set(p)
        begin += p.size
    out = {name: cupy.empty_like(p) for name, p in there.items()}
    samples, labels = cupy.asarray(x), cupy.asarray(y)

    def step() -> Any:
        return model.loss_and_gradients(there, samples, labels, out=out, rng=rng)

    return step, lambda: {
        name: cupy.asnumpy(g) for name, g in out.items() if not name.endswith(("mean", "variance"))
    }


def torch_model(torch: Any, name: str, params: dict[str, Any]) -> Any:
    """Make the same model of PyTorch's modules, with the same parameters."""
    nn = torch.nn
    if name == "mlp":
        net = nn.Sequential(
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, 1000),
        )
    else:
        layers, channels = [], 3
        for wider in (32, 64, 64):
            layers += [nn.Conv2d(channels, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels = wider
        layers += [nn.Flatten(), nn.Linear(1024, 128), nn.BatchNorm1d(128), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(128, 10))
    trained = [p for key, p in params.items() if not key.endswith(("mean", "variance"))]
    with torch.no_grad():
        for theirs, own in zip(net.parameters(), trained, strict=True):
            theirs.copy_(torch.from_numpy(own.T if own.ndim == 2 else own))
    return net


def theirs(
    torch: Any, net: Any, precision: str, x: Any, y: Any, *, dropout: bool
) -> tuple[Step, Callable[[], list[Any]]]:
    """Make PyTorch's step, and what gives its gradients in the order of the parameters."""
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train(dropout)
    samples, labels = torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda()
    loss_of = torch.nn.CrossEntropyLoss()
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)  # never steps: the scaler wants one
    scaler = torch.amp.GradScaler("cuda") if precision == "float16" else None

    def step() -> Any:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            precision != "float32"
        )
        optimizer.zero_grad(set_to_none=True)
        cast: Any = contextlib.nullcontext()
        if half is not None:
            cast = torch.autocast("cuda", half)
        with cast:
            loss = loss_of(net(samples), labels)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.update()
        return loss

    def gradients() -> list[Any]:
        found = [p.grad.detach().float().cpu().numpy() for p in net.parameters()]
        return [g.T if g.ndim == 2 else g for g in found]

    return step, gradients


def compare(torch: Any, precision: str, own: Any, other: Any) -> None:
    """See that both compute the same, before the time of it counts."""
    (step, gradients), (their_step, their_gradients) = own, other
    loss, their_loss = float(step()[0]), float(their_step())
    torch.cuda.synchronize()
    assert abs(loss - their_loss) <= AGREE[precision] * abs(their_loss), (loss, their_loss)
    found, expected = gradients(), their_gradients()
    largest = max(float(np.linalg.norm(g)) for g in expected)
    for (name, g), e in zip(found.items(), expected, strict=True):
        apart = float(np.linalg.norm(g - e))
        bound = AGREE[precision] * max(float(np.linalg.norm(e)), 0.02 * largest)
        assert apart <= bound, f"{name}, {precision}: {apart:g} apart, expected {bound:g} at most"


if __name__ == "__main__":
    sys.exit(main())
