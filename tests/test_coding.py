"""Codecs in runs: the same bits wherever a worker is, what is counted, and what is refused."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import codecs
from psframe.codecs import Codec
from psframe.coding import PullCoder, PullDecoder, PushCoder, as_codec, as_pull_codec
from psframe.errors import MessageError
from psframe.layout import Layout
from psframe.transports.shared_memory import first_apart
from psframe.worth import Worth

PARAMS = {"w": np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30), "b": np.ones(7, "f4")}
LAYOUT = Layout.of(PARAMS)
CODECS: list[Codec] = [
    codecs.Float16(),
    codecs.BFloat16(error_feedback=False),
    codecs.TopK(0.05),
    codecs.TopK(0.05, momentum=0.5, warmup=5),
    codecs.Sign(),
    codecs.QSGD(127),
    codecs.PowerSGD(2),
]


def work(worker: psframe.Worker) -> None:
    params = worker.pull()
    for step in range(40):
        noise = worker.rng.standard_normal((20, 30)).astype(np.float32)
        grads = {"w": params["w"] + np.float32(0.01) * noise, "b": params["b"]}
        if step % 5 == 2:
            ahead = worker.pull_async()
            worker.push(grads)
            params = ahead.wait()
        else:
            params = worker.push_pull(grads)


def run(**more: Any) -> psframe.Result:
    return psframe.run(work, PARAMS, optimizer=psframe.optim.SGD(0.05), seed=1, **more)


def simulate(workers: int = 1, **more: Any) -> psframe.SimResult:
    more.setdefault("compute_time_s", lambda rng, worker, clock: rng.exponential())
    optimizer = psframe.optim.SGD(0.05)
    return psframe.simulate(work, PARAMS, optimizer=optimizer, workers=workers, seed=1, **more)


def flat(result: psframe.Result) -> bytes:
    assert result.params is not None
    return LAYOUT.flatten(result.params).tobytes()


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_threads_and_simulation_give_the_same_bits(codec: Codec, servers: int) -> None:
    for pull_codec in (None, codecs.Float16(), codecs.TopK(0.1)):
        coded = {"codec": codec, "pull_codec": pull_codec, "servers": servers}
        threads, simulated = run(**coded), simulate(**coded)
        assert flat(threads) == flat(simulated)
        assert threads.traffic == simulated.traffic


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_coded_training_learns(codec: Codec) -> None:
    """w <- w - lr (w + noise): it shrinks, whatever travels in place of the gradient."""
    plain = np.linalg.norm(np.frombuffer(flat(simulate(workers=4)), np.float32))
    coded = simulate(workers=4, codec=codec, pull_codec=codecs.Float16())
    assert np.linalg.norm(np.frombuffer(flat(coded), np.float32)) < plain + 0.5 * 14.7


def test_what_travels_is_counted() -> None:
    n, workers, pushes = LAYOUT.size, 3, 40
    plain = simulate(workers)
    assert plain.traffic == psframe.plan.Traffic()
    halves = simulate(workers, codec=codecs.Float16(), pull_codec=codecs.BFloat16())
    traffic = halves.traffic
    assert traffic.pushed_dense == workers * pushes * 4 * n == 2 * traffic.pushed
    # A worker's first parameters go as they are.
    assert traffic.pulled_dense == workers * (pushes + 1) * 4 * n
    assert traffic.pulled == workers * (4 * n + pushes * 2 * n)
    assert simulate(workers, codec=codecs.Float16(), servers=2).traffic.pushed == traffic.pushed


def test_fewer_bytes_take_less_time_on_a_slow_link() -> None:
    network = psframe.Network(0.0, 1000.0)
    times = [
        simulate(codec=codec, network=network, compute_time_s=lambda *_: 0.0).time_s
        for codec in (None, codecs.Float16(), codecs.TopK(0.01))
    ]
    assert times[0] > times[1] > times[2]


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    reasons = []

    def work(worker: psframe.Worker) -> None:
        grads = {name: np.ones_like(p) for name, p in worker.pull().items()}
        grads["w"][0, 0] = np.nan
        reasons.append(worker.push(grads).wait().reason)
        grads["w"][0, 0] = 1.0
        reasons.append(worker.push(grads).wait().reason)

    for codec, servers in itertools.product(CODECS, (1, 2)):
        reasons.clear()
        psframe.run(work, PARAMS, optimizer=psframe.optim.SGD(0.05), codec=codec, servers=servers)
        assert reasons == ["non-finite gradient", ""], codec


@pytest.mark.parametrize("codec", [codecs.Float16(), codecs.BFloat16()], ids=str)
def test_a_gradient_that_is_refused_leaves_no_residual_of_any_shard(codec: Codec) -> None:
    """What is not finite is in one shard, and what payloads have lacked in the others."""

    def work(worker: psframe.Worker) -> None:
        for step in range(6):
            grads = {name: p * np.float32(1.001) for name, p in worker.pull().items()}
            if step == 3:
                grads["w"][0, 0] = np.nan
            worker.push(grads)

    optimizer = psframe.optim.SGD(0.05)
    one, several = (
        psframe.run(work, PARAMS, optimizer=optimizer, codec=codec, servers=servers)
        for servers in (1, 3)
    )
    assert one.ledger.refused == several.ledger.refused == 1
    assert flat(one) == flat(several)


def test_what_has_been_written_in_place_is_coded_too() -> None:
    seen = []

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for name, array in worker.gradients().items():
            array[...] = params[name] * np.float32(1.001)
        worker.push(None).wait()
        seen.append({name: p.copy() for name, p in worker.pull().items()})

    codec = codecs.Float16()
    psframe.run(work, PARAMS, optimizer=psframe.optim.SGD(1.0), codec=codec)
    coded = (PARAMS["w"] * np.float32(1.001)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(seen[0]["w"], PARAMS["w"] - coded)


# ---- parameters --------------------------------------------------------------------------------


def test_a_difference_to_nothing_is_no_payload() -> None:
    codec = codecs.Float16()
    coder, decoder = (
        PullCoder(codec, LAYOUT, 0, LAYOUT.size, 5, 0, 1),
        PullDecoder(codec, LAYOUT, 0, LAYOUT.size),
    )
    params = np.ones(LAYOUT.size, np.float32)
    coder.dense(0, params)
    found = coder.encode(0, params)
    assert found is not None
    with pytest.raises(MessageError, match="before any have come"):
        decoder.decode(found[0].data, np.empty_like(params))


def test_a_worker_has_what_the_server_believes_it_has() -> None:
    rng = np.random.default_rng(0)
    for codec in (codec for codec in CODECS if not getattr(codec, "momentum", 0.0)):
        begin, end = 32, LAYOUT.size
        coder = PullCoder(codec, LAYOUT, begin, end, 5, 1, 2)
        decoder = PullDecoder(codec, LAYOUT, begin, end)
        params = rng.standard_normal(end - begin).astype(np.float32)
        out = np.empty_like(params)
        assert coder.encode(0, params) is None, "the first go as they are"
        coder.dense(0, params)
        decoder.dense(params)
        for _ in range(60):
            params += np.float32(0.01) * rng.standard_normal(end - begin).astype(np.float32)
            found = coder.encode(0, params)
            assert found is not None
            coded, mirror = found
            decoder.decode(coded.data.copy(), out)
            assert out.tobytes() == mirror.tobytes()
        for _ in range(400):  # what lacks is made up for, once they stand still
            coder.encode(0, params)
        found = coder.encode(0, params)
        assert found is not None
        assert np.abs(found[1] - params).max() < 1e-2, codec
        coder.forget(0)
        assert coder.encode(0, params) is None, "somebody else has nothing yet"


def test_differences_that_are_no_numbers_go_as_they_are() -> None:
    coder = PullCoder(codecs.Float16(), LAYOUT, 0, LAYOUT.size, 0, 0, 1)
    huge = np.full(LAYOUT.size, 3e38, np.float32)
    coder.dense(0, -huge)
    assert coder.encode(0, huge) is None


def test_an_evaluation_has_the_parameters_as_they_are() -> None:
    found = []

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for task in worker.tasks(8, 2, epochs=2, evaluate=(4, 2)):
            if task.kind == "evaluate":
                pinned = task.params()
                found.append((pinned.version, pinned["w"].copy()))
                task.report(n=1.0)
            else:
                params = worker.push_pull({name: p * 1.001 for name, p in params.items()})

    optimizer = psframe.optim.SGD(0.1)
    psframe.run(work, PARAMS, optimizer=optimizer, pull_codec=codecs.TopK(0.01))
    w, versions = PARAMS["w"], {version for version, _ in found}
    assert versions == {4, 8}
    assert all(w.shape == array.shape for _, array in found)
    first = [array for version, array in found if version == 4]
    assert all(array.tobytes() == first[0].tobytes() for array in first)


def test_delay_compensation_knows_what_a_worker_has_decoded() -> None:
    """The rule's `read` is what the worker computed on, not what the server had then."""
    read: list[Any] = []

    class Look(psframe.stale.Rule):
        needs_read = True

        def __repr__(self) -> str:
            return "Look()"

        def factor(self, push: psframe.stale.Stale) -> float:
            return 1.0

        def correction(self, *_: Any) -> Any:
            class Correction:
                def correct(self, worker: int, grad: Any, params: Any, had: Any, out: Any) -> Any:
                    read.append((worker, had.copy()))
                    return grad

                def applied(self, before: Any, after: Any) -> None: ...

                def rejected(self) -> None: ...

            return Correction()

    had: list[Any] = []

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for _ in range(6):
            had.append((worker.index, LAYOUT.flatten(params)))
            params = worker.push_pull({name: p * 0.9 for name, p in params.items()})

    optimizer = psframe.optim.SGD(0.1)
    more: dict[str, Any] = {"pull_codec": codecs.TopK(0.05), "stale": Look(), "workers": 3}
    psframe.simulate(work, PARAMS, optimizer=optimizer, compute_time_s=lambda *_: 1.0, **more)
    key = lambda pair: (pair[0], pair[1].tobytes())  # noqa: E731
    assert sorted(map(key, read)) == sorted(map(key, had))


