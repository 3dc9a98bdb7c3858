"""`tdm-fast check` names every op, what runs it, and why the rest does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdm_fast import native, ops
from tdm_fast.check import run_check


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check() == 0
    report = capsys.readouterr().out
    assert f"torch         {torch.__version__.split('+')[0]}" in report
    assert "cpu           built" in report and "instruction_set" in report
    lines = report.splitlines()
    for op in ops.__all__:
        assert any(line.strip().startswith(f"{op} ") and "cpu tensors run" in line for line in lines)
    at = next(index for index, line in enumerate(lines) if line.strip().startswith("ode_step "))
    assert "cpu tensors run cpp" in lines[at]
    assert "available on cpu" in lines[at + 1]
    if not torch.cuda.is_available():
        assert lines[at + 2].strip() == "cuda, triton: unavailable: there is no CUDA device"


def test_report_without_the_library(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(native, "library_path", lambda backend: tmp_path / f"{backend}.so")
    native.load_library.cache_clear()
    try:
        assert run_check() == 0
    finally:
        monkeypatch.undo()
        native.load_library.cache_clear()
    report = capsys.readouterr().out
    assert "cpu tensors run torch" in report
    assert "cpp: unavailable: cpp.so was not built" in report and "built by: TDM_FAST_BUILD=cpu pip install" in report
    assert not recwarn.list
