"""What a worker promises, with virtual time for a clock: nothing here sleeps or races.

Unless a test says otherwise a message takes no time, and neither does a computation.
"""

import gc
import weakref

import numpy as np
import pytest

import psframe
from psframe import BSP, SSP, Async, Network, Stopped, WaitTimeout
from psframe.client import Worker
from psframe.devices import HostDevice
from psframe.errors import MessageError
from psframe.events import Answer, Evaluated, Logged, Push
from psframe.layout import Layout

NAN = float("nan")


def start_params(dtype=np.float64):
    return {"w": np.arange(6, dtype=dtype).reshape(2, 3), "b": np.ones(40, dtype)}


def ones(worker_or_params=None, dtype=np.float64):
    return {"w": np.ones((2, 3), dtype), "b": np.ones(40, dtype)}


def play(*works, params=None, time=lambda rng, worker, clock: 0.0, lr=1.0, **options):
    """Simulate one worker for each `work`; what fails in one fails here."""
    options.setdefault("optimizer", psframe.optim.SGD(lr=lr))
    return psframe.simulate(
        lambda worker: works[worker.index](worker),
        start_params() if params is None else params,
        workers=len(works),
        compute_time_s=time,
        **options,
    )


SERVERS = pytest.mark.parametrize("servers", [1, 2, 3])


# ---- parameters --------------------------------------------------------------------------


@SERVERS
def test_params_are_a_mapping_of_what_was_given(servers):
    def work(worker):
        params = worker.pull()
        assert list(params) == ["w", "b"]
        assert len(params) == 2
        assert "w" in params
        assert "x" not in params
        with pytest.raises(KeyError):
            params["x"]
        for name, value in start_params().items():
            np.testing.assert_array_equal(params[name], value)
            assert params[name].dtype == value.dtype
        assert params.version == 0
        assert params.versions == (0,) * servers
        assert params.receipt is None

    play(work, servers=servers)


@SERVERS
def test_params_cannot_be_written_and_their_copies_can(servers):
    def work(worker):
        params = worker.pull()
        copy = params.copy()
        for name in params:
            with pytest.raises(ValueError, match="read-only"):
                params[name][...] = 7.0
            with pytest.raises(TypeError):
                params[name] = copy[name]
            copy[name][...] = 7.0
        again = worker.pull()
        for name, value in start_params().items():
            np.testing.assert_array_equal(again[name], value)
            assert (copy[name] == 7.0).all()
        copy.clear()  # the copy is a dict of the caller's own
        assert len(worker.pull()) == 2

    play(work, servers=servers)


@SERVERS
def test_params_stay_as_they_are_until_the_next_pull(servers):
    """Others update ten times, and so does the worker itself; only its next pull shows it."""

    def slow(worker):
        params = worker.pull()
        before = params.copy()
        receipt = worker.push(ones()).wait()  # computed for 100 seconds
        assert receipt.staleness == 10
        worker.push(ones()).wait()
        for name in params:
            np.testing.assert_array_equal(params[name], before[name])
        assert params.version == 0
        after = worker.pull()
        assert after.versions == (12,) * servers
        for name in after:
            np.testing.assert_array_equal(after[name], before[name] - 12.0)

    def fast(worker):
        worker.pull()
        for step in range(10):
            assert worker.push_pull(ones()).version == step + 1

    times = [100.0, 1.0]
    play(slow, fast, servers=servers, time=lambda rng, worker, clock: times[worker])


@SERVERS
def test_a_worker_sees_its_own_pushes(servers):
    def work(worker):
        worker.pull()
        worker.push(ones())
        worker.push(ones())
        params = worker.pull()
        assert params.versions == (2,) * servers
        np.testing.assert_array_equal(params["b"], np.full(40, -1.0))
        params = worker.push_pull(ones())
        assert params.versions == (3,) * servers
        assert params.receipt == psframe.Receipt(True, 3, 0, "")

    play(work, servers=servers, network=Network(latency_s=1.0))


