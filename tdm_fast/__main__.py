"""`python -m tdm_fast` is the command `tdm-fast`."""

import sys

from tdm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
