"""Try modes on a cluster that one does not have: 32 workers, one of them ten times slower.

    python examples/simulate.py

The same `work` function would run under mpirun. Here time is virtual: `compute_time_s` says how
long each gradient takes, `Network` how long messages take, and the same seed gives the same run.
"""

import numpy as np

import psframe

WORKERS = 32
rng = np.random.default_rng(1)
x = rng.normal(size=(6400, 20))
truth = rng.normal(size=20)
y = x @ truth + 0.1 * rng.normal(size=6400)


def work(worker: psframe.Worker) -> None:
    """Least squares, on leased samples."""
    params = worker.pull()
    for rows in worker.leases(len(x), 10, epochs=2):
        error = x[rows] @ params["w"] - y[rows]
        params = worker.push_pull({"w": x[rows].T @ error / len(rows)})


def compute_time_s(rng: np.random.Generator, worker: int, clock: int) -> float:
    """Give 10 ms on average, exponentially distributed; worker 0 is ten times slower."""
    return rng.exponential(0.010) * (10 if worker == 0 else 1)


def main() -> None:
    """Simulate each mode over the same samples and print what it cost and brought."""
    modes = [
        # The mean of 32 gradients bears a larger rate than 32 gradients one after the other.
        (psframe.BSP(), 0.5),
        (psframe.BSP(backup=1), 0.5),
        (psframe.SSP(staleness=4), 0.02),
        (psframe.Async(), 0.02),
    ]
    print(f"{'mode':<18}{'time_s':>8}{'updates':>9}{'staleness':>11}{'|w - truth|':>13}")
    for mode, lr in modes:
        result = psframe.simulate(
            work,
            {"w": np.zeros(20)},
            optimizer=psframe.optim.SGD(lr=lr),
            mode=mode,
            workers=WORKERS,
            compute_time_s=compute_time_s,
            network=psframe.Network(latency_s=50e-6, bandwidth_bytes_per_s=1e9),
            seed=0,
        )
        assert result.params is not None
        staleness = result.trace["staleness"].mean()
        away = np.linalg.norm(result.params["w"] - truth)
        print(f"{mode!r:<18}{result.time_s:8.2f}{result.version:9d}{staleness:11.1f}{away:13.4f}")


if __name__ == "__main__":
    main()