def test_a_push_before_any_pull_counts_as_computed_on_version_0():
    def work(worker):
        assert worker.push(ones()).wait() == psframe.Receipt(True, 1, 0, "")
        assert worker.push(ones()).wait() == psframe.Receipt(True, 2, 1, "")

    assert play(work).staleness.tolist() == [1, 1]


# ---- pulls in advance --------------------------------------------------------------------


@SERVERS
def test_a_pull_in_advance_leaves_the_present_params_alone(servers):
    def work(worker):
        params = worker.pull()
        before = params.copy()
        ahead = worker.pull_async()
        worker.push(ones()).wait()  # after the pull, so that the pull does not see it
        for name in params:
            np.testing.assert_array_equal(params[name], before[name])
        assert ahead.done
        arrived = ahead.wait()
        assert arrived.versions == (0,) * servers
        assert ahead.wait() is arrived
        assert worker.push(ones()).wait().staleness == 1  # the present params are version 0 still
        second = worker.pull_async()
        for name in arrived:
            np.testing.assert_array_equal(arrived[name], before[name])
        assert second.wait().versions == (2,) * servers
        np.testing.assert_array_equal(second.wait()["b"], np.full(40, -1.0))

    play(work, servers=servers, network=Network(latency_s=1.0))


def test_gradients_count_as_computed_on_the_params_that_were_waited_for():
    def work(worker):
        worker.pull()
        worker.push(ones()).wait()
        ahead = worker.pull_async()
        assert worker.push(ones()).wait().staleness == 1
        assert ahead.wait().version == 1
        assert worker.push(ones()).wait().staleness == 1
        assert worker.pull().version == 3

    play(work)


def test_only_one_pull_is_ahead():
    """Another one is the same; a pull or push_pull waits for it first."""

    def work(worker):
        first = worker.pull_async()
        assert worker.pull_async() is first
        assert not first.done
        assert worker.pull().version == 0
        assert first.done
        third = worker.pull_async()
        assert worker.push_pull(ones()).version == 1
        assert third.done
        assert third.wait().version == 0
        assert worker.pull_async() is not third

    play(work, network=Network(latency_s=1.0))


def test_what_belongs_to_an_evaluation_only():
    def work(worker):
        for task in worker.tasks(2, 1, evaluate=(1, 1)):
            if task.kind == "train":
                with pytest.raises(ValueError, match="this one is to train"):
                    task.params()
                with pytest.raises(ValueError, match="this one is to train"):
                    task.report(loss=1.0)
            else:
                task.params()
                task.report(loss=1.0)
                with pytest.raises(ValueError, match="this evaluation is over"):
                    task.report(loss=1.0)
                with pytest.raises(ValueError, match="this evaluation is over"):
                    task.params()

    play(work)


def test_a_pull_in_advance_may_take_too_long():
    def work(worker):
        ahead = worker.pull_async()
        with pytest.raises(WaitTimeout):
            ahead.wait(timeout_s=1.5)
        assert ahead.wait(timeout_s=1.0).version == 0

    play(work, network=Network(latency_s=1.0))


# ---- pushes ------------------------------------------------------------------------------


@SERVERS
def test_a_gradient_may_be_reused_at_once(servers):
    def work(worker):
        worker.pull()
        grads = ones()
        for value in (1.0, 2.0, 4.0):
            for grad in grads.values():
                grad[...] = value
            worker.push(grads)
            for grad in grads.values():
                grad[...] = NAN

    result = play(work, servers=servers, network=Network(latency_s=1.0))
    np.testing.assert_array_equal(result.params["b"], np.full(40, 1.0 - 7.0))
    np.testing.assert_array_equal(result.params["w"], start_params()["w"] - 7.0)


def test_two_pushes_are_under_way_and_no_more():
    def work(worker):
        worker.pull()  # answered at 2
        pending = [worker.push(ones()) for _ in range(3)]  # the third waits until 4
        assert [p.done for p in pending] == [True, False, False]
        assert [p.wait().version for p in pending] == [1, 2, 3]

    trace = play(work, network=Network(latency_s=1.0)).trace
    assert trace["time_s"].tolist() == [3.0, 3.0, 5.0]


