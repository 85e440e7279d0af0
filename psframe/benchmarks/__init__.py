"""The benchmarks of `python -m psframe.bench`, one a module."""
