#!/usr/bin/env python3
"""Reads ptxas's report on the CUDA kernels: registers of each; fails at a spill, a stack frame or a missing kernel.

    NVCC_APPEND_FLAGS=-Xptxas=-v TDM_FAST_BUILD=cuda python setup.py build_ext --build-lib build > build.log
    .ci/kernel_report.py build.log csrc/cuda/*.cu

A kernel with a stack frame keeps values of a thread in device memory, and waits for them: for kernels that run at the
memory's speed, that is the difference. The sources are named so that a log without their kernels does not pass.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>[^']+)'")
_MEMORY = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_KERNEL = re.compile(r"__global__[^;{(]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")


@dataclass
class Kernel:
    """One kernel on one architecture, as ptxas reported it; bytes and registers are per thread."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int


def read_report(text: str) -> list[Kernel]:
    """Every kernel in ptxas's output; raises ValueError for output that ends before a kernel's numbers."""
    kernels = []
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        entry, memory, registers = _ENTRY.search(part), _MEMORY.search(part), _REGISTERS.search(part)
        if entry is None or memory is None or registers is None:
            raise ValueError(f"ptxas's report is not in the form expected: {part.splitlines()[0]}")
        spills = int(memory["stores"]) + int(memory["loads"])
        kernels.append(
            Kernel(entry["name"], entry["architecture"], int(registers["registers"]), int(memory["stack"]), spills)
        )
    return kernels


def kernel_names(sources: Iterable[Path]) -> set[str]:
    """The names of the `__global__` functions that the sources define."""
    return {name for source in sources for name in _KERNEL.findall(source.read_text())}


def failures(kernels: list[Kernel], wanted: set[str]) -> list[str]:
    """What is wrong: kernels with a stack frame or spills, and those of `wanted` that an architecture lacks."""
    bad = [
        f"{demangled(kernel.name)} on {kernel.architecture}: {kernel.stack} bytes stack frame, {kernel.spills} spilled"
        for kernel in kernels
        if kernel.stack or kernel.spills
    ]
    if not kernels:
        bad.append("no kernel in the report: was it built with NVCC_APPEND_FLAGS=-Xptxas=-v?")
    for architecture in sorted({kernel.architecture for kernel in kernels}):
        names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        # A mangled name has the plain one in it, after its length.
        missing = {name for name in wanted if not any(f"{len(name)}{name}" in mangled for mangled in names)}
        bad += [f"{name} is not in the report for {architecture}" for name in sorted(missing)]
    return bad


def demangled(name: str) -> str:
    """`name` as it is written in the source, without its parameters, where c++filt is there to tell."""
    if shutil.which("c++filt") is None:
        return name
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(.*\)$", "", plain).removeprefix("void ").replace("tdm_fast::cuda::", "").replace("tdm_fast::", "")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Registers per kernel; fails at a spill or a stack frame.")
    parser.add_argument("log", type=Path, help="output of nvcc -Xptxas=-v")
    parser.add_argument("sources", type=Path, nargs="*", help="the .cu files, whose kernels must all be in the log")
    options = parser.parse_args(arguments)
    kernels = read_report(options.log.read_text())
    table: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        table.setdefault(kernel.name, {})[kernel.architecture] = kernel.registers
    for name, registers in sorted(table.items(), key=lambda item: demangled(item[0])):
        print(f"{demangled(name)}: " + ", ".join(f"{value} registers on {key}" for key, value in registers.items()))
    bad = failures(kernels, kernel_names(options.sources))
    print("\n".join(bad) or f"{len(table)} kernels, no spill, no stack frame")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
