"""A training for `faults.driver` to start under mpirun: job.py FOLDER [flags of psframe.train].

Each rank leaves FOLDER/pid-RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))
(FOLDER / f"pid-{RANK}.new").write_text(str(os.getpid()), encoding="ascii")
(FOLDER / f"pid-{RANK}.new").rename(FOLDER / f"pid-{RANK}")

from psframe.train import main  # noqa: E402

sys.exit(main(["--run-dir", str(FOLDER / "run"), "--show", "none", *sys.argv[2:]]))
