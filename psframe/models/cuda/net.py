"""A model's passes on kernels."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psframe.errors import ArgumentError
from psframe.models.base import array_module
from psframe.models.cuda.run import Run
from psframe.models.cuda.steps import Step, _Conv2D, _Flatten, plan
from psframe.models.layers import Layer
from psframe.models.precision import check_host

__all__ = ["Net"]

# Samples that are evaluated at once: a convolution's columns are nine times its input.
_EVALUATED_AT_ONCE = 512

Names = Sequence[Sequence[tuple[str, str]]]


class Net:
    """Runs layers on kernels, if the parameters are CuPy's float32 arrays.

    Args:
        layers: of the model, built.
        names: for each layer its parameters: names in the model, and in the layer.
        shape: of one sample, (d,) or (c, h, w).
    """

    def __init__(self, layers: Sequence[Layer], names: Names, shape: Sequence[int]) -> None:
        self._steps = plan(list(layers))
        self._names = names
        self._shape = tuple(shape)
        # No gradient is wanted before the first step that has parameters.
        self._first = next(
            (i for i, step in enumerate(self._steps) if names[step.number]), len(self._steps)
        )
        self._local = threading.local()

    def takes(self, params: Mapping[str, Any], precision: str) -> bool:
        """Tell whether it is to run a pass; otherwise the layers' plain expressions do.

        Raises:
            ArgumentError: these parameters cannot be computed with in this precision.
        """
        some = next(iter(params.values()), None)
        xp = array_module(some)
        if xp is np:
            check_host(precision)
            return False
        if all(p.dtype == np.float32 and p.flags.c_contiguous for p in params.values()):
            return True
        if precision != "float32":
            raise ArgumentError(
                f"precision: {precision!r} needs float32 parameters, each contiguous"
            )
        return False

    def loss_and_gradients(
        self,
        params: Mapping[str, Any],
        x: Any,
        y: Any,
        out: Mapping[str, Any] | None,
        rng: np.random.Generator | None,
        precision: str,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Queue a pass forward and backward; see `psframe.models.Model`.

        Nothing waits for the device; the loss is a `DeviceLoss`.
        """
        run = self._run(precision, array_module(x), training=True)
        run.memory.rng = rng
        parts = self._parts(params)
        logits = self._forward(run, parts, x)
        g = run.stored(self, "g", logits.shape)
        loss = run.loss(logits, _labels(y), g)
        grads = {name: run.xp.empty_like(p) for name, p in params.items()} if out is None else out
        # A product writes to contiguous memory only.
        places = {
            name: grad
            if grad.flags.c_contiguous and grad.dtype == np.float32
            else run.float32(self, f"gradient {name}", grad.shape)
            for name, grad in grads.items()
        }
        self._backward(run, parts, g, self._parts(places))
        if run.kernels.scaled:
            run.kernels.next_scale()
        for name, grad in grads.items():
            if places[name] is not grad:
                grad[...] = places[name]
        return loss, grads

    def logits(self, params: Mapping[str, Any], x: Any, precision: str) -> Any:
        """Compute the (n, k) logits of samples, as in evaluation; float32."""
        run = self._run(precision, array_module(x), training=False)
        parts = self._parts(params)
        results = []
        for block in _blocks(len(x)):
            logits = self._forward(run, parts, x[block])
            results.append(logits.copy() if run.bias is None else logits + run.bias)
        return results[0] if len(results) == 1 else run.xp.concatenate(results)

    def evaluate(
        self, params: Mapping[str, Any], x: Any, y: Any, precision: str
    ) -> dict[str, float]:
        """Sum loss, correct predictions and samples over a batch."""
        run = self._run(precision, array_module(x), training=False)
        parts, labels = self._parts(params), _labels(y)
        loss = correct = 0.0
        for block in _blocks(len(x)):
            found = run.sums(self._forward(run, parts, x[block]), labels[block])
            loss, correct = loss + found[0], correct + found[1]
        return {"loss": loss, "correct": correct, "count": float(len(y))}

    def _forward(self, run: Run, parts: Sequence[Mapping[str, Any]], x: Any) -> Any:
        run.bias = None
        run.cast_weights(self._steps, parts)
        value = self._begin(run, x)
        for step in self._steps:
            if not (step is self._steps[0] and isinstance(step, _Conv2D)):
                value = _converted(run, value, step)
            value = step.forward(run, parts[step.number], value)
        return run.as_float32(value, self)

    def _begin(self, run: Run, x: Any) -> Any:
        """Bring samples into the form that the first step takes."""
        if x.dtype != np.float32:
            x = x.astype(np.float32)
        if not x.flags.c_contiguous:
            x = run.xp.ascontiguousarray(x)
        value = run.shaped(x, (len(x), *self._shape))
        if len(self._shape) == 1 or isinstance(self._steps[0], _Conv2D):
            return value
        if isinstance(self._steps[0], _Flatten):
            return value.reshape(len(x), -1)
        swapped = run.float32(self, "samples", (self._shape[0], len(x), *self._shape[1:]))
        swapped[...] = value.transpose(1, 0, 2, 3)
        return swapped

    def _backward(
        self,
        run: Run,
        parts: Sequence[Mapping[str, Any]],
        g: Any,
        places: Sequence[Mapping[str, Any]],
    ) -> None:
        for number in range(len(self._steps) - 1, self._first - 1, -1):
            step = self._steps[number]
            g = _converted(run, g, step, gradient=True)
            wanted = number > self._first
            g = step.backward(run, parts[step.number], g, places[step.number], wanted)

    def _parts(self, arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Sort arrays by layer, under their names there."""
        return [{name: arrays[full] for full, name in names} for names in self._names]

    def _run(self, precision: str, xp: Any, *, training: bool) -> Run:
        """Give this thread's means for a pass of that kind on the current device."""
        runs = self._local.__dict__.setdefault("runs", {})
        key = xp, int(xp.cuda.Device()), precision, training
        if key not in runs:
            runs[key] = Run(xp, precision, training=training)
        found: Run = runs[key]
        return found


def _converted(run: Run, value: Any, step: Step, *, gradient: bool = False) -> Any:
    """Give what flows into a step as the step takes it."""
    if step.stored:
        return run.as_stored(value, step, gradient=gradient)
    return run.as_float32(value, step, gradient=gradient)


def _labels(y: Any) -> Any:
    """Give labels as the kernels read them."""
    return y if y.dtype == np.int64 and y.flags.c_contiguous else y.astype(np.int64)


def _blocks(n: int) -> list[slice]:
    return [slice(i, i + _EVALUATED_AT_ONCE) for i in range(0, n, _EVALUATED_AT_ONCE)]
