"""make-teacher: stages that are interrupted anywhere end as if they had not been, and nothing half-written counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from tdm_fast import evaluate, tiny_shapes
from tdm_fast import make_teacher as module
from tdm_fast.evaluate import load_evaluator
from tdm_fast.files import SaveError, locked
from tdm_fast.make_teacher import Stage, TeacherConfig, make_teacher
from tdm_fast.models.loading import load_pipeline

NETWORKS = ("evaluator", "text_encoder", "vae", "transformer")
STAGES = ("evaluator", "text_encoder", "vae", "vae_decoder", "transformer", "transformer_detail")


class Interruptions:
    """Calls of what it wraps are counted; the calls named are interrupted instead."""

    def __init__(self, wrapped: Callable[..., Any], *calls: int) -> None:
        self.wrapped, self.calls, self.count = wrapped, calls, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise KeyboardInterrupt
        return self.wrapped(*arguments, **keywords)


def toy(steps: int = 5) -> tuple[Stage, nn.Module]:
    torch.manual_seed(3)
    # Running statistics are state too.
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator)
        return (model(x) - x[:, :2].abs()).square().mean()

    return Stage("toy", model, loss, steps, 1e-2), model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def weights(folder: Path) -> dict[str, Tensor]:
    files = [file for name in NETWORKS for file in (folder / name).glob("*.safetensors")]
    assert len(files) == len(NETWORKS)
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE's latents are measured on 8 clips instead of hundreds."""
    sample_clips = tiny_shapes.sample_clips
    monkeypatch.setattr(tiny_shapes, "sample_clips", lambda count, **keywords: sample_clips(min(count, 32), **keywords))


def config(folder: Path, **values: Any) -> TeacherConfig:
    steps = {
        "evaluator_steps": 2,
        "text_steps": 2,
        "vae_steps": 2,
        "decoder_steps": 2,
        "transformer_steps": 2,
        "detail_steps": 2,
        "num_latents": 5,
    }
    return TeacherConfig(output_dir=folder, evaluate=False, **{**steps, **values})


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_a_stage_that_is_interrupted_is_the_same_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    stage, model = toy()
    stage.run(tmp_path / "whole", tmp_path / "log", 1000.0)
    wanted = state(model)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [("toy", 5)] and log[0]["loss"] > 0
    clip = Interruptions(nn.utils.clip_grad_norm_, 1, 4, 6)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    for _ in range(3):
        stage, _ = toy()
        with pytest.raises(KeyboardInterrupt):
            stage.run(tmp_path / "broken", tmp_path / "log", seconds)
    for _ in range(2):  # the second time there is nothing left to train
        stage, model = toy()
        stage.run(tmp_path / "broken", tmp_path / "log", seconds)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(model).items())
    # With a checkpoint after every step only the interrupted steps are made again, otherwise all are.
    assert clip.count == 5 + {0.0: 3, 1000.0: 6}[seconds]


