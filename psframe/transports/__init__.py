"""How bytes move: threads in one process, the simulator, MPI, and shared memory beside it."""
