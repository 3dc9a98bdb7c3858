"""Which implementation of an op runs: chosen by device, forced by `backend=` or TDM_FAST_BACKEND, and reported.

An op registers its implementations here, all with one signature. "torch" is its definition and always there. On CUDA
tensors the order is cuda, triton, torch; on CPU tensors cpp, torch. An implementation that an op has, but this
installation lacks, is named in one warning, with the command that builds it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tdm_fast import native

BACKENDS = ("cpp", "cuda", "triton", "torch")
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}
ENVIRONMENT = "TDM_FAST_BACKEND"
NO_CUDA_DEVICE = "there is no CUDA device"
INSTALL_COMMANDS = {**native.BUILD_COMMANDS, "triton": "pip install triton"}

_PLAIN = (Tensor, torch.nn.Parameter)
_implementations: dict[str, Mapping[str, Callable[..., Any]]] = {}


def register(op: str, implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Make the implementations of `op` known, by backend; "torch" must be among them."""
    assert "torch" in implementations and set(implementations) <= set(BACKENDS)
    _implementations[op] = dict(implementations)


def registered() -> dict[str, tuple[str, ...]]:
    """Every op that has a choice, and the backends it is written for."""
    return {op: tuple(implementations) for op, implementations in _implementations.items()}


def check_backend(backend: str | None) -> str:
    """The backend asked for as a plain string, "" for none; ValueError for a name that is none of BACKENDS."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(BACKENDS)}, or None to choose by device")
    return backend or ""


def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type` in this process, or None if it can."""
    if backend == "torch":
        return None
    if backend == "cpp":
        return native.load_library("cpp") if device_type == "cpu" else "it runs on CPU tensors"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _triton_missing()
    if device_type != "cuda":
        return "it runs on CUDA tensors"
    if not torch.cuda.is_available():
        return NO_CUDA_DEVICE
    return native.load_library("cuda") if backend == "cuda" else _triton_missing()


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def choose(op: str, device_type: str, requested: str = "") -> str:
    """The backend that runs `op` on tensors of `device_type`.

    `requested` (from `backend=`) is taken or refused: ValueError if the op or this installation lacks it. The
    environment variable is a wish for all ops at once: where it cannot be met, one warning, and the automatic choice.
    """
    written = _implementations[op]
    if requested:
        reason = unavailable(requested, device_type) if requested in written else f"{op} is not written for it"
        if reason is not None:
            where = f"{op} on {device_type} tensors"
            raise ValueError(f"backend={requested!r} cannot run {where}: {reason}{_hint(requested)}")
        return requested
    wish = os.environ.get(ENVIRONMENT, "").strip().lower()
    if wish:
        if wish not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT} is {wish!r}; it takes one of {', '.join(BACKENDS)}, or nothing")
        reason = unavailable(wish, device_type) if wish in written else f"not written for {op}"
        if reason is None:
            return wish
        _warn_once(f"{ENVIRONMENT}={wish} cannot be met on {device_type} tensors: {reason}{_hint(wish)}")
    for backend in PREFERENCE.get(device_type, ("torch",)):
        if backend not in written:
            continue
        reason = unavailable(backend, device_type)
        if reason is None:
            return backend
        _warn_once(f"the {backend} implementations cannot be used: {reason}{_hint(backend)}")
    return "torch"


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that implements `op` on `backend`; `choose` has said that it can run."""
    return _implementations[op][backend]


def select(op: str, backend: str, *latents: Tensor) -> Callable[..., Any]:
    """The implementation of `op` that runs on `latents`; `backend` is what `check_backend` returned.

    Only the definition computes in float64; choosing it quietly is no loss of speed anyone asked for.
    """
    for tensor in latents:
        if tensor.dtype == torch.float64:
            return _implementations[op]["torch"]
    return _implementations[op][choose(op, latents[0].device.type, backend)]


def is_traced() -> bool:
    """Whether something traces or transforms all that is done now, whatever the tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def is_plain_eager(latents: Tensor) -> bool:
    """Whether nothing traces or transforms what is done to `latents`: then an op's function may be called directly."""
    return type(latents) in _PLAIN and not is_traced()


def _hint(backend: str) -> str:
    command = INSTALL_COMMANDS.get(backend)
    return f"; built by: {command}" if command else ""


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"tdm_fast: {message}", RuntimeWarning, stacklevel=4)