# ---- what is refused, and told -----------------------------------------------------------------


def test_what_is_no_codec_is_named() -> None:
    for value in ("float16", codecs.Float16, 7):
        with pytest.raises(TypeError, match=r"codec: expected one of psframe\.codecs"):
            run(codec=value)
        with pytest.raises(TypeError, match=r"pull_codec: expected one of psframe\.codecs"):
            run(pull_codec=value)
    with pytest.raises(ValueError, match=r"pull_codec: .* take 23 levels or more"):
        run(pull_codec=codecs.QSGD(7))
    with pytest.raises(ValueError, match=r"pull_codec: .* parameters have no momentum"):
        run(pull_codec=codecs.TopK(0.1, momentum=0.5))
    with pytest.raises(
        ValueError, match=r"^codec: Sign: scale is 1e\+300, which is inf in float32"
    ):
        run(codec=codecs.Sign(1e300))
    assert as_codec("codec", None) is None
    assert as_pull_codec("pull_codec", codecs.QSGD(23)) == codecs.QSGD(23)


def test_a_codec_of_one_s_own_is_a_dataclass() -> None:
    """Its text is compared, and it is made anew without error feedback for parameters."""

    class Own:
        error_feedback = True

        def encoder(self, *arguments: Any) -> codecs.Encoder:
            return codecs.Float16().encoder(*arguments)

        def decoder(self, *arguments: Any) -> codecs.Decoder:
            return codecs.Float16().decoder(*arguments)

    assert isinstance(Own(), Codec)
    for name in ("codec", "pull_codec"):
        with pytest.raises(TypeError, match=rf"^{name}: .*; make Own a frozen dataclass"):
            run(**{name: Own()})


