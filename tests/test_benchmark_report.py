"""The benchmarks' report on a small result, their byte counts and clocks, and the command for a machine with a GPU."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import bench_cases
import bench_timing
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REPORT = runpy.run_path(str(ROOT / "benchmarks/report"))
RUN_GPU = runpy.run_path(str(ROOT / "benchmarks/run_gpu"))


def entry(
    provider: str, seconds: float, op: str = "tdm_loss", batch: int = 1, spread: float = 1.2, **info: Any
) -> dict[str, Any]:
    key = {"op": op, "mode": "forward+backward", "latents": "opensora-93x640x640", "batch": batch, "dtype": "fp32"}
    moved = 24_576_000
    speeds = {"gb_per_s": moved / seconds / 1e9, "copy_gb_per_s": 20.0, "large_copy_gb_per_s": 10.0}
    shares = {"share_of_copy": speeds["gb_per_s"] / 20, "share_of_large_copy": speeds["gb_per_s"] / 10}
    return {
        "stats": {"median": seconds, "q1": 0.9 * seconds, "q3": spread * 0.9 * seconds},
        "extra_info": {**key, "provider": provider, "bytes": moved, **speeds, **shares, **info},
    }


@pytest.fixture
def data() -> dict[str, Any]:
    """Ours faster at B = 1, slower than torch.compile at B = 8, where its float32 form is the faster one."""
    machine = {"device": "Some CPU", "device_type": "cpu", "cores": 2, "threads": 2, "torch": "2.11.0", "cuda": None}
    return {
        "machine_info": {**machine, "last_level_cache": 16 << 20, "caches": "cold"},
        "commit_info": {"id": "abc123", "dirty": False},
        "datetime": "2025-11-25T01:02:03",
        "benchmarks": [
            entry("copy", 0.0005, op="copy"),
            *(entry(name, seconds) for name, seconds in (("torch", 0.05), ("compile", 0.004), ("cpp", 0.002))),
            *(entry(name, seconds, batch=8) for name, seconds in (("torch", 0.4), ("compile", 0.03))),
            *(entry(name, seconds, batch=8) for name, seconds in (("compile-fp32", 0.01), ("cpp", 0.02))),
        ],
    }


def test_the_table_has_times_speeds_and_ratios(data: dict[str, Any]) -> None:
    text = REPORT["markdown"](data)
    assert "# Some CPU, 2 cores" in text and "torch 2.11.0, 2 threads. Commit abc123. 2025-11-25." in text
    line = next(line for line in text.splitlines() if line.startswith("| forward+backward | opensora-93x640x640 | 1 |"))
    cells = [cell.strip() for cell in line.split("|")[4:-1]]
    assert cells == ["fp32", "50 ms", "4 ms", "cpp", "2 ms", "12.3", "0.61", "1.23", "25.0", "2.00"]
    assert "| opensora-93x640x640 | 1 | fp32 | 500 µs | 49.2 |" in text
    assert "Noise: in 0 of 8 measurements" in text
    data["benchmarks"][3] = entry("cpp", 0.002, spread=1.6)
    assert "Noise: in 1 of 8 measurements" in REPORT["markdown"](data)


def test_the_table_says_where_ours_is_not_faster_than_compile(data: dict[str, Any]) -> None:
    text = REPORT["markdown"](data)
    assert "not faster than torch.compile** in 1 of 2 cases" in text
    assert "- tdm_loss, forward+backward, opensora-93x640x640, B = 8, fp32, cpp: 0.50 of compile's speed" in text
    line = next(line for line in text.splitlines() if line.startswith("| forward+backward | opensora-93x640x640 | 8 |"))
    assert "30 ms [10 ms]" in line and line.endswith("| **0.50, not faster** |")

    data["benchmarks"][-1] = entry("cpp", 0.01, batch=8)
    assert "**1.00, not faster**" in REPORT["markdown"](data)
    data["benchmarks"][-1] = entry("cpp", 0.005, batch=8)
    assert "faster than torch.compile in all 2 cases" in REPORT["markdown"](data)


def test_a_gpu_report_has_both_backends_the_launch_and_the_steps(data: dict[str, Any]) -> None:
    data["machine_info"].update(device="Some GPU", device_type="cuda", cuda="13.0")
    data["commit_info"]["dirty"] = True
    data["steps"] = [{"step": "gpu tests", "result": "out of time", "seconds": 200.0}]
    data["benchmarks"] = [
        entry("torch", 3e-4), entry("cuda", 1e-5, host_seconds=4e-5), entry("triton", 2e-5, host_seconds=5e-5),
    ]  # fmt: skip
    text = REPORT["markdown"](data)
    assert "# Some GPU\n" in text and "CUDA 13.0" in text and "abc123, with uncommitted changes" in text
    assert "- gpu tests: out of time, 200 s" in text
    assert "| cuda | 10 µs | 40 µs |" in text and "| triton | 20 µs | 50 µs |" in text
    assert "not measured beside torch.compile" in text


def test_the_command_writes_table_and_plot(data: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "some-cpu_2025-11-25.json"
    source.write_text(json.dumps(data))
    assert REPORT["main"]([str(source)]) == 0
    assert (tmp_path / "some-cpu_2025-11-25.md").read_text() == REPORT["markdown"](data)
    assert (tmp_path / "some-cpu_2025-11-25.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_the_table_and_a_word(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = tmp_path / "result.json"
    source.write_text(json.dumps(data))
    assert REPORT["main"]([str(source), "--output", str(tmp_path / "other")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["result.md"]


def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("absent.json", None), ("broken.json", "{"), ("foreign.json", '{"benchmarks": []}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        assert REPORT["main"]([str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("op", bench_cases.OPS)
def test_byte_counts_are_those_of_the_tensors(op: str) -> None:
    """Counted on the tensors themselves: inputs, latents that come back, upstream gradients and gradients."""
    for mode in bench_cases.MODES:
        case = bench_cases.Case(op, mode, "tiny", 2, "fp32", "torch")
        prepared = bench_cases.prepare(case, "cpu")
        results = prepared.run()
        tensors = [results] if isinstance(results, torch.Tensor) else list(results)
        moved = [*prepared.inputs, *prepared.upstream, *(value for value in tensors if value.ndim > 1)]
        if mode != "forward":
            outputs = bench_cases.OPS[op].plain(prepared.inputs, prepared.per_sample)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            moved += [value for value in outputs if value.ndim > 1]
        counted = sum(value.numel() * value.element_size() for value in moved)
        assert bench_cases.OPS[op].traffic.bytes(mode, 2 * 4 * 3 * 5 * 7, 4) == counted


def test_a_measurement_counts_the_call_and_not_what_is_between_calls() -> None:
    settings = bench_timing.Settings(seconds=0.05, min_rounds=3, max_rounds=5)
    timing = bench_timing.measure(lambda: time.sleep(0.02), "cpu", settings)
    assert 3 <= len(timing.rounds) <= 5 and 0.02 <= timing.median < 0.2 and timing.host is None
    assert bench_timing.last_level_cache("cpu") >= 1 << 18


def start(tmp_path: Path, seconds: float = 100) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return RUN_GPU["Run"](tmp_path, tmp_path, time.monotonic() + seconds + RUN_GPU["REPORT_SECONDS"], environment)


def test_a_step_that_hangs_or_fails_is_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path)
    monkeypatch.setitem(run.commands.__func__.__globals__, "GRACE_SECONDS", 0.5)
    assert run.commands("good", [[sys.executable, "-c", "print('well')"]], 60)
    assert not run.commands("bad", [[sys.executable, "-c", "raise SystemExit(3)"]], 60)
    began = time.monotonic()
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    run.commands("slow", [[sys.executable, "-c", stubborn]] * 2, 1)
    assert time.monotonic() - began < 20
    results = [step["result"] for step in run.steps]
    assert results[0] == "passed: well" and results[1].startswith("failed with exit code 3")
    assert results[2].startswith("out of time")


def test_no_step_begins_without_time_for_it(tmp_path: Path) -> None:
    run = start(tmp_path, seconds=5)
    assert not run.commands("late", [[sys.executable, "-c", "raise AssertionError"]], 60)
    assert run.steps[0]["result"] == "left out: no time left"


def test_parts_are_merged_with_the_commit_and_the_steps(data: dict[str, Any], tmp_path: Path) -> None:
    first, second = data, copy.deepcopy(data)
    first["benchmarks"], second["benchmarks"] = data["benchmarks"][:1], data["benchmarks"][1:]
    (tmp_path / "copy.json").write_text(json.dumps(first))
    (tmp_path / "tdm_loss.json").write_text(json.dumps(second))
    steps = [{"step": "build", "result": "passed", "seconds": 1.0}]
    merged = RUN_GPU["merge"](tmp_path, {"id": "def456", "dirty": False}, steps)
    assert [item["extra_info"]["provider"] for item in merged["benchmarks"]][:3] == ["copy", "torch", "compile"]
    assert merged["commit_info"]["id"] == "def456" and merged["steps"] == steps
    assert RUN_GPU["merge"](tmp_path / "none", {}, []) is None


def test_carried_wheels_are_unpacked_for_what_is_missing_alone(tmp_path: Path) -> None:
    folder, name = tmp_path / "wheels", "tdm_fast_carried"
    folder.mkdir()
    (folder / f"torch-{torch.__version__}-py3-none-any.whl").write_text("here already: never opened")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "answer = 42\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    run = start(tmp_path)
    RUN_GPU["carried_packages"](folder, tmp_path / "packages", run)
    assert run.commands("import", [[sys.executable, "-c", f"import {name}; print({name}.answer)"]], 60)
    assert [step["result"] for step in run.steps] == ["passed", "passed: 42"]


def test_gpu_tests_that_lack_a_module_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    for name, module in (("here", "json"), ("absent", "tdm_fast_no_such_module")):
        text = f"import {module}\nimport pytest\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    monkeypatch.setitem(RUN_GPU["gpu_tests"].__globals__, "ROOT", tmp_path)
    run = start(tmp_path)
    RUN_GPU["gpu_tests"](run)
    assert "test_absent.py: tdm_fast_no_such_module is not installed" in run.steps[0]["result"]
    assert run.steps[1]["result"].startswith("passed: 1 passed")


def test_without_a_gpu_the_command_refuses_and_names_the_dry_run(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    command = [sys.executable, "benchmarks/run_gpu", "--commit", "abc", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run" in done.stderr


def outside_of_xdist() -> dict[str, str]:
    """The environment without what tells pytest-benchmark not to measure."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """All steps of the GPU command, on the CPU: JSON with the commit, table, and every op in it."""
    command = [sys.executable, "benchmarks/run_gpu", "--dry-run", "--commit", "abc123", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside_of_xdist())
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = tmp_path.glob("*.json")
    data = json.loads(result.read_text())
    assert data["commit_info"]["id"] == "abc123" and data["machine_info"]["torch"] == torch.__version__
    assert "node" not in data["machine_info"]
    measured = {item["extra_info"]["op"] for item in data["benchmarks"]}
    assert measured == {*bench_cases.OPS, "copy", "sample_intervals"}
    table = result.with_suffix(".md").read_text()
    assert all(f"## {op}" in table for op in measured - {"copy"})


@pytest.mark.slow
def test_dry_run_of_the_step(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/run_gpu", "--dry-run", "--step", "--commit", "a", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside_of_xdist())
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = tmp_path.glob("step-dry_*.json")
    assert [row["rung"] for row in json.loads(result.read_text())["ladder"]][-1] == "shared index"
