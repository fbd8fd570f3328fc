"""``python -m <folder of this pack>.ltx2_core.cli``."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