def test_what_was_pushed_before_the_end_of_work_is_applied():
    def work(worker):
        worker.push(ones())
        worker.push(ones())

    assert play(work, network=Network(latency_s=1.0)).version == 2


def test_waiting_may_take_too_long_and_the_push_stays_valid():
    def work(worker):
        worker.pull()
        pending = worker.push(ones())
        with pytest.raises(WaitTimeout, match="worker 0: no answer to request 1 within 0 s"):
            pending.wait(timeout_s=0)
        with pytest.raises(WaitTimeout):
            pending.wait(timeout_s=1.5)
        with pytest.raises(TimeoutError):  # an ordinary one, to those who do not know psframe
            pending.wait(0.25)
        assert not pending.done
        assert pending.wait(timeout_s=0.5).applied
        assert pending.done
        assert pending.wait(timeout_s=0) == pending.wait() == psframe.Receipt(True, 1, 0, "")

    result = play(work, network=Network(latency_s=1.0))
    assert result.version == 1


@pytest.mark.parametrize("workers", [1, 5])
def test_a_loop_over_done_comes_to_its_end_in_virtual_time_too(workers):
    def work(worker):
        worker.pull()
        pending = worker.push(ones())
        looks = 0
        while not pending.done:
            looks += 1
            assert looks < 100_000
        assert pending.wait(timeout_s=0).applied

    assert play(*[work] * workers, network=Network(latency_s=1.0)).time_s == 5.0


def test_receipts_tell_version_and_staleness():
    seen = []

    def work(worker):
        worker.pull()
        for _ in range(2):
            seen.append((worker.index, worker.push(ones()).wait()))
            worker.pull()

    result = play(work, work, time=lambda rng, worker, clock: 1.0)
    assert seen == [
        (0, psframe.Receipt(True, 1, 0, "")),
        (1, psframe.Receipt(True, 2, 1, "")),
        (0, psframe.Receipt(True, 3, 1, "")),
        (1, psframe.Receipt(True, 4, 1, "")),
    ]
    assert result.staleness.tolist() == [1, 3]


# ---- gradients in place ------------------------------------------------------------------


@SERVERS
def test_gradients_are_pushed_as_they_are(servers):
    def work(worker):
        worker.pull()
        for value in (1.0, 2.0, 4.0):
            grads = worker.gradients()
            assert list(grads) == ["w", "b"]
            assert grads["w"].shape == (2, 3)
            assert grads["w"].dtype == np.float64
            grads["w"][...] = value
            grads["b"].fill(value)
            worker.push(None)
        params = worker.pull()
        np.testing.assert_array_equal(params["b"], np.full(40, 1.0 - 7.0))
        np.testing.assert_array_equal(params["w"], start_params()["w"] - 7.0)
        worker.gradients()["w"][...] = 0.0
        worker.gradients()["b"][...] = 1.0  # the same arrays until they are pushed
        params = worker.push_pull(None)
        np.testing.assert_array_equal(params["b"], np.full(40, -7.0))

    play(work, servers=servers, network=Network(latency_s=1.0))


def test_gradients_must_be_written_into():
    """A new array under the name would be pushed by nobody: that is an error, not a surprise."""

    def work(worker):
        with pytest.raises(TypeError):
            worker.gradients()["w"] = np.ones((2, 3))

    play(work)


def test_gradients_wait_for_a_free_slot():
    def work(worker):
        worker.pull()
        pending = [worker.push(ones()), worker.push(ones())]
        assert not pending[0].done
        worker.gradients()
        assert pending[0].done

    play(work, network=Network(latency_s=1.0))