def test_averages_are_not_coded() -> None:
    optimizer = psframe.optim.Grouped(psframe.optim.SGD(0.1), {"b": psframe.optim.Average(0.9)})
    with pytest.raises(ValueError, match="parameter 'b' is an average"):
        psframe.run(work, PARAMS, optimizer=optimizer, codec=codecs.Float16())


@pytest.mark.parametrize(("seconds", "told"), [(1e-3, False), (0.1, True)])
def test_a_codec_that_does_not_pay_is_told_of_once(
    caplog: pytest.LogCaptureFixture, seconds: float, told: bool
) -> None:
    worth = Worth(codecs.Float16())
    worth.coded(1000, 1.0)  # what a link gives is not known yet
    worth.pulled(1_000_000, 1.0)
    worth.pulled(1, 1000.0)
    with caplog.at_level(logging.WARNING, "psframe.worth"):
        for _ in range(50):
            worth.coded(50_000, seconds)
    assert len(caplog.records) == told
    assert not told or "costs more time than it saves: it takes 100 ms a gradient" in caplog.text


def test_where_nothing_travels_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    worth = Worth(codecs.Float16())
    worth.pulled(0, 1e-6)
    with caplog.at_level(logging.WARNING, "psframe.worth"):
        for _ in range(50):
            worth.coded(0, 1e-9)
    assert ["only costs here" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("servers", [1, 2])
def test_in_one_process_a_codec_only_costs_and_one_worker_says_so(
    caplog: pytest.LogCaptureFixture, servers: int
) -> None:
    def many(worker: psframe.Worker) -> None:
        params = worker.pull()
        for _ in range(25):
            params = worker.push_pull(dict(params))

    optimizer = psframe.optim.SGD(0.1)
    with caplog.at_level(logging.WARNING, "psframe.worth"):
        psframe.run(
            many, PARAMS, optimizer=optimizer, codec=codecs.Float16(), workers=2, servers=servers
        )
    assert ["only costs here" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("nodes", "servers", "rank"),
    [("aaa", 1, 1), ("aabb", 1, 2), ("abab", 2, 2), ("aaab", 2, 3), ("abb", 1, 1)],
)
def test_who_weighs_a_codec(nodes: str, servers: int, rank: int) -> None:
    assert first_apart([node.encode() for node in nodes], servers) == rank


def test_the_slot_holds_what_the_payload_stands_for() -> None:
    rng = np.random.default_rng(3)
    for codec in CODECS:
        coder = PushCoder(codec, LAYOUT, 2, 1, 0, 2)
        decoders = [codec.decoder(LAYOUT, b, e) for b, e in LAYOUT.shards(2)]
        slot = rng.standard_normal(LAYOUT.size).astype(np.float32)
        for payload, decoder, (b, e) in zip(
            coder.encode(0, slot), decoders, LAYOUT.shards(2), strict=True
        ):
            out = np.empty(e - b, np.float32)
            decoder.decode(payload.data, out)
            assert out.tobytes() == slot[b:e].tobytes()
