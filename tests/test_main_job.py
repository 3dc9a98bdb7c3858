"""What the README promises of the bundled teacher and of `tdm-fast train` without arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tdm_fast.config import BUNDLED_TEACHER

MEGABYTE = 2**20
ROWS = ("real", "teacher", "teacher_few_step", "student")


def run_main_job(output: Path) -> dict:
    command = [str(Path(sys.executable).with_name("tdm-fast")), "train", "--output_dir", str(output)]
    subprocess.run(command, check=True, cwd=output.parent)
    return json.loads((output / "metrics.json").read_text())


def without_timings(metrics: dict) -> dict:
    rows = {name: {key: metrics[name][key] for key in metrics[name].keys() - {"seconds_per_video"}} for name in ROWS}
    return {**rows, "iterations": metrics["iterations"]}


def test_bundled_teacher_is_small_and_complete():
    files = [path for path in BUNDLED_TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16 * MEGABYTE
    names = {str(path.relative_to(BUNDLED_TEACHER)) for path in files}
    assert {"model_index.json", "train.yaml", "teacher_metrics.json", "training_log.jsonl"} <= names
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in files)


@pytest.mark.slow
def test_main_job_keeps_its_promises_and_repeats_itself(tmp_path):
    metrics = run_main_job(tmp_path / "first")
    student, teacher, few = (metrics[name] for name in ("student", "teacher", "teacher_few_step"))
    assert student["nfe"] == 4 and student["videos"] >= 512 and teacher["videos"] >= 512 and few["videos"] >= 512
    assert student["frechet"] <= teacher["frechet"]
    assert few["frechet"] >= 2 * student["frechet"]
    assert student["prompt_accuracy"] >= teacher["prompt_accuracy"] - 0.02
    assert metrics["peak_memory_bytes"] <= 4 * 2**30
    assert without_timings(run_main_job(tmp_path / "second")) == without_timings(metrics)
