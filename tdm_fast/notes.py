"""What a command says besides its results: once, and on the first of several ranks only."""

from __future__ import annotations

import os
import sys
from functools import cache


@cache
def say_once(text: str) -> None:
    """Print a note to stderr, unless this process has said it before or is not the first rank of its run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
