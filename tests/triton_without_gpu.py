"""Compiles, for a GPU that need not be there, whatever kernels a function would launch."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _Device:
    """What Triton asks a driver before it compiles. One device per architecture, since kernels are kept by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(function: Callable[[], Any], architecture: int) -> list[tuple[str, Any]]:
    """`(name, compiled kernel)` of every launch in `function()`: from its real arguments, and without running any.

    Triton takes the architecture for its device from then on, so this is for a process of its own.
    """
    launched: list[tuple[str, Any]] = []
    original = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *arguments, grid=grid, warmup=True, **options)
        launched.append((self.__name__, kernel))
        return kernel

    driver.set_active(_Device(architecture))
    JITFunction.run = compile_only
    try:
        function()
    finally:
        JITFunction.run = original
    return launched


def resources(kernel: Any) -> dict[str, int]:
    """Of a compiled kernel: REG, STACK, SHARED and LOCAL; spilled registers lie on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([tool, "--dump-resource-usage", binary.name], capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
