"""The models' kernels against their layers: whole steps, run by a `cupy` that is not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_emulator import FakeCupy, install

from psframe.errors import ArgumentError
from psframe.models import CNN, MLP, Sequential, Softmax
from psframe.models.layers import (
    AveragePool2D,
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool2D,
    MaxPool2D,
    ReLU,
    Tanh,
)

IMAGES = (2, 9, 8)
MODELS: dict[str, Any] = {
    "softmax": lambda: Softmax(IMAGES, 4),
    "mlp": lambda: MLP(IMAGES, 4, hidden=(17, 9)),
    "wide": lambda: MLP((6,), 300, hidden=(5,)),
    "small cnn": lambda: CNN((8, 8), 5),
    "large cnn": lambda: CNN((3, 17, 16), 4),
    "biases": lambda: Sequential(
        IMAGES,
        [
            *(Conv2D(3, stride=2), ReLU(), Conv2D(4, size=2, padding=0), MaxPool2D(2, stride=1)),
            *(ReLU(), Conv2D(3, bias=False), ReLU(), Conv2D(2, bias=False), Flatten(), Dense(4)),
        ],
    ),
    "pools": lambda: Sequential(
        IMAGES,
        [
            *(MaxPool2D(3, stride=2), Conv2D(3), Tanh(), AveragePool2D(2, stride=1), BatchNorm()),
            *(GlobalAveragePool2D(), Dense(4), ReLU()),
        ],
    ),
    "flat": lambda: Sequential(
        (6,), [Flatten(), Dense(40), BatchNorm(), ReLU(), Dropout(0.3), Dense(8), Tanh(), Dense(4)]
    ),
    "normalised first": lambda: Sequential(IMAGES, [BatchNorm(), Flatten(), Dense(3)]),
}
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Of the norm of a gradient: float32 sums in another order; halves round by 2^-9 and 2^-12, and some
# of a few ReLUs and pools decide otherwise. (TF32 is a tensor core's; here it computes float32.)
TOLERANCES = {"float32": 1e-5, "tf32": 1e-5, "bfloat16": 0.15, "float16": 0.05}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return install(monkeypatch)


def given(model: Any, n: int, seed: int = 8) -> tuple[dict[str, Any], Any, Any]:
    rng = np.random.default_rng(seed)
    shape = model.input_shape if isinstance(model, Sequential) else (model.widths[0],)
    params = {
        name: (p + 0.1 * rng.random(p.shape)).astype(np.float32)
        for name, p in model.init(rng).items()
    }
    classes = model.n_classes if isinstance(model, Sequential) else model.widths[-1]
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return params, x, rng.integers(0, classes, n)


def together(cupy: FakeCupy, params: dict[str, Any], *, gap: int = 0) -> dict[str, Any]:
    """Lay parameters one after the other, as a worker's lie; with a gap, not quite."""
    flat = cupy.empty(sum(p.size + gap for p in params.values()), np.float32)
    found, begin = {}, 0
    for name, p in params.items():
        found[name] = flat[begin : begin + p.size].reshape(p.shape)
        found[name].view(np.ndarray)[...] = p
        begin += p.size + gap
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_kernels_is_the_layers_step(cupy: FakeCupy, name: str, precision: str) -> None:
    model, plain = MODELS[name](), MODELS[name]()
    model.precision = precision
    params, x, y = given(model, 16)
    loss, grads = plain.loss_and_gradients(params, x, y, rng=np.random.default_rng(3))
    tolerance = TOLERANCES[precision]
    largest = max(np.linalg.norm(g) for g in grads.values())
    for gap in (0, 4):
        there = together(cupy, params, gap=gap)
        out = {key: cupy.empty_like(p) for key, p in there.items()}
        found, same = model.loss_and_gradients(
            there, cupy.asarray(x), cupy.asarray(y), out=out, rng=np.random.default_rng(3)
        )
        assert float(found) == pytest.approx(loss, rel=tolerance)
        assert found == float(found)
        assert f"{found:.3f} {found!r}" == f"{float(found):.3f} {float(found)!r}"
        cupy.stream.check()
        for key, g in grads.items():
            assert same[key] is out[key]
            error = np.linalg.norm(cupy.asnumpy(out[key]) - g)
            assert error <= tolerance * max(np.linalg.norm(g), 0.02 * largest), key
    assert set(cupy.cublas.computes) == {77 if precision == "tf32" else 68}
    sums = model.evaluate(there, cupy.asarray(x), cupy.asarray(y))
    expected = plain.evaluate(params, x, y)
    assert sums["count"] == 16
    assert sums["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    if precision in ("float32", "tf32"):
        assert sums["correct"] == expected["correct"]
        labels = cupy.asnumpy(model.predict(there, cupy.asarray(x)))
        np.testing.assert_array_equal(labels, plain.predict(params, x))
    found = cupy.asnumpy(model.probabilities(there, cupy.asarray(x)))
    np.testing.assert_allclose(found, plain.probabilities(params, x), atol=tolerance)
    assert model.predict(there, cupy.asarray(x[:0])).shape == (0,)
    cupy.stream.check()


STEPS: dict[str, Any] = {
    "mlp": lambda: MLP((64,), 10, hidden=(96, 96)),  # of the shape of 4096-4096-4096-1000
    "cnn": lambda: CNN((3, 32, 32), 10),
}
# What a step launches: kernels, products and copies. Each costs the host some microseconds, which a
# GPU waits for if the step itself is shorter: a change here is a change of speed.
LAUNCHES = {
    ("mlp", "float32"): 19,
    ("mlp", "float16"): 22,
    ("cnn", "float32"): 64,
    ("cnn", "float16"): 66,
}


@pytest.mark.parametrize(("name", "precision"), LAUNCHES)
def test_after_the_first_step_nothing_is_allocated_and_nobody_waits(
    cupy: FakeCupy, name: str, precision: str
) -> None:
    model = STEPS[name]()
    model.precision = precision
    params, x, y = given(model, 3)
    sets = [together(cupy, params) for _ in range(2)]  # as a worker's, in turn
    batches = [(cupy.asarray(x), cupy.asarray(y)) for _ in range(2)]
    out = {key: cupy.empty_like(p) for key, p in params.items()}
    rng = np.random.default_rng(3)
    stream = cupy.stream
    for step in range(6):
        allocations = stream.allocations
        stream.launches.clear()
        loss, _ = model.loss_and_gradients(sets[step % 2], *batches[step % 2], out=out, rng=rng)
        assert stream.synchronisations == step
        assert stream.allocations == allocations or step == 0
        assert len(stream.launches) == LAUNCHES[name, precision] or step == 0
        assert 0.0 < float(loss) < 20.0
        assert stream.synchronisations == step + 1  # the loss, and it alone, has been waited for
        stream.run()  # a push does not return before all gradients are there
    stream.check()


def test_a_loss_may_be_read_late_and_is_its_own_steps(cupy: FakeCupy) -> None:
    model = MLP((6,), 3, hidden=(5,))
    params, x, y = given(model, 4)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    losses = [
        model.loss_and_gradients(there, cupy.asarray(k * x), cupy.asarray(y))[0] for k in range(9)
    ]
    expected = [model.loss_and_gradients(params, k * x, y)[0] for k in range(9)]
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-5)


