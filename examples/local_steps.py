"""Push a tenth as often: each worker makes ten steps of its own between two exchanges.

A perceptron on the digits, with local SGD and with elastic averaging. One process with three worker
threads, or a server and three workers:

    python examples/local_steps.py
    mpirun -n 4 python examples/local_steps.py
"""

import numpy as np

import psframe
from psframe.data import load, split
from psframe.models import MLP

PERIOD, BATCH, EPOCHS = 10, 20, 15
train, test = split(load("digits"))
model = MLP(train.input_shape, train.n_classes)
rule = psframe.optim.SGD(lr=0.2)


def local_sgd(worker: psframe.Worker) -> None:
    """Push what ten steps have changed; the samples of a worker that dies go to another."""
    local = psframe.local.LocalSGD(worker, rule, period=PERIOD)
    for rows in local.leases(len(train), BATCH, epochs=EPOCHS):
        _, grads = model.loss_and_gradients(local.params, *train.batch(rows))
        local.step(grads)


def elastic(worker: psframe.Worker) -> None:
    """Let the workers explore, each tied to the server's parameters."""
    easgd = psframe.local.EASGD(worker, rule, period=PERIOD)
    for rows in worker.leases(len(train), BATCH, epochs=EPOCHS):
        _, grads = model.loss_and_gradients(easgd.params, *train.batch(rows))
        easgd.step(grads)
    easgd.finish()


def main() -> None:
    """Train in both ways, and print on the rank that has the result."""
    start = model.init(np.random.default_rng(0))
    ways = {
        # Its momentum changes with every third push: once for the three workers.
        local_sgd: psframe.optim.DelayedNesterov(lr=1.0, every=3, momentum=0.5),
        elastic: psframe.local.EASGD.server_optimizer(),
    }
    steps = EPOCHS * -(-len(train) // BATCH)
    for work, optimizer in ways.items():
        result = psframe.run(work, start, optimizer=optimizer, workers=3)
        if result.params is not None:
            accuracy = (
                model.predict(result.params, test.batch(slice(None))[0]) == test.labels
            ).mean()
            print(f"{work.__name__}: {steps} steps, {result.version} updates, {accuracy:.1%}")


if __name__ == "__main__":
    main()
