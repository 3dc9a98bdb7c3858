"""The training loop: the same run however often it is killed, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tdm_fast import host
from tdm_fast import train as module
from tdm_fast.checkpoint import load_checkpoint, save_checkpoint
from tdm_fast.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig, parse_train
from tdm_fast.distill import TDMConfig
from tdm_fast.encoders import Encoder
from tdm_fast.files import checkpoints, latest_checkpoint, locked
from tdm_fast.models.loading import load_pipeline
from tdm_fast.ops._dispatch import choose
from tdm_fast.step import Batch, State, make_batch, make_state, rate_schedule, update
from tdm_fast.text import PromptCache
from tdm_fast.train import train

pytestmark = pytest.mark.usefixtures("known_estimates")
STEPS = 12
COMMAND_LINE = (
    "--max_train_steps 12 --train_batch_size 3 --num_eval_videos 0 --checkpointing_steps 3 --validation_steps 5 "
    "--lr_warmup_steps 2 --learning_rate 1e-3 --use_randmid"
)
FLAGS = COMMAND_LINE.split()


def rows(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl` without what depends on the machine and its moods."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    moods = ("seconds", "samples_per_second", "mfu", "peak_memory")
    return [{key: value for key, value in row.items() if not key.startswith(moods)} for row in parsed]


def step(state: State, cache: PromptCache, config: TrainConfig, shape: tuple[int, ...]) -> dict[str, float]:
    """One iteration as the loop makes it; its numbers."""
    batch = make_batch(state.iteration, cache, config, [shape])
    return {name: value.item() for name, value in update(state, batch, config, nullcontext).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    """Everything in the last checkpoint and in the student's folder, by name."""
    groups, meta = load_checkpoint(latest_checkpoint(folder))
    tensors = {f"{group}/{name}": tensor for group in groups for name, tensor in groups[group].items()}
    student = load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    return {**tensors, **student, "step": torch.tensor(meta["step"])}


def assert_same_run(first: Path, second: Path) -> None:
    assert rows(first) == rows(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    pictures = [sorted((folder / "samples").iterdir()) for folder in (first, second)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, start_command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("run") / "whole"
    flags = [*FLAGS, "--checkpoints_total_limit", "None"]
    command = start_command("train", "--model", tiny_teacher, "--output_dir", output, *flags)
    assert command.wait() == 0, command.errors()
    return output


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(model=tiny_teacher),
        tdm=TDMConfig(num_steps=2, seed=4),
        optimiser=OptimiserConfig(max_train_steps=4, train_batch_size=2, learning_rate=1e-3, lr_warmup_steps=1),
        run=RunConfig(
            output_dir=tmp_path / "run", checkpointing_steps=2, validation_steps=100, num_eval_videos=0, logging_steps=1
        ),
    )


def moved(config: TrainConfig, output: Path, **run: object) -> TrainConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output_dir=output, **run))


