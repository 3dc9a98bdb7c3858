"""`tdm-fast check`: versions, devices, and which implementation of every op runs here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import warnings

import torch

from tdm_fast import native, ops
from tdm_fast.ops import _dispatch

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "tyro", "av")


def run_check() -> int:
    """Print the report; returns 0, the exit code."""
    _print_versions()
    _print_devices()
    _print_build()
    _print_ops()
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_versions() -> None:
    print("Versions")
    print(f"  tdm-fast      {_version('tdm-fast')}  ({native.library_path('cpp').parent})")
    print(f"  python        {platform.python_version()}  ({sys.platform}, {platform.machine()})")
    for package in _PACKAGES:
        print(f"  {package:<13} {_version(package)}")
    print(f"  torch's CUDA  {torch.version.cuda or 'none: a CPU build'}")


def _print_devices() -> None:
    print("Devices")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu           {torch.get_num_threads()} threads, {capability}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"  cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if torch.cuda.device_count() == 0:
        print("  cuda          none")


def _print_build() -> None:
    print("Native build")
    for name in ("cpu", "cuda", "build_info"):
        print(f"  {name:<13} {native.build_status(name)}")
    for key, value in (native.build_info() or {}).items():
        if value:
            print(f"    {key:<19} {value}")


def _print_ops() -> None:
    """For each op what runs on each kind of tensor, and for every other backend why it does not."""
    print("Ops")
    written = _dispatch.registered()
    for op in ops.__all__:
        backends = written.get(op, ("torch",))
        print(f"  {op:<29} " + ", ".join(f"{device} tensors run {_chosen(op, device)}" for device in _device_types()))
        states: dict[str, list[str]] = {}
        for backend in _dispatch.BACKENDS:
            states.setdefault(_state(backend, backends), []).append(backend)
        for state, names in states.items():
            print(f"    {', '.join(names)}: {state}")


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _chosen(op: str, device: str) -> str:
    if op not in _dispatch.registered():
        return "torch"
    with warnings.catch_warnings():
        # The report itself says what these would.
        warnings.simplefilter("ignore")
        return _dispatch.choose(op, device)


def _state(backend: str, written: tuple[str, ...]) -> str:
    if backend not in written:
        return "not written for this op"
    available = [device for device in _device_types() if _dispatch.unavailable(backend, device) is None]
    if available:
        return f"available on {' and '.join(available)} tensors"
    reason = _dispatch.unavailable(backend, "cpu" if backend == "cpp" else "cuda")
    if reason == _dispatch.NO_CUDA_DEVICE:
        return f"unavailable: {reason}"
    return f"unavailable: {reason}; built by: {_dispatch.INSTALL_COMMANDS[backend]}"