def test_push_none_needs_gradients():
    def work(worker):
        with pytest.raises(ValueError, match=r"push from worker 0: .*gradients"):
            worker.push(None)
        for grad in worker.gradients().values():
            grad[...] = 1.0
        worker.push(ones())  # a mind changed: these count, the others are forgotten
        with pytest.raises(ValueError, match="gradients"):
            worker.push_pull(None)
        for grad in worker.gradients().values():
            grad[...] = 2.0  # what they held before is undefined
        worker.push(worker.gradients())  # into themselves
        assert worker.pull().version == 2

    assert play(work).ledger.received == 2


# ---- what cannot be pushed ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("grads", "error"),
    [
        ({}, ValueError),
        ({"w": np.zeros((2, 3))}, ValueError),
        ({**ones(), "x": np.zeros(1)}, ValueError),
        ({"w": np.zeros((2, 3)), "c": np.zeros(40)}, ValueError),
        ({**ones(), "w": np.zeros((3, 2))}, ValueError),
        ({**ones(), "w": np.zeros(6)}, ValueError),
        ({**ones(), "w": np.zeros((2, 3), int)}, TypeError),
        ({**ones(), "w": np.zeros((2, 3), complex)}, TypeError),
        ({**ones(), "w": np.zeros((2, 3), bool)}, TypeError),
        ({**ones(), "w": [[0.0] * 3] * 2}, TypeError),
        ([np.zeros((2, 3)), np.zeros(40)], TypeError),
        (np.zeros(46), TypeError),
    ],
)
def test_a_wrong_gradient_is_an_error_at_the_call_and_nothing_is_sent(grads, error):
    def work(worker):
        worker.pull()
        for push in (worker.push, worker.push_pull):
            with pytest.raises(error, match="push from worker 0: "):
                push(grads)
        assert worker.push(ones()).wait() == psframe.Receipt(True, 1, 0, "")

    result = play(work, servers=2)
    assert result.ledger.received == 1
    assert len(result.trace) == 1


@SERVERS
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
@pytest.mark.parametrize("own", [np.float32, np.float64])
def test_floating_point_gradients_are_cast(own, dtype, servers):
    grads = {name: (value / 3).astype(dtype) for name, value in ones().items()}

    def work(worker):
        worker.pull()
        worker.push_pull(grads)

    result = play(work, params=start_params(own), servers=servers)
    for name, value in start_params(own).items():
        assert result.params[name].dtype == own
        np.testing.assert_array_equal(result.params[name], value - grads[name].astype(own))


def test_gradients_of_any_strides():
    w = np.arange(24.0).reshape(4, 6)

    def work(worker):
        worker.pull()
        for grad in (w[::2, ::2], np.asfortranarray(w[:2, :3]), w[:2, 3::-1][:, :3], w.T[3:5, :3]):
            before = worker.pull().copy()
            after = worker.push_pull({"w": grad, "b": np.broadcast_to(0.5, 40)})
            np.testing.assert_array_equal(after["w"], before["w"] - grad)
            np.testing.assert_array_equal(after["b"], before["b"] - 0.5)

    play(work)


