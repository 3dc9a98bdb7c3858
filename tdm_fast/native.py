"""The two native op libraries: where they are, loading them, and why one is not there."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
LIBRARIES = {"cpp": "cpu", "cuda": "cuda"}
BUILD_COMMANDS = {
    backend: f"TDM_FAST_BUILD={library} pip install --force-reinstall --no-deps ."
    for backend, library in LIBRARIES.items()
}


def library_path(backend: str) -> Path:
    """The file of the op library for `backend` ("cpp" or "cuda"), whether it exists or not."""
    return _PACKAGE / f"_C_{LIBRARIES[backend]}.so"


@functools.cache
def load_library(backend: str) -> str | None:
    """Load the op library of `backend` ("cpp" or "cuda") once; returns None, or why it cannot be had.

    Its ops are then `torch.ops.tdm_fast_cpu.*` or `torch.ops.tdm_fast_cuda.*`.
    """
    path = library_path(backend)
    if not path.is_file():
        return f"{path.name} was not built ({build_status(LIBRARIES[backend])})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's own text names the file only; what the loader said is the cause.
        return f"{path.name} does not load under torch {torch.__version__}: {error.__cause__ or error}"
    return None


def build_status(name: str) -> str:
    """What the build said about `name` ("cpu", "cuda" or "build_info"): "built", or why it was left out."""
    record = _PACKAGE / "_build.json"
    if not record.is_file():
        return "no build was run here: a source tree, not an installation"
    return str(json.loads(record.read_text()).get(name, "the build did not mention it"))


def build_info() -> dict[str, str] | None:
    """Compilers, flags, instruction sets and CUDA architectures of the native build; None without that module."""
    try:
        module = importlib.import_module("tdm_fast._build_info")
    except ImportError:
        return None
    return dict(module.build_info())
