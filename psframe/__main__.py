"""`python -m psframe` is the command `psframe`."""

import sys

from psframe.cli import main

if __name__ == "__main__":
    sys.exit(main())
