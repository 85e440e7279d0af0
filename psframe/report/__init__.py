"""What a run did, as figures and a page to read: `python -m psframe.report RUN_DIR`."""

from psframe.report.making import make_report

__all__ = ["make_report"]