def test_uploads_that_follow_one_another_closely_wait_for_each_other(cupy: FakeCupy) -> None:
    model, plain = Sequential((40,), [Dropout(0.5), Dense(3)]), MLP((40,), 3, hidden=())
    params, x, y = given(model, 8)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    draws, losses, expected = np.random.default_rng(4), [], []
    for _ in range(5):
        losses.append(
            model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y), rng=draws)[0]
        )
    draws = np.random.default_rng(4)
    for _ in range(5):
        expected.append(model.loss_and_gradients(params, x, y, rng=draws)[0])
    assert plain.widths == (40, 3)
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-5)


def state(model: Any) -> list[float]:
    """The loss scale, its inverse, and the finite steps since it changed."""
    (run,) = model._net._local.runs.values()
    run.kernels.state.stream.run()
    return [float(value) for value in run.kernels.state.view(np.ndarray)[:3]]


def test_an_overflow_halves_the_loss_scale_and_is_pushed_as_one(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psframe.models.cuda.kernels.INTERVAL", 3)
    model = MLP((6,), 3, hidden=(5,))
    model.precision = "float16"
    params, x, y = given(model, 4)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    out = {key: cupy.empty_like(p) for key, p in there.items()}
    y, x = cupy.asarray(y), cupy.asarray(x)

    def step() -> bool:
        model.loss_and_gradients(there, x, y, out=out)
        return all(bool(np.isfinite(cupy.asnumpy(g)).all()) for g in out.values())

    assert step()
    assert state(model) == [2.0**15, 2.0**-15, 1.0]
    finite = cupy.asnumpy(out["w1"])
    there["w2"].view(np.ndarray)[...] *= 1000.0  # the gradient before it is too large for float16
    for halvings in (1, 2):
        assert not step()
        assert state(model) == [2.0 ** (15 - halvings), 2.0 ** (halvings - 15), 0.0]
    there["w2"].view(np.ndarray)[...] /= 1000.0
    for finite_steps in (1.0, 2.0, 0.0):  # and after INTERVAL finite steps it is doubled
        assert step()
        assert state(model)[2] == finite_steps
    assert state(model)[0] == 2.0**14
    np.testing.assert_allclose(cupy.asnumpy(out["w1"]), finite, rtol=0.01, atol=1e-4)


def test_an_overflow_of_a_layer_without_kernels_halves_the_loss_scale(cupy: FakeCupy) -> None:
    model = MLP((6,), 3, hidden=(5,))
    model.precision = "float16"
    params, x, y = given(model, 4)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    out = {key: cupy.empty_like(p) for key, p in there.items()}
    model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y), out=out)
    (run,) = model._net._local.runs.values()
    for gradient, scale in ((1.0, 2.0**15), (np.inf, 2.0**14)):
        run.kernels.check(cupy.asarray(np.array([0.0, gradient], np.float32)))
        model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y), out=out)
        assert state(model)[0] == scale


