"""Under compute-sanitizer each array has an allocation of its own: a pool would hide overruns."""

import os


def pytest_sessionstart() -> None:
    """Take CuPy's pool away, if the tests run under compute-sanitizer."""
    if os.environ.get("PSFRAME_TEST_NO_POOL"):
        import cupy

        cupy.cuda.set_allocator(None)