def test_a_stages_log_has_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, other = tmp_path / "log", {"stage": "other", "step": 900}
    log.write_text(json.dumps(other) + "\n")
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", Interruptions(nn.utils.clip_grad_norm_, 150))
    for ending in (pytest.raises(KeyboardInterrupt), nullcontext()):
        stage, _ = toy(steps=250)
        with ending:
            stage.run(tmp_path / "stage", log, 1000.0)
        with open(log, "a") as file:
            file.write('{"stage": "toy", "st')
    rows = [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    assert [(row["stage"], row["step"]) for row in rows] == [("other", 900), ("toy", 100), ("toy", 200), ("toy", 250)]


def test_a_stage_learns_and_leaves_its_average(tmp_path: Path) -> None:
    stage, model = toy(steps=300)
    before = stage.loss(-1).item()
    stage.run(tmp_path / "stage", tmp_path / "log", 1000.0)
    assert stage.loss(-1).item() < before / 2
    assert all(torch.equal(p, stage.averaged[name]) for name, p in model.named_parameters())
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [row["step"] for row in log] == [100, 200, 300]


@pytest.mark.slow
def test_a_teacher_that_is_interrupted_is_the_same_teacher(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(config(tmp_path / "whole"))
    log = [json.loads(line) for line in (tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in log] == [(name, 2) for name in STAGES]
    pipeline = load_pipeline(tmp_path / "whole")
    assert pipeline.latent_shape == (8, 5, 8, 8) and pipeline.schedule.alpha[-1] == 0
    load_evaluator(tmp_path / "whole")

    halves: set[type] = set()

    def save_half_first(self: ModelMixin, folder: Path, **_: Any) -> None:
        save(self, folder)
        if type(self) not in halves:
            halves.add(type(self))
            file = next(Path(folder).glob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:1000])
            raise KeyboardInterrupt

    broken, save = config(tmp_path / "broken", checkpoint_seconds=0.0), ModelMixin.save_pretrained
    monkeypatch.setattr(ModelMixin, "save_pretrained", save_half_first)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", Interruptions(nn.utils.clip_grad_norm_, 2, 5, 8, 11))
    monkeypatch.setattr(module, "randn", Interruptions(module.randn, 2))
    interrupted = 0
    while not (tmp_path / "broken" / "model_index.json").exists():
        try:
            make_teacher(broken)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 4 + 1 + 3 and len(halves) == 3
    ours, theirs = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for name in ("vae/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*/*.safetensors")}
    make_teacher(broken)  # nothing left to do
    assert saved == {path: path.stat().st_mtime_ns for path in saved}


def test_a_full_disk_is_named_and_costs_nothing(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ModelMixin, folder: Path, **_: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ModelMixin, "save_pretrained", full)
        with pytest.raises(SaveError, match=r"could not write .*/evaluator: No space left on device"):
            make_teacher(config(tmp_path))
    assert not (tmp_path / "evaluator").exists()
    trained = Interruptions(nn.utils.clip_grad_norm_, 1)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", trained)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(config(tmp_path))
    # The evaluator came from its checkpoint; the interruption was the text encoder's.
    assert (tmp_path / "evaluator" / "config.json").exists() and not (tmp_path / "text_encoder").exists()


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), pytest.raises(ValueError, match="a is in use by another run"):
        make_teacher(config(tmp_path / "a"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_no_seed_trains_on_the_evaluations_clips() -> None:
    TeacherConfig(seed=module.MAX_SEED).check()
    trained = {module.EVALUATOR_SEED, module.VAE_SEED, module.LATENT_SEED, module.TRANSFORMER_SEED, module.DETAIL_SEED}
    evaluated = {evaluate.REFERENCE_SEED, evaluate.REAL_SEED, evaluate.SWEEP_SEED, evaluate.NOISE_SEED}
    assert module.MAX_SEED + max(trained) < min(evaluated)


def test_other_flags_are_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_evaluator", Interruptions(module._evaluator, 1, 2))
    with pytest.raises(KeyboardInterrupt):
        make_teacher(config(tmp_path))
    with pytest.raises(ValueError, match=r"another configuration \(seed was 0, is 1; vae_steps was 2, is 3\)"):
        make_teacher(config(tmp_path, seed=1, vae_steps=3))
    with pytest.raises(KeyboardInterrupt):
        make_teacher(config(tmp_path, checkpoint_seconds=5.0))


@pytest.mark.slow
def test_a_part_that_is_trained_again_outdates_the_numbers(small: None, tmp_path: Path) -> None:
    make_teacher(config(tmp_path))
    file = tmp_path / "teacher_metrics.json"
    file.write_text("{}")
    make_teacher(config(tmp_path))
    assert file.exists()
    shutil.rmtree(tmp_path / "transformer")
    make_teacher(config(tmp_path))
    assert not file.exists()


def test_the_seed_decides(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_text_encoder", Interruptions(module._text_encoder, 1, 2, 3))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with pytest.raises(KeyboardInterrupt):
            make_teacher(config(tmp_path / name, seed=seed, evaluator_steps=1))
    a, b, c = (
        load_file(tmp_path / name / "evaluator" / "diffusion_pytorch_model.safetensors")["start.weight"]
        for name in "abc"
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
