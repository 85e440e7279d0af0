"""Fit a line with a `work` function: a model of one's own in ten lines of NumPy.

Each step is one leased batch; one process with three worker threads, or a server and three workers:

    python examples/work_function.py
    mpirun -n 4 python examples/work_function.py
"""

import numpy as np

import psframe

rng = np.random.default_rng(0)
x = rng.normal(size=(4000, 3)).astype(np.float32)
y = (x @ [2.0, -1.0, 0.5] + 3.0 + 0.01 * rng.normal(size=4000)).astype(np.float32)


def work(worker: psframe.Worker) -> None:
    """Compute gradients of the mean squared error on leased samples."""
    params = worker.pull()
    for rows in worker.leases(len(x), 50, epochs=5):
        error = x[rows] @ params["w"] + params["b"] - y[rows]
        grads = {"w": x[rows].T @ error / len(rows), "b": np.mean(error, keepdims=True)}
        worker.log(loss=float(np.mean(error**2)) / 2)
        params = worker.push_pull(grads)  # one round trip; returns the newest parameters


def main() -> None:
    """Train, and print on the rank that has the result."""
    start = {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}
    result = psframe.run(work, start, optimizer=psframe.optim.SGD(lr=0.1), workers=3)
    if result.params is not None:
        print(f"{result.version} updates")
        print("w =", np.round(result.params["w"], 2), " b =", np.round(result.params["b"], 2))
        print("pushes by staleness:", result.staleness.tolist())


if __name__ == "__main__":
    main()