@SERVERS
@pytest.mark.parametrize("bad", [NAN, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_a_receipt(bad, servers):
    def work(worker):
        worker.pull()
        grads = ones()
        grads["b"][39] = bad  # in the last shard, whatever their number
        refused = psframe.Receipt(False, 0, 0, "non-finite gradient")
        assert worker.push(grads).wait() == refused
        params = worker.push_pull(grads)
        assert params.receipt == refused
        assert params.versions == (0,) * servers
        for array in worker.gradients().values():
            array[...] = bad
        assert worker.push(None).wait() == refused
        assert worker.push(ones()).wait() == psframe.Receipt(True, 1, 0, "")

    result = play(work, servers=servers)
    assert result.trace["clock"].tolist() == [0, 1, 2, 3]  # a refused push is a step too
    assert result.trace["applied"].tolist() == [False, False, False, True]
    assert dict(result.ledger.reasons) == {"non-finite gradient": 3}


def test_a_cast_that_overflows_is_refused():
    def work(worker):
        worker.pull()
        grads = {**ones(), "w": np.full((2, 3), 1e39)}
        assert worker.push(grads).wait().reason == "non-finite gradient"

    assert play(work, params=start_params(np.float32)).version == 0


def test_large_gradients_are_not_refused():
    """Their squares overflow float64, and so would their sum."""

    def work(worker):
        worker.pull()
        params = worker.push_pull({**ones(), "w": np.full((2, 3), 1e200)})
        assert params.receipt.applied
        assert (params["w"] == -1e200).all()

    play(work)


def test_an_update_that_is_not_finite_is_refused():
    def work(worker):
        worker.pull()
        params = worker.push_pull({**ones(), "w": np.full((2, 3), 1e308)})
        assert params.receipt == psframe.Receipt(False, 0, 0, "non-finite update")
        np.testing.assert_array_equal(params["b"], np.ones(40))

    assert play(work, lr=10.0).version == 0


# ---- the end -----------------------------------------------------------------------------


def everything(worker):
    """Each call that must raise once the run is over."""
    return [
        worker.pull,
        worker.pull_async,
        worker.gradients,
        lambda: worker.push(ones()),
        lambda: worker.push_pull(ones()),
        lambda: next(worker.leases(10, 2)),
        lambda: next(worker.tasks(10, 2)),
    ]


@SERVERS
def test_after_stop_every_call_says_so_and_pushes_are_drained(servers):
    def work(worker):
        worker.pull()
        pending = [worker.push(ones()), worker.push(ones())]
        worker.stop()
        worker.stop()
        for call in everything(worker):
            with pytest.raises(Stopped):
                call()
        assert [p.wait().version for p in pending] == [1, 2]
        worker.log(loss=1.0)

    result = play(work, servers=servers, network=Network(latency_s=1.0))
    assert result.version == 2
    assert result.ledger.received == result.ledger.applied == 2


@SERVERS
def test_a_push_after_the_end_is_receipted_as_stopped(servers):
    def first(worker):
        worker.pull()
        worker.push(ones())

    def second(worker):
        worker.pull()
        pending = [worker.push(ones()), worker.push(ones())]
        for p in pending:
            receipt = p.wait()
            assert not receipt.applied
            assert receipt.reason == "stopped"
            assert p.done
            assert p.wait(timeout_s=0) == receipt
        for call in everything(worker):
            with pytest.raises(Stopped):
                call()

    times = [1.0, 2.0]
    result = play(
        first, second, servers=servers, max_updates=1, time=lambda rng, worker, clock: times[worker]
    )
    assert result.version == 1
    assert result.ledger.stopped == 2
    assert result.time_s == 1.0


@pytest.mark.parametrize("mode", [Async(), SSP(staleness=1), BSP(), BSP(backup=1)])
def test_stopped_is_absorbed_from_whatever_waits(mode):
    def work(worker):
        worker.pull()
        while True:
            worker.push_pull(ones())

    def stopper(worker):
        worker.pull()
        for _ in range(5):
            worker.push_pull(ones())
        worker.stop()

    result = play(work, stopper, work, mode=mode, time=lambda rng, w, c: 1.0 + rng.random())
    assert result.version >= 3


def test_a_pull_in_advance_may_end_stopped():
    def work(worker):
        worker.pull()
        worker.push(ones())
        ahead = worker.pull_async()
        with pytest.raises(Stopped):
            ahead.wait()
        with pytest.raises(Stopped):
            ahead.wait()

    play(work, max_updates=1)


def test_what_work_raises_comes_out():
    def work(worker):
        worker.pull()
        raise ZeroDivisionError("mine")

    def endless(worker):
        while True:
            worker.push_pull(ones())

    with pytest.raises(ZeroDivisionError, match="mine"):
        play(endless, work, time=lambda rng, worker, clock: 1.0)


# ---- the worker itself -------------------------------------------------------------------


def test_attributes():
    def work(worker):
        assert worker.count == 3
        assert worker.xp is np
        assert worker.device == "cpu"
        seen.append(worker.index)

    seen: list[int] = []
    play(work, work, work)
    assert seen == [0, 1, 2]


def draws(workers, seed, **options):
    drawn = {}

    def work(worker):
        drawn[worker.index] = [int(n) for n in worker.rng.integers(0, 2**60, 4)]
        worker.pull()
        worker.push_pull(ones())
        drawn[worker.index].append(int(worker.rng.integers(0, 2**60)))

    play(*[work] * workers, seed=seed, **options)
    return drawn


def test_rng_is_a_function_of_seed_and_index():
    three = draws(3, 7)
    assert draws(3, 7) == three
    assert draws(2, 7) == {i: three[i] for i in range(2)}
    by_time = draws(3, 7, time=lambda rng, worker, clock: rng.random(), servers=2, mode=BSP())
    assert by_time == three
    other = draws(3, 8)
    every = [tuple(d) for d in (*three.values(), *other.values())]
    assert len(set(every)) == 6


def test_rng_is_not_the_generator_of_compute_times():
    times = []

    def time(rng, worker, clock):
        times.append(int(rng.integers(0, 2**60)))
        return 0.0

    drawn = draws(1, 7, time=time)
    assert not set(times) & set(drawn[0])


# ---- log ---------------------------------------------------------------------------------


def logged(*works, **options):
    events = []
    play(*works, observer=events.append, **options)
    return [event for event in events if isinstance(event, Logged)]


def test_log_sums_what_it_is_given():
    def work(worker):
        worker.log(loss=1.0, accuracy=np.float32(0.5))
        worker.log(loss=2)
        worker.log(loss=np.array(4.0))

    (event,) = logged(work)
    assert event.worker == 0
    assert event.sums == {"loss": (7.0, 3), "accuracy": (0.5, 1)}


def test_log_is_sent_now_and_then():
    def work(worker):
        for _ in range(200):
            worker.log(loss=1.0)
        for _ in worker.leases(4, 2):
            worker.log(loss=10.0)

    events = logged(work)
    assert [event.sums["loss"] for event in events[:3]] == [(64.0, 64)] * 3
    assert sum(event.sums["loss"][0] for event in events) == 220.0
    assert sum(event.sums["loss"][1] for event in events) == 202
    assert len(events) == 6  # and at each lease, where there is something


@pytest.mark.parametrize("value", [None, "high", "1.0", b"1", 1j, [1.0]])
def test_log_takes_numbers(value):
    def work(worker):
        with pytest.raises(TypeError, match=r"loss: expected a real number, got "):
            worker.log(loss=value)
        worker.log()

    assert logged(work) == []


# ---- leases ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0, 1), ValueError, "n_samples: expected at least 1, got 0"),
        ((10, 0), ValueError, "batch_size: expected at least 1, got 0"),
        ((-1, 1), ValueError, "n_samples"),
        ((10.0, 1), TypeError, "n_samples: expected an integer, got 10.0"),
        ((10, True), TypeError, "batch_size: expected an integer, got True"),
        (("10", 1), TypeError, "n_samples"),
        ((10, None), TypeError, "batch_size"),
    ],
)
def test_lease_arguments_are_checked_at_the_call(arguments, error, says):
    def work(worker):
        with pytest.raises(error, match=f"leases: {says}"):
            worker.leases(*arguments)

    play(work)


