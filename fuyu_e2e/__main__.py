"""`python -m fuyu_e2e`: the command line."""

import sys

from fuyu_e2e.cli import main

if __name__ == "__main__":
    sys.exit(main())
