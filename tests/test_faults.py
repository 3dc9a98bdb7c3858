"""What can happen to a run of several ranks with sharded networks, and that it is the same run in the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import few_ranks
import pytest
import torch
from fault_jobs import Accident, Clock, Kill, Pause, Poison, Witness, start
from safetensors.torch import load_file
from test_ranks import children, torchrun
from test_ranks import start as launch
from torch import Tensor

from tdm_fast.checkpoint import load_checkpoint
from tdm_fast.files import checkpoints, latest_checkpoint

STEPS = 3
FLAGS = (
    f"--max_train_steps {STEPS} --train_batch_size 6 --num_eval_videos 0 --checkpointing_steps 1 --validation_steps 100"
    " --lr_warmup_steps 1 --learning_rate 1e-4 --report_to none --sharding full"
).split()


class Run:
    """A run's folder, and how to start it there, again and again."""

    def __init__(self, teacher: Path, folder: Path) -> None:
        self.teacher, self.output, self.jobs = teacher, folder / "run", folder / "jobs"

    def start(self, *accidents: Accident, ranks: int = 2, flags: tuple[object, ...] = ()) -> few_ranks.Job:
        arguments = ["--model", self.teacher, "--output_dir", self.output, *FLAGS, *flags]
        return start(arguments, ranks, self.next_job(), *accidents)

    def next_job(self) -> Path:
        """Where the ranks that are started next leave what they say."""
        count = len(list(self.jobs.iterdir())) if self.jobs.exists() else 0
        return self.jobs / f"{count}"

    def to_the_end(self, *accidents: Accident, ranks: int = 2, flags: tuple[object, ...] = ()) -> str:
        """Run to the end; returns what the ranks said."""
        job = self.start(*accidents, ranks=ranks, flags=flags)
        assert job.wait(200) == [0] * ranks, job.errors()
        return job.errors()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row[name] for row in self.rows() for name in ("loss_fake", "loss_student", "grad_norm")]

    def tensors(self) -> dict[str, Tensor]:
        """All that the last checkpoint has, and the student that the run has made."""
        groups, meta = load_checkpoint(latest_checkpoint(self.output))
        assert meta["step"] == self.rows()[-1]["step"]
        assert {"student", "fake", "student_optimizer", "fake_optimizer", "ema"} <= groups.keys()
        student = load_file(self.output / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        return {f"{group}/{name}": tensor for group in groups for name, tensor in groups[group].items()} | student


def assert_same_bits(run: Run, wanted: Run) -> None:
    assert run.losses() == wanted.losses()
    ours, theirs = run.tensors(), wanted.tensors()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_to_rounding(run: Run, wanted: Run) -> None:
    assert run.losses() == pytest.approx(wanted.losses(), rel=1e-5)
    ours, theirs = run.tensors(), wanted.tensors()
    assert ours.keys() == theirs.keys()
    assert [
        name for name in ours if not torch.allclose(ours[name], theirs[name], **tolerance(name, theirs[name]))
    ] == []


def tolerance(name: str, tensor: Tensor) -> dict[str, float]:
    """How far one iteration may take a tensor from another run's by rounding."""
    if "_optimizer/" in name:
        smallest = 1e-12 if name.endswith("_sq") else 1e-6
        return {"rtol": 0, "atol": 5e-4 * tensor.abs().max().item() + smallest}
    # A bias of keys has no gradient but rounding, as softmax does not see it, and Adam makes steps of its rate of that.
    return {"rtol": 0, "atol": 5e-4 if name.endswith("to_k.bias") else 1e-5}


@pytest.fixture(scope="module")
def undisturbed(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks that nothing happened to."""
    run = Run(tiny_teacher, tmp_path_factory.mktemp("undisturbed"))
    run.to_the_end()
    assert [path.name for path in checkpoints(run.output)] == ["checkpoint-2", "checkpoint-3"]
    assert len(list((run.output / "checkpoint-3").glob("*.distcp"))) == 2  # sharded: each has written its part
    return run


@pytest.fixture
def run(tiny_teacher: Path, tmp_path: Path) -> Run:
    return Run(tiny_teacher, tmp_path)


def kill(run: Run, phase: str, victim: int | None, *accidents: Accident) -> Path:
    """Start a run that is killed at its second checkpoint or after it; the last whole checkpoint that it left."""
    job = run.start(*accidents, Kill(phase, victim, run.next_job(), step=2))
    job.processes[victim or 0].join(200)
    codes = job.wait(60)
    if victim is None:
        assert codes == [-9, -9], job.errors()
    else:
        assert codes.pop(victim) == -9 and codes in ([1], [2]), job.errors()
        last = job.errors(1 - victim).strip().splitlines()[-1]
        assert re.match(r"tdm-fast: .*\b(a|another) rank has died", last), last
        assert "Traceback" not in job.errors()
    left = latest_checkpoint(run.output)
    # The save of the second, under way when a rank dies in the iteration after it, may end or not.
    assert left.name in ({"checkpoint-1", "checkpoint-2"} if phase == "training" else {"checkpoint-1"})
    assert not (run.output / "student").exists()
    return left


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("training", 1),
        pytest.param("renaming", 0, marks=SLOW),
        pytest.param("writing", None, marks=SLOW),
        pytest.param("training", None, marks=SLOW),
        pytest.param("training", 0, marks=SLOW),
        pytest.param("writing", 0, marks=SLOW),
        pytest.param("writing", 1, marks=SLOW),
        pytest.param("renaming", None, marks=SLOW),
    ],
)
def test_a_run_that_is_killed_goes_on_bit_for_bit(undisturbed: Run, run: Run, phase: str, victim: int | None) -> None:
    left = kill(run, phase, victim)
    assert f"going on from {left}\n" in run.to_the_end()
    assert_same_bits(run, undisturbed)
    assert {path.name for path in run.output.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sharding"), [(1, "none"), (2, "none"), (3, "full")])
def test_a_killed_run_goes_on_with_other_ranks(undisturbed: Run, run: Run, ranks: int, sharding: str) -> None:
    """From what two ranks in shards had saved; test_ranks.py has a fast one."""
    shutil.copytree(undisturbed.output, run.output, ignore=shutil.ignore_patterns("checkpoint-3", "student"))
    assert f"going on from {run.output}/checkpoint-2\n" in run.to_the_end(ranks=ranks, flags=("--sharding", sharding))
    assert_same_to_rounding(run, undisturbed)


SKIPS = {"fake": 0, "student": 1}
"""The iteration in which a role's gradient is poisoned."""


def assert_skipped(run: Run) -> None:
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    for role, iteration in SKIPS.items():
        assert [row[f"skipped_{role}"] for row in rows] == [int(i == iteration) for i in range(STEPS)]
    assert [row.get("samples") for row in rows] == [[0, 6], [0, 6], None]
    assert [len(row.get("prompts", ())) for row in rows] == [6, 6, 0]
    assert rows[2]["skipped_fake_in_all"] == rows[2]["skipped_student_in_all"] == 1
    assert all(tensor.isfinite().all() for tensor in run.tensors().values())


@pytest.fixture
def poisoned(run: Run) -> Run:
    """A run of two ranks in shards, of which the second once had a gradient that was not a number."""
    said = run.to_the_end(Poison(1, "backward", SKIPS))
    assert "iteration 2: update of student skipped, because a loss or gradient is not finite; samples 0 to 5" in said
    assert_skipped(run)
    return run


def test_one_ranks_nan_skips_the_update_of_all(poisoned: Run, tiny_teacher: Path, tmp_path: Path) -> None:
    """Wherever it came up: in what a rank adds to the others', or in the shard that one of them has of the sum."""
    other = Run(tiny_teacher, tmp_path / "other")
    other.to_the_end(Poison(0, "shard", SKIPS))
    assert_skipped(other)
    # The numbers of the step that was skipped are not compared: nan is not nan.
    ours, theirs = poisoned.tensors(), other.tensors()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_ranks_that_have_all_weights_still_agree_after_a_nan(poisoned: Run, tiny_teacher: Path, tmp_path: Path) -> None:
    """Every rank steps for itself here, so each must have skipped by itself."""
    whole = Run(tiny_teacher, tmp_path / "whole")
    witness = Witness(tmp_path)
    whole.to_the_end(Poison(1, "backward", SKIPS), witness, flags=("--sharding", "none"))
    assert_skipped(whole)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = whole.tensors(), poisoned.tensors()
    # As a rank's own rounding takes the average in three iterations, see test_ranks.py.
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours if name.startswith("ema/"))


def test_ranks_refuse_a_checkpoint_of_another_configuration(undisturbed: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")}
    job = undisturbed.start(flags=("--cfg", "2.0"))
    assert job.wait(120) == [2, 2], job.errors()
    for rank, prefix in enumerate(("tdm-fast: ", "tdm-fast: rank 1: ")):
        said = job.errors(rank).strip().splitlines()[-1]
        assert said.startswith(f"{prefix}{undisturbed.output}/checkpoint-3 belongs to a run with another configuration")
        assert "(cfg was 4.5, is 2.0)" in said and "Traceback" not in job.errors(rank)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.output.rglob("*")}


@pytest.mark.slow
def test_clocks_that_jump_do_not_make_an_older_checkpoint_the_newest(undisturbed: Run, run: Run) -> None:
    assert kill(run, "training", None, Clock(2e9, 1.0, 4e9, 1e9)).name in ("checkpoint-1", "checkpoint-2")
    before = checkpoints(run.output)
    for age, path in enumerate(before):  # by their times the first is the newest
        for file in (path, *path.iterdir()):
            os.utime(file, (2e9 - age * 1e8, 2e9 - age * 1e8))
    assert f"going on from {before[-1]}\n" in run.to_the_end(Clock(5.0, 3e9, 1e3))
    assert_same_bits(run, undisturbed)
    assert [path.name for path in checkpoints(run.output)] == ["checkpoint-2", "checkpoint-3"]


def wait_for_checkpoint(folder: Path, alive: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while latest_checkpoint(folder) is None:
        assert time.monotonic() < end and alive(), "waited in vain"
        time.sleep(0.01)


def test_of_two_runs_in_a_folder_the_second_is_refused(undisturbed: Run, run: Run, tmp_path: Path) -> None:
    first = run.start(Pause(2, tmp_path / "go"))
    wait_for_checkpoint(run.output, first.processes[0].is_alive)
    second = run.start(flags=("--seed", "7"))
    assert second.wait(120) == [2, 2], second.errors()
    for rank, prefix in enumerate(("tdm-fast: ", "tdm-fast: rank 1: ")):
        assert second.errors(rank).strip().splitlines()[-1] == (
            f"{prefix}{run.output} is in use by another run; wait for its end or name another folder"
        )
    (tmp_path / "go").touch()
    assert first.wait(200) == [0, 0], first.errors()
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_has_lost_a_rank(tiny_teacher: Path, tmp_path: Path) -> None:
    """The command line itself, nothing replaced or left out."""
    flags = [*FLAGS, "--max_train_steps", 30, "--checkpointing_steps", 2]
    disturbed = Run(tiny_teacher, tmp_path / "disturbed")
    process = launch(torchrun(2, "--max-restarts", "1"), tiny_teacher, disturbed.output, *flags)
    try:
        wait_for_checkpoint(disturbed.output, lambda: process.poll() is None)
        os.kill(children(process, disturbed.output)[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said
    going_on = re.search(r"going on from .*/checkpoint-(\d+)", said)
    assert going_on and int(going_on[1]) < 30, said
    undisturbed = Run(tiny_teacher, tmp_path / "undisturbed")
    undisturbed.to_the_end(flags=("--max_train_steps", 30, "--checkpointing_steps", 2))
    assert_same_bits(disturbed, undisturbed)