def test_gradients_too_small_for_float16_are_not_lost(cupy: FakeCupy) -> None:
    model, plain = MLP((6,), 3, hidden=(5,)), MLP((6,), 3, hidden=(5,))
    model.precision = "float16"
    params, x, y = given(model, 4)
    y[:] = 0
    params["b2"][0] += 12.0  # of which it is so sure that what comes back is below 2^-24
    params["w2"] *= np.float32(3e-3)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    _, found = model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y))
    _, expected = plain.loss_and_gradients(params, x, y)
    assert 0 < np.abs(expected["w1"]).max() < 2.0**-24
    error = np.linalg.norm(cupy.asnumpy(found["w1"]) - expected["w1"])
    assert error < 0.1 * np.linalg.norm(expected["w1"])


def test_a_label_that_is_none_makes_a_push_that_is_refused(cupy: FakeCupy) -> None:
    model = MLP((6,), 3, hidden=(5,))
    params, x, y = given(model, 4)
    y[2] = 3
    there = {key: cupy.asarray(p) for key, p in params.items()}
    loss, grads = model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y))
    assert np.isnan(float(loss))
    assert np.isnan(cupy.asnumpy(grads["b2"])).all()
    cupy.stream.check()


def test_samples_labels_and_gradients_may_lie_and_be_anyhow(cupy: FakeCupy) -> None:
    model = CNN((8, 8), 5)
    params, x, y = given(model, 6)
    loss, grads = model.loss_and_gradients(params, x, y)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    out = {key: cupy.empty((*p.shape[:-1], 2 * p.shape[-1]))[..., ::2] for key, p in params.items()}
    turned = cupy.asarray(np.ascontiguousarray(x.transpose(2, 1, 0))).transpose(2, 1, 0)
    short = cupy.asarray(y.astype(np.int32))
    found, _ = model.loss_and_gradients(there, turned, short, out=out)
    assert float(found) == pytest.approx(loss)
    for key, g in grads.items():
        np.testing.assert_allclose(cupy.asnumpy(out[key]), g, rtol=1e-3, atol=1e-5, err_msg=key)
    cupy.stream.check()


def test_a_long_evaluation_is_cut_into_blocks(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psframe.models.cuda.net._EVALUATED_AT_ONCE", 4)
    model = CNN((8, 8), 5)
    params, x, y = given(model, 10)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    sums = model.evaluate(there, cupy.asarray(x), cupy.asarray(y))
    assert sums == pytest.approx(model.evaluate(params, x, y))
    labels = cupy.asnumpy(model.predict(there, cupy.asarray(x)))
    np.testing.assert_array_equal(labels, model.predict(params, x))


@pytest.mark.parametrize(
    ("capability", "precision"), [("75", "tf32"), ("75", "bfloat16"), ("61", "float16")]
)
def test_a_gpu_without_that_arithmetic_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: str, precision: str
) -> None:
    cupy = install(monkeypatch, capability)
    model = Softmax((6,), 3)
    model.precision = precision
    params, x, y = given(model, 2)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    with pytest.raises(ArgumentError, match=f"'{precision}' needs a GPU of compute capability"):
        model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y))


@pytest.mark.parametrize("model", [Softmax((6,), 3), CNN((8, 8), 3)], ids=["mlp", "cnn"])
def test_the_host_computes_in_float32_only(model: Any) -> None:
    params, x, y = given(model, 2)
    model.precision = "bfloat16"
    for ask in (
        lambda: model.loss_and_gradients(params, x, y),
        lambda: model.evaluate(params, x, y),
        lambda: model.predict(params, x),
    ):
        with pytest.raises(ArgumentError, match="'bfloat16' needs a GPU; on the CPU"):
            ask()


def test_halves_need_float32_parameters(cupy: FakeCupy) -> None:
    model = Softmax((6,), 3)
    model.precision = "float16"
    params, x, y = given(model, 2)
    there = {key: cupy.asarray(p.astype(np.float64)) for key, p in params.items()}
    with pytest.raises(ArgumentError, match="'float16' needs float32 parameters"):
        model.loss_and_gradients(there, cupy.asarray(x), cupy.asarray(y))