def test_a_run_leaves_what_it_should(finished: Path, tiny_teacher: Path) -> None:
    log = rows(finished)
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    for row in log:
        assert {"loss_fake", "loss_student", "grad_norm", "lr"} <= row.keys()
        assert all(torch.isfinite(torch.tensor(value)) for value in row.values())
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    for name in ("loss_fake", "loss_student"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({row["step"]: row[name] for row in log}, rel=1e-6)
    assert [path.name for path in sorted((finished / "samples").iterdir())] == [
        f"step-{step:06d}.png" for step in (5, 10, 12)
    ]
    with Image.open(finished / "samples" / "step-000012.png") as picture:
        assert picture.size == (2 * 32, 8 * 32)  # two of the five frames, eight prompts
    assert [path.name for path in checkpoints(finished)] == [f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["iterations"] == STEPS and metrics["train_seconds"] > 0
    assert metrics["peak_memory_bytes"] > 100e6
    assert (finished / "comparison.png").stat().st_size and (finished / "comparison.mp4").stat().st_size
    assert parse_train(["--config", str(finished / "config.yaml")]) == parse_train(
        ["--model", str(tiny_teacher), "--output_dir", str(finished), "--checkpoints_total_limit", "None", *FLAGS]
    )
    assert {path.name for path in finished.rglob(".*")} == {".lock", ".metadata"}  # the latter each checkpoint's own


def test_the_student_has_moved_and_is_the_average(finished: Path, tiny_teacher: Path) -> None:
    tensors = weights(finished)
    teacher = dict(load_pipeline(tiny_teacher).denoiser.model.named_parameters())
    for name, parameter in teacher.items():
        student, fake, ema = (tensors[f"{group}/{name}"] for group in ("student", "fake", "ema"))
        assert torch.equal(tensors[name], ema)
        # A name that ends in k_proj.bias or the like may have no gradient: softmax does not see it.
        if "bias" not in name:
            assert not torch.equal(student, parameter) and not torch.equal(fake, student), name
            assert not torch.equal(ema, student), name


@pytest.mark.slow
def test_the_students_folder_alone_is_enough_to_sample(
    finished: Path, tiny_teacher: Path, start_command: Any, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    run, output = tmp_path / "run", tmp_path / "clip.png"
    flags = ["--max_train_steps", 1, "--train_batch_size", 1, "--num_eval_videos", 0]
    command = start_command("train", "--model", teacher, "--output_dir", run, *flags)
    assert command.wait() == 0, command.errors()
    student = shutil.copytree(run / "student", tmp_path / "elsewhere")
    shutil.rmtree(teacher)
    shutil.rmtree(run)
    command = start_command("sample", "--model", student, "--prompt", "a small red circle", "--output", output)
    assert command.wait() == 0, command.errors()
    assert "4 steps" in command.stdout.read_text() and output.is_file()


def test_a_run_that_is_killed_and_started_again_is_the_same_run(
    finished: Path, tiny_teacher: Path, start_command: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = ("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS)
    moments = sorted(random.SystemRandom().uniform(0, STEPS) for _ in range(3))
    print(f"killed after {moments} iterations")  # what pytest shows when this fails
    for moment in moments:
        command = start_command(*arguments)
        before = time.monotonic()
        wait_for(lambda: len(rows(output)) >= int(moment) or not command.process.is_alive())  # noqa: B023
        iteration = (time.monotonic() - before) / max(1, int(moment))
        time.sleep(min(1.0, iteration) * (moment % 1))
        command.process.kill()
        assert command.wait() in (-signal.SIGKILL, 0)
    last = start_command(*arguments)
    assert last.wait() == 0, last.errors()
    assert_same_run(finished, output)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, output))
    assert ours["iterations"] == theirs["iterations"] and ours.keys() == theirs.keys()
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert {event.step for event in events.Scalars("loss_fake")} <= set(range(1, STEPS + 1))


def test_ctrl_c_is_one_line_and_code_130(
    finished: Path, tiny_teacher: Path, start_command: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = ("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS)
    command = start_command(*arguments)
    wait_for(lambda: latest_checkpoint(output) is not None)
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait() == 130
    errors = command.errors()
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == "tdm-fast: stopped; the last whole checkpoint is intact"
    load_checkpoint(latest_checkpoint(output))
    assert start_command(*arguments).wait() == 0
    assert_same_run(finished, output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_leave_saves_and_goes_on(
    number: signal.Signals, finished: Path, tiny_teacher: Path, start_command: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = [*FLAGS, "--checkpointing_steps", 100]
    command = start_command("train", "--model", tiny_teacher, "--output_dir", output, *flags)
    wait_for(lambda: len(rows(output)) >= 2)
    os.kill(command.process.pid, number)
    assert command.wait() == 143, command.errors()
    done = rows(output)[-1]["step"]
    assert done < STEPS and [path.name for path in checkpoints(output)] == [f"checkpoint-{done}"]
    assert command.errors().strip().splitlines()[-1] == (
        f"tdm-fast: stopped by {number.name} after iteration {done}, which is saved in {output}/checkpoint-{done}; the"
        " same command goes on from there"
    )
    assert start_command("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS).wait() == 0
    assert_same_run(finished, output)


@pytest.mark.parametrize(
    ("file_limit", "flags", "says"),
    [
        (100_000, [], "could not write .*/checkpoint-6: File too large. The last whole checkpoint is .*/checkpoint-3"),
        (15_000, [], "could not write to .*: File too large; the last whole checkpoint is .*/checkpoint-3"),
        (2600, ["--checkpointing_steps", 100, "--validation_steps", 100], "could not write to .*/checkpoint-3"),
    ],
    ids=["checkpoint", "picture", "log"],
)
def test_files_that_cannot_grow_leave_the_last_checkpoint_intact(
    finished: Path,
    tiny_teacher: Path,
    start_command: Any,
    tmp_path: Path,
    file_limit: int,
    flags: list[object],
    says: str,
) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk; only the error's name is another."""
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    for later in checkpoints(output)[1:]:
        shutil.rmtree(later)
    saved = {path: path.read_bytes() for path in (output / "checkpoint-3").iterdir()}
    arguments = ("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS, *flags)
    command = start_command(*arguments, file_limit=file_limit)
    assert command.wait() == 2
    errors = command.errors()
    assert "Traceback" not in errors and re.search(f"^tdm-fast: {says}", errors.strip().splitlines()[-1]), errors
    assert saved == {path: path.read_bytes() for path in (output / "checkpoint-3").iterdir()}
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3"]


def test_a_folder_is_one_runs(config: TrainConfig) -> None:
    output = config.run.output_dir
    with locked(output), pytest.raises(ValueError, match=f"{output} is in use by another run"):
        train(config)
    assert [path.name for path in output.iterdir()] == [".lock"]
    train(config)


def test_two_and_two_iterations_are_four(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halves = moved(config, tmp_path / "whole"), moved(config, tmp_path / "halves")
    train(whole)

    def interrupted(state: State, *arguments: Any) -> dict[str, Tensor]:
        if state.iteration == 3:
            raise KeyboardInterrupt
        return update(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    assert [row["step"] for row in rows(tmp_path / "halves")] == [1, 2, 3]
    assert [path.name for path in checkpoints(tmp_path / "halves")] == ["checkpoint-2"]
    train(halves)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    again = moved(config, tmp_path / "again", checkpointing_steps=1, checkpoints_total_limit=1)
    train(again)
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    before = {path: path.read_bytes() for path in (tmp_path / "again").glob("checkpoint-*/*")}
    assert len(before) == 3
    train(again)  # nothing left to do
    assert before == {path: path.read_bytes() for path in before}
    assert_same_run(tmp_path / "whole", tmp_path / "again")


def test_a_clock_that_jumps_changes_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(moved(config, tmp_path / "steady"))
    moments = itertools.cycle([2e9, 1.0, 4e9, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    train(moved(config, tmp_path / "jumping", checkpointing_steps=1))
    assert_same_run(tmp_path / "steady", tmp_path / "jumping")
    assert [path.name for path in checkpoints(tmp_path / "jumping")] == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_of_another_run_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, max_train_steps=1))
    train(short)
    saved = {path: path.read_bytes() for path in short.run.output_dir.rglob("*") if path.is_file()}
    other = dataclasses.replace(
        short,
        tdm=dataclasses.replace(short.tdm, cfg=2.0, use_huber=False),
        optimiser=dataclasses.replace(short.optimiser, learning_rate=2e-3),
    )
    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(module, "fill", lambda *_, **__: pytest.fail("prompts are encoded"))
        train(other)
    for part in (
        "checkpoint-1 belongs to a run with another configuration",
        "cfg was 4.5, is 2.0",
        "use_huber was True, is False",
        "learning_rate was 0.001, is 0.002",
        "another --output_dir",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint none, but .* holds checkpoints of an earlier run"):
        train(moved(short, short.run.output_dir, resume_from_checkpoint="none"))
    with pytest.raises(ValueError, match=r"elsewhere is not a checkpoint \(no state.json; found: no such folder\)"):
        train(moved(short, tmp_path / "new", resume_from_checkpoint=str(tmp_path / "elsewhere")))
    groups, meta = load_checkpoint(short.run.output_dir / "checkpoint-1")
    del groups["ema"]
    stage = save_checkpoint(tmp_path / "stage", 1, groups, meta)
    with pytest.raises(ValueError, match="stage/checkpoint-1 is no checkpoint of a training run: it lacks ema"):
        train(moved(short, tmp_path / "new", resume_from_checkpoint=str(stage)))
    assert saved == {path: path.read_bytes() for path in saved}
    # What `auto` has yet to find is no other flag.
    auto = dataclasses.replace(short, optimiser=dataclasses.replace(short.optimiser, train_batch_size="auto"))
    assert train(auto)["iterations"] == 1
    # What does not decide the weights may change.
    train(moved(short, short.run.output_dir, checkpointing_steps=7, validation_steps=9))


@pytest.mark.slow
def test_contents_make_a_run_not_paths(config: TrainConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    config.model.prompts = prompts
    config.optimiser.max_train_steps = 1
    train(config)
    caches = set(config.run.output_dir.glob("prompts-*"))
    config.model.model = shutil.copytree(config.model.model, tmp_path / "moved")
    config.model.prompts = prompts.rename(tmp_path / "renamed.txt")
    train(config)  # the same run
    assert set(config.run.output_dir.glob("prompts-*")) == caches
    config.model.prompts.write_text("a red circle\n")
    with pytest.raises(ValueError, match=r"another configuration \(prompts was sha256:\w+, is sha256:\w+\)"):
        train(config)
    config.model.prompts.write_text("a red circle\na blue square\n")
    for part in ("transformer", "text_encoder"):
        file = next((tmp_path / "moved" / part).glob("*.safetensors"))
        before = file.read_bytes()
        tensors = load_file(file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"another configuration \(model was sha256:\w+, is sha256:\w+\)"):
            train(config)
        file.write_bytes(before)
    assert len(list(config.run.output_dir.glob("prompts-*"))) == 2  # one of each text encoder


def test_a_run_can_go_on_from_a_checkpoint_elsewhere(config: TrainConfig, tmp_path: Path) -> None:
    train(moved(config, tmp_path / "whole", checkpoints_total_limit=None))
    train(moved(config, tmp_path / "fork", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")))
    assert rows(tmp_path / "fork") == rows(tmp_path / "whole")[2:]
    ours, theirs = weights(tmp_path / "fork"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_can_go_back_to_a_checkpoint_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    train(moved(config, tmp_path / "whole"))
    wanted = weights(tmp_path / "whole")
    again = moved(config, tmp_path / "whole", resume_from_checkpoint="checkpoint-2", checkpointing_steps=1)
    train(again)
    assert rows(tmp_path / "whole")[-1]["step"] == 4 and len(rows(tmp_path / "whole")) == 4
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(tmp_path / "whole").items())
    assert [path.name for path in checkpoints(tmp_path / "whole")] == ["checkpoint-3", "checkpoint-4"]


def test_a_damaged_checkpoint_is_refused_by_name(config: TrainConfig) -> None:
    train(config)
    newest = latest_checkpoint(config.run.output_dir)
    file = newest / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"checkpoint {newest} is damaged .*; remove it to go on from the one before"):
        train(config)
    shutil.rmtree(newest)
    train(config)
    assert latest_checkpoint(config.run.output_dir) == newest


def test_another_number_of_threads_is_noted(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    train(config)
    assert "note: the checkpoint" not in capsys.readouterr().err
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: now + 1)
    train(config)
    assert f"made with {now} threads, this process has {now + 1}" in capsys.readouterr().err


def test_the_peak_of_memory_is_the_runs(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for peak in (7 * 10**12, 10**12):
        monkeypatch.setattr(module, "peak_bytes", lambda _, peak=peak: peak)
        assert train(config)["peak_memory_bytes"] == 7 * 10**12


def test_the_peak_of_memory_is_this_processs_own() -> None:
    """A process started by a large one is not large."""
    large = torch.ones(2**28, dtype=torch.uint8)
    code = f"import runpy; print(runpy.run_path({host.__file__!r})['peak_memory']())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 2**20 < child < len(large) < host.peak_memory()


def spoiling(iterations: set[int]) -> Callable[..., dict[str, Tensor]]:
    """`update` with latents that are no numbers in some iterations, counted from 0."""

    def spoilt(state: State, batch: Batch, *arguments: Any) -> dict[str, Tensor]:
        odd = state.iteration in iterations
        return update(state, batch._replace(latents=batch.latents * math.nan) if odd else batch, *arguments)

    return spoilt


def test_an_update_that_is_not_finite_is_skipped_and_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "update", spoiling({2}))
    train(moved(config, config.run.output_dir, checkpointing_steps=1, checkpoints_total_limit=None))
    log = rows(config.run.output_dir)
    assert [(row["skipped_fake"], row["skipped_student"]) for row in log] == [(0, 0), (0, 0), (1, 1), (0, 0)]
    assert log[2]["samples"] == [0, 2] and len(log[2]["prompts"]) == 2 and log[2]["loss_student"] is None
    assert "iteration 3: update of fake and student skipped" in capsys.readouterr().err
    before, after, last = (load_checkpoint(config.run.output_dir / f"checkpoint-{step}")[0] for step in (2, 3, 4))
    for group in ("student", "fake", "ema", "student_optimizer", "fake_optimizer"):
        assert all(torch.equal(before[group][name], after[group][name]) for name in before[group]), group
        assert any(not torch.equal(after[group][name], last[group][name]) for name in before[group]), group


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "update", spoiling({2, 3, 4, 5, 6}))
    config.optimiser.max_train_steps = 7
    output = config.run.output_dir
    with pytest.raises(ValueError, match=f"3 updates of the fake in a row .* checkpoint is {output}/checkpoint-4"):
        train(moved(config, output, max_skipped_steps=3))
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5]
    # What the message advises: from a checkpoint that is named, with lower rates.
    monkeypatch.undo()
    config.optimiser.learning_rate = 1e-5
    with pytest.raises(ValueError, match=r"another configuration \(learning_rate was"):
        train(config)
    train(moved(config, output, resume_from_checkpoint="checkpoint-4", max_skipped_steps=3))
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.gpu
def test_a_gpu_trains_and_samples(config: TrainConfig) -> None:
    config.networks.device = "cuda"
    train(config)
    log = rows(config.run.output_dir)
    assert len(log) == 4 and all(math.isfinite(row["loss_fake"] + row["loss_student"]) for row in log)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"run": {"video_sizes": ("2x8x8",)}}, "--video_sizes 2x8x8"),
        ({"tdm": {"total_steps": 2000}}, "total_steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, changed: dict[str, dict[str, Any]], says: str
) -> None:
    groups = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changed.items()}
    monkeypatch.setattr(module, "load_parts", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=says):
        train(dataclasses.replace(config, **groups))
    assert not config.run.output_dir.exists()


def test_prompts_may_be_in_a_column_that_is_named(tmp_path: Path) -> None:
    table = tmp_path / "it.csv"
    table.write_text("caption,long\na circle,a red circle\n")
    for flags, wanted in (([], "a circle"), (["--prompt_column", "long"], "a red circle")):
        assert module.prompts_of(parse_train(["--prompts", str(table), *flags])) == [wanted]


def test_prompts_of_ones_own_are_encoded_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    config.model = dataclasses.replace(config.model, prompts=file, negative_prompt="white")
    teacher = load_pipeline(config.model.model)
    first = module.prompt_cache(config, teacher, module.prompts_of(config))
    assert first.prompts == ("a red circle", "a blue square") and len(first.negative) == 2
    (shard,) = config.run.output_dir.glob("prompts-*/shard-*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "states", lambda *_: pytest.fail("encoded again"))
        assert torch.equal(module.prompt_cache(config, teacher, module.prompts_of(config)).negative, first.negative)
    shard.write_bytes(shard.read_bytes()[:-5])
    assert torch.equal(module.prompt_cache(config, teacher, module.prompts_of(config)).negative, first.negative)
    file.write_text("a green triangle\n")
    assert module.prompt_cache(config, teacher, module.prompts_of(config)).prompts == ("a green triangle",)


def test_the_main_jobs_losses_do_not_depend_on_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bundled teacher with its own settings: native ops unless told otherwise, the same losses to rounding."""
    config = parse_train(["--output_dir", str(tmp_path / "run"), "--train_batch_size", "6"])
    losses: dict[str, list[tuple[float, float]]] = {}
    for backend, wish in (("cpp", ""), ("torch", "torch")):
        monkeypatch.setenv("TDM_FAST_BACKEND", wish)
        assert {choose(op, "cpu") for op in ("renoise", "fake_score_loss_from_outputs", "tdm_loss_from_outputs")} == {
            backend
        }
        teacher = load_pipeline(config.model.model)
        cache = module.prompt_cache(config, teacher, module.prompts_of(config))
        state = make_state(teacher.denoiser, config)
        made = [step(state, cache, config, teacher.latent_shape) for _ in range(4)]
        losses[backend] = [(row["loss_fake"], row["loss_student"]) for row in made]
    for mine, wanted in zip(losses["cpp"], losses["torch"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)


def test_one_iteration(config: TrainConfig) -> None:
    """Teacher untouched; fake and student stepped once each, the rates and the average as they should be."""
    teacher = load_pipeline(config.model.model)
    frozen = {name: p.clone() for name, p in teacher.denoiser.model.named_parameters()}
    cache = module.prompt_cache(config, teacher, module.prompts_of(config))
    state = make_state(teacher.denoiser, config)
    average = {name: p.double() for name, p in frozen.items()}
    for number in range(1, 4):
        numbers = step(state, cache, config, teacher.latent_shape)
        assert state.iteration == number and all(map(math.isfinite, numbers.values()))
        decay = min(config.optimiser.ema_decay, number / (9 + number))
        for name, parameter in state.networks.trainable("student").items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in teacher.denoiser.model.named_parameters():
        assert torch.equal(parameter, frozen[name]) and parameter.grad is None
        torch.testing.assert_close(state.ema[name].double(), average[name], rtol=1e-5, atol=1e-6)
    assert [group["lr"] for group in state.fake_optimizer.param_groups] == [1e-3]


def test_without_an_average_the_student_is_what_it_is(config: TrainConfig) -> None:
    config.optimiser.use_ema = False
    train(config)
    groups, _ = load_checkpoint(latest_checkpoint(config.run.output_dir))
    assert "ema" not in groups
    student = load_file(config.run.output_dir / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(student[name], groups["student"][name]) for name in student)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"])
def test_the_students_rate_is_the_named_schedule(name: str) -> None:
    config = OptimiserConfig(lr_scheduler=name, lr_warmup_steps=3, max_train_steps=9)
    rate = rate_schedule(0.5, config)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=9)
    for iteration in range(9):
        assert rate(iteration) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("name", "value"), [("num_steps", 7), ("total_steps", 20), ("total_steps", 1100)])
def test_intervals_without_room_are_refused(name: str, value: int, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=name):
        train(dataclasses.replace(config, tdm=dataclasses.replace(config.tdm, **{name: value})))
    assert not config.run.output_dir.exists()
