"""The launcher and the MPI library must be one pair: else every rank is alone in a world of one."""

import os

import numpy as np
import pytest
from mpi4py import MPI

# Set by Open MPI's launcher, and by Hydra (MPICH), Slurm and PALS for their ranks.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def _from_launcher(variables: tuple[str, ...]) -> int:
    found = [os.environ[name] for name in variables if name in os.environ]
    if not found:
        pytest.fail(f"no launcher: none of {', '.join(variables)} is set; use tests/mpi/run")
    return int(found[0])


@pytest.mark.mpi
def test_world_has_the_size_and_rank_that_the_launcher_says() -> None:
    """With another MPI's mpirun every process is rank 0 of 1, and all else would pass in vain."""
    assert MPI.COMM_WORLD.Get_size() == _from_launcher(_SIZE_VARIABLES)
    assert MPI.COMM_WORLD.Get_rank() == _from_launcher(_RANK_VARIABLES)


@pytest.mark.mpi
def test_every_rank_takes_part() -> None:
    """Each rank contributes its own bit; the union shows that none is missing or doubled."""
    size = MPI.COMM_WORLD.Get_size()
    bits = np.zeros(size, dtype=np.int64)
    bits[MPI.COMM_WORLD.Get_rank()] = 1
    total = np.zeros_like(bits)
    MPI.COMM_WORLD.Allreduce(bits, total, op=MPI.SUM)
    np.testing.assert_array_equal(total, np.ones(size, dtype=np.int64))
