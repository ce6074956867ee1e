"""`python -m reroll`, and the console script `reroll`."""

import sys

from reroll.cli import main

if __name__ == "__main__":
    sys.exit(main())
