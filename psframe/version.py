"""Which psframe this is."""

from __future__ import annotations

__all__ = ["installed_version"]


def installed_version() -> str:
    """Tell the version that is installed."""
    # Here, because it takes longer to import than most that a run needs.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("psframe")
    except PackageNotFoundError:
        return "of a checkout that is not installed"
