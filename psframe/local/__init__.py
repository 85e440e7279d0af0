"""Many steps on a worker's own parameters between two exchanges with the servers.

`LocalSGD` and `EASGD` are used inside a `work` function, with its worker. They call nothing of it
but `pull`, `push`, `push_pull`, `gradients` and `leases`, so they run wherever a worker does, and
in every mode.
"""

from psframe.local.easgd import EASGD
from psframe.local.sgd import LocalSGD

__all__ = ["EASGD", "LocalSGD"]
