"""`python -m taulearn` is the command `taulearn`."""

import sys

from .app.command_line import main

if __name__ == "__main__":
    sys.exit(main())