@pytest.mark.parametrize(
    ("epochs", "error"), [(-1, ValueError), (1.0, TypeError), (False, TypeError)]
)
def test_lease_epochs_are_checked_at_the_call(epochs, error):
    def work(worker):
        with pytest.raises(error, match="leases: epochs"):
            worker.leases(10, 1, epochs=epochs)

    play(work)


def lease_all(workers, *, calls=1, seed=0, push=True, **options):
    """All blocks that were leased: (call, first index asked for) -> tuples, in the order given."""
    shuffle = options.pop("shuffle", True)
    blocks = [[] for _ in range(calls)]

    def work(worker):
        for call in range(calls):
            for indices in worker.leases(25, 4, epochs=2, shuffle=shuffle):
                assert indices.dtype == np.int64
                assert indices.flags.writeable
                blocks[call].append(tuple(indices.tolist()))
                indices[:] = -1  # the caller's own
                if push:
                    worker.pull()
                    worker.push(ones())

    play(*[work] * workers, seed=seed, **options)
    return blocks


def test_leases_cover_each_epoch_exactly_once():
    (blocks,) = lease_all(1)
    assert [len(b) for b in blocks] == [4, 4, 4, 4, 4, 4, 1] * 2
    first, second = (sum(blocks[e : e + 7], ()) for e in (0, 7))
    assert sorted(first) == sorted(second) == list(range(25))
    assert first != second
    assert list(first) != sorted(first)


