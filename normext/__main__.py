"""``python -m normext``: the command line."""

import sys

from normext.cli import main

if __name__ == "__main__":
    sys.exit(main())
