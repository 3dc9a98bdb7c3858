"""tests/test_triton.py through Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = "test_opcheck or test_compiled"


@pytest.mark.parametrize("which", [f"not ({COMPILED})", pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_every_kernel_through_the_interpreter(which: str) -> None:
    """In a process of its own, since TRITON_INTERPRET is read when kernels are defined."""
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=short",
        "-W",
        "ignore",
        "-k",
        which,
        str(here / "test_triton.py"),
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0 and " passed" in last and "skipped" not in last, (
        done.stdout[-8000:] + done.stderr[-2000:]
    )