def test_leases_without_shuffling_come_in_order():
    (blocks,) = lease_all(1, shuffle=False)
    assert sum(blocks, ()) == tuple(range(25)) * 2


def test_lease_order_is_a_function_of_the_seed_alone():
    """Blocks are the same whatever the workers, servers, mode and speeds; only who gets which."""
    alone = lease_all(1, calls=2)
    assert alone[0] != alone[1]  # another call is another permutation
    for options in (
        {"workers": 3, "servers": 2},
        {"workers": 4, "mode": BSP()},
        {"workers": 2, "push": False},
        {"workers": 3, "mode": SSP(staleness=0), "time": lambda rng, w, c: rng.random()},
    ):
        many = lease_all(calls=2, **options)
        assert [sorted(blocks) for blocks in many] == [sorted(blocks) for blocks in alone]
    assert sorted(lease_all(1, calls=2, seed=1)[0]) != sorted(alone[0])


def test_no_epochs_no_leases():
    def work(worker):
        assert list(worker.leases(10, 3, epochs=0)) == []
        assert worker.pull().version == 0  # exhausted leases only end the iterator
        leases = worker.leases(10, 5)
        assert len(list(leases)) == 2
        assert list(leases) == []

    play(work)


def test_workers_must_agree_on_leases():
    def one(worker):
        next(worker.leases(10, 2))

    def other(worker):
        with pytest.raises(ValueError, match="leases of worker 1: another worker's call number 1"):
            next(worker.leases(10, 3))

    play(one, other)


def test_numpy_integers_are_integers():
    def work(worker):
        assert len(list(worker.leases(np.int32(10), np.int64(5)))) == 2

    play(work)


@SERVERS
def test_evaluations_are_of_one_snapshot_and_merged(servers):
    events, pinned = [], {}

    def work(worker):
        tasks = worker.tasks(8, 2, epochs=2, evaluate=(5, 2))
        for task in tasks:
            if task.kind == "train":
                assert len(task.indices) == 2
                worker.pull()
                worker.push(ones())
            else:
                params = task.params()
                assert params.version == 4 * (task.epoch + 1)
                assert pinned.setdefault(task.epoch, params.versions) == params.versions
                task.report(count=len(task.indices), w=float(params["w"][0, 0]))

    play(work, work, servers=servers, observer=events.append)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert evaluated == [
        Evaluated(0, 4, {"count": 5.0, "w": 3 * -4.0}),
        Evaluated(1, 8, {"count": 5.0, "w": 3 * -8.0}),
    ]


def test_a_worker_is_no_part_of_a_circle():
    """Or it would hold a run's shared memory until the collector comes."""
    workers = []

    def work(worker):
        workers.append(weakref.ref(worker))
        for task in worker.tasks(4, 2, evaluate=(1, 1), prepare=lambda task: None):
            worker.pull()
            worker.push(ones())
            task.close()
        worker.log(loss=1.0)
        worker.pull_async()

    gc.disable()
    try:
        play(work)
        assert [ref() for ref in workers] == [None]
    finally:
        gc.enable()


# ---- by hand -----------------------------------------------------------------------------


