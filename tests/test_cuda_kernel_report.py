"""The script that reads the CUDA compiler's report, on reports that are written here."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci/kernel_report.py"

# From nvcc 13.0 with -Xptxas=-v, for two architectures; names and numbers shortened.
GOOD = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8tdm_fast4cuda11step_kernelIfEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN8tdm_fast4cuda11step_kernelIfEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 488 bytes cmem[0]
ptxas info    : Compile time = 1.770 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8tdm_fast4cuda11step_kernelIfEEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN8tdm_fast4cuda11step_kernelIfEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers
"""
SOURCE = """
template <class T>
__global__ void __launch_bounds__(threads) step_kernel(const T* sample) {}
"""


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def _main(script: dict[str, Any], folder: Path, log: str, source: str = SOURCE) -> int:
    (folder / "build.log").write_text(log)
    (folder / "step.cu").write_text(source)
    return int(script["main"]([str(folder / "build.log"), str(folder / "step.cu")]))


def test_registers_of_every_kernel_and_architecture(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(script, tmp_path, GOOD) == 0
    printed = capsys.readouterr().out
    assert "step_kernel" in printed and "40 registers on sm_80, 38 registers on sm_90" in printed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0 bytes stack frame, 0 bytes spill stores", "16 bytes stack frame, 0 bytes spill stores"),
        ("0 bytes spill stores", "4 bytes spill stores"),
        ("0 bytes spill loads", "4 bytes spill loads"),
    ],
)
def test_a_spill_on_one_architecture_fails(
    before: str, after: str, script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second report only."""
    head, tail = GOOD.split("'sm_90'")
    assert _main(script, tmp_path, head + "'sm_90'" + tail.replace(before, after)) == 1
    assert "on sm_90: " in capsys.readouterr().out


def test_a_kernel_that_is_not_in_the_report_fails(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCE + "__global__ void other_kernel(float* values) {}\n"
    assert _main(script, tmp_path, GOOD, source) == 1
    assert "other_kernel is not in the report for sm_80" in capsys.readouterr().out
    assert _main(script, tmp_path, "g++ ran\n") == 1
    assert "no kernel in the report" in capsys.readouterr().out


def test_a_report_in_another_form_is_refused(script: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not in the form expected: Compiling entry function"):
        script["read_report"](GOOD.replace("stack frame", "frame"))


def test_the_kernels_of_this_project_are_found(script: dict[str, Any]) -> None:
    names = script["kernel_names"](sorted((SCRIPT.parents[1] / "csrc/cuda").glob("*.cu*")))
    assert "ode_step_kernel" in names and len(names) >= 1