class Wire:
    """An endpoint whose other end is the test: it sees what is sent, and answers."""

    def __init__(self, layout):
        self.virtual_time = False
        self.direct = None
        self.index, self.workers, self.servers, self.in_place = 0, 1, 1, [True]
        self.sent, self.answers = [], []
        self.slots = [np.zeros(layout.size, layout.dtype) for _ in range(2)]
        self.buffers = [np.zeros(layout.size, layout.dtype) for _ in range(3)]
        self.slots_asked = []
        self.time = 0.0

    def send(self, server, message):
        self.sent.append(message)

    def receive(self, timeout_s):
        if self.answers:
            return 0, self.answers.pop(0)
        assert timeout_s is not None, "the worker would wait for ever"
        self.time += timeout_s
        return None

    def now(self):
        return self.time

    def slot(self, index):
        self.slots_asked.append(index)
        return self.slots[index]

    def progress(self, slot, *, judges):
        return None

    def snapshot(self, server, buffer):
        return self.buffers[buffer]


@pytest.fixture
def wire():
    return Wire(Layout.of(start_params()))


@pytest.fixture
def worker(wire):
    return Worker(wire, Layout.of(start_params()), HostDevice(), 0)


def test_a_wrong_gradient_sends_nothing_at_all(wire, worker):
    for grads in ({}, {**ones(), "w": np.zeros(6)}, {**ones(), "w": np.zeros((2, 3), int)}, None):
        with pytest.raises((ValueError, TypeError)):
            worker.push(grads)
    assert wire.sent == []
    assert wire.slots_asked == []


def test_the_third_push_waits_for_the_first_one_only(wire, worker):
    pending = [worker.push(ones()), worker.push(ones())]
    with pytest.raises(AssertionError, match="for ever"):
        worker.push(ones())
    assert [(m.seq, m.slot) for m in wire.sent] == [(0, 0), (1, 1)]
    wire.answers.append(Answer(0, 0, applied=True, push_version=1))
    worker.push(ones())
    assert (wire.sent[2].seq, wire.sent[2].slot) == (2, 0)
    assert [p.done for p in pending] == [True, False]


def test_gradients_are_the_slot_itself(wire, worker):
    for slot in (0, 1):
        grads = worker.gradients()
        assert all(np.shares_memory(g, wire.slots[slot]) for g in grads.values())
        for grad in grads.values():
            grad[...] = 2.0
        asked = len(wire.slots_asked)
        worker.push(None)
        assert wire.sent[-1].norm == pytest.approx(2 * 46**0.5)
        assert asked > 0
    # The transport is asked for a slot each time it is given out again: its bytes may be leaving.
    wire.answers.append(Answer(0, 0, applied=True))
    wire.slots_asked.clear()
    worker.gradients()
    assert wire.slots_asked == [0]


def test_a_push_carries_what_the_servers_must_know(wire, worker):
    wire.answers.append(Answer(0, 0, buffer=2, version=5))
    assert worker.pull().version == 5
    worker.push({**ones(), "w": np.full((2, 3), 3.0)})
    push = wire.sent[-1]
    assert push == Push(0, 1, 0, 5, True, pytest.approx(94**0.5), False, 0)
    grads = ones()
    grads["w"][0, 0] = NAN
    wire.answers.append(Answer(0, 1, applied=True))
    wire.answers.append(Answer(0, 2, buffer=0, version=6))
    worker.push_pull(grads)
    assert not wire.sent[-1].finite
    assert wire.sent[-1].want_params
    assert wire.sent[-1].release == 1  # buffer 2 is used no longer


@pytest.mark.parametrize("answer", [Answer(0, 7), Answer(1, 0)])
def test_an_answer_to_nothing_is_an_error(wire, worker, answer):
    pending = worker.push(ones())
    wire.answers.append(answer)
    with pytest.raises(MessageError, match="worker 0 got an answer"):
        pending.wait()
    with pytest.raises(MessageError, match="worker 0 got an answer"):
        pending.wait(timeout_s=1.0)
    worker.leave()
    assert wire.time == 0.0, "nothing is waited for any more"
