"""The step's options through the whole command: each trains, resumes to the bit, and does what it says."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_fast import sizing, step
from tdm_fast import train as module
from tdm_fast.checkpoint import load_checkpoint
from tdm_fast.config import (
    BUNDLED_TEACHER,
    ModelConfig,
    NetworksConfig,
    OptimiserConfig,
    RunConfig,
    TrainConfig,
    parse_train,
)
from tdm_fast.distill import TDMConfig
from tdm_fast.files import latest_checkpoint
from tdm_fast.models.loading import load_pipeline
from tdm_fast.pipeline import choose_timesteps
from tdm_fast.sizing import estimate_run, iteration_flops, measure_costs, with_flags
from tdm_fast.step import make_batch, make_state, update
from tdm_fast.train import train

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"roles": "lora", "lora_rank": 2},
    "unify": {"unify": (1, 2)},
    "lora, block, unify": {"roles": "lora", "lora_rank": 2, "activation_checkpointing": "block", "unify": (1, 2)},
    "shared index": {"share_index": True, "fake_updates": 2},
    "one index": {"index_per": "iteration", "activation_checkpointing": "selective"},
    "sizes": {"video_sizes": ("5x32x32", "9x16x32")},
    "no average": {"use_ema": False},
    # The bundled teacher, because moments of fewer than 4096 numbers stay in 32 bits.
    "8-bit AdamW": {"use_8bit_adam": True, "model": BUNDLED_TEACHER},
}


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(model=tiny_teacher),
        tdm=TDMConfig(num_steps=2, seed=4),
        optimiser=OptimiserConfig(max_train_steps=4, train_batch_size=2, learning_rate=1e-3, lr_warmup_steps=1),
        run=RunConfig(output_dir=tmp_path / "run", checkpointing_steps=2, validation_steps=100, num_eval_videos=0),
    )


def losses(folder: Path) -> list[tuple[float, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss_fake"], row["loss_student"]) for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_and_goes_on_to_the_bit(
    flags: dict[str, Any], config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = (with_flags(config, output_dir=tmp_path / name, **flags) for name in ("whole", "halves"))
    train(whole)

    def interrupted(state: step.State, *arguments: Any) -> dict[str, Tensor]:
        if state.iteration == 3:
            raise KeyboardInterrupt
        return update(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    train(halves)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves") and len(losses(tmp_path / "whole")) == 4
    ours, theirs = (load_checkpoint(latest_checkpoint(tmp_path / name))[0] for name in ("whole", "halves"))
    assert ours.keys() == theirs.keys()
    for group, tensors in ours.items():
        assert all(torch.equal(tensor, theirs[group][name]) for name, tensor in tensors.items()), group
    # The student's folder is enough to sample, for each number of steps that it was told.
    student = load_pipeline(tmp_path / "whole" / "student")
    assert student.timesteps is not None and len(student.timesteps) == 2
    assert sorted(student.trajectories) == sorted(flags.get("unify", ()))
    if student.trajectories:
        assert [len(choose_timesteps(student, k)) for k in (1, 2, None)] == [1, 2, 2]
        with pytest.raises(ValueError, match=r"num_steps is 3; .* holds a model for 1, 2"):
            choose_timesteps(student, 3)
    assert parse_train(["--config", str(tmp_path / "whole" / "config.yaml")]) == whole


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["full", "lora"])
def test_checkpointing_changes_memory_and_nothing_else(roles: str, config: TrainConfig, tmp_path: Path) -> None:
    found = {}
    for kind in ("none", "block", "selective"):
        output = tmp_path / kind
        train(with_flags(config, output_dir=output, roles=roles, activation_checkpointing=kind))
        found[kind] = losses(output)
    for kind in ("block", "selective"):
        assert torch.allclose(torch.tensor(found[kind]), torch.tensor(found["none"]), rtol=1e-5, atol=0)


def loaded(config: TrainConfig) -> tuple[Any, Any, list[tuple[int, ...]]]:
    teacher = load_pipeline(config.model.model)
    return teacher.denoiser, module.prompt_cache(config, teacher, module.prompts_of(config)), [teacher.latent_shape]


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for a number from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("roles", ["full", "lora"])
@pytest.mark.parametrize("unify", [None, (1, 2)])
def test_an_update_waits_for_nothing(roles: str, unify: tuple[int, ...] | None, config: TrainConfig) -> None:
    config = with_flags(config, roles=roles, unify=unify)
    denoiser, cache, shapes = loaded(config)
    state = make_state(denoiser, config)
    for iteration in range(2):
        batch = make_batch(iteration, cache, config, shapes)
        if unify is not None:  # on a CPU, where reading costs nothing, a wrong K is told at once; on a GPU it gives NaN
            update(state, batch, config, nullcontext)
            continue
        with NoReading():
            update(state, batch, config, nullcontext)


@pytest.mark.parametrize("flags", [{}, {"share_index": True}, {"fake_updates": 2, "cfg": 1.0}], ids=str)
def test_the_operations_of_an_iteration_are_what_is_counted(flags: dict[str, Any], config: TrainConfig) -> None:
    """Model FLOPs from one sample's cost against a count of the whole iteration."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = with_flags(config, train_batch_size=3, **flags)
    denoiser, cache, shapes = loaded(config)
    cache = dataclasses.replace(
        cache, embeddings=tuple(row[:3] for row in cache.embeddings), negative=cache.embeddings[0][:3]
    )
    costs = measure_costs(config, denoiser, cache, shapes)[0]
    state, batch = make_state(denoiser, config), make_batch(0, cache, config, shapes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        update(state, batch, config, nullcontext)
    assert iteration_flops(costs, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_what_would(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_flags(config, train_batch_size=16)
    denoiser, cache, shapes = loaded(config)
    least = estimate_run(with_flags(config, activation_checkpointing="block"), denoiser, cache, shapes).peak
    there = sum(parameter.nbytes for parameter in denoiser.parameters())
    monkeypatch.setattr(sizing, "device_memory", lambda _: round(least / 0.9) + 1 - there)
    with pytest.raises(ValueError, match=r"the run would take .* what would fit: --activation_checkpointing block"):
        train(config)
    assert not latest_checkpoint(config.run.output_dir)


@pytest.mark.slow
def test_auto_takes_the_largest_batch_that_fits_and_keeps_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    auto = with_flags(config, train_batch_size="auto", max_train_steps=2)
    denoiser, cache, shapes = loaded(config)
    wanted = estimate_run(
        with_flags(config, train_batch_size=5, activation_checkpointing="block"), denoiser, cache, shapes
    )
    there = sum(parameter.nbytes for parameter in denoiser.parameters())
    monkeypatch.setattr(sizing, "device_memory", lambda _: round(wanted.peak / 0.9) + 1 - there)
    train(auto)
    resolved = yaml.safe_load((config.run.output_dir / "config.yaml").read_text())
    assert resolved["train_batch_size"] == 5 and resolved["activation_checkpointing"] == "block"
    monkeypatch.undo()
    train(with_flags(auto, checkpointing_steps=1))  # the same run, though more would fit now
    assert yaml.safe_load((config.run.output_dir / "config.yaml").read_text())["train_batch_size"] == 5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"device": "cuda:99"}, r"--device cuda:99: this machine has \d+ CUDA devices"),
        ({"device": "abacus"}, "--device abacus: it takes auto, cpu, cuda or cuda:N"),
        ({"video_sizes": ("6x32x32",)}, "--video_sizes 6x32x32: .* the nearest that fits is 5x32x32"),
        ({"video_sizes": ("5x30x32",)}, "--video_sizes 5x30x32: .* the nearest that fits is 5x32x32"),
        ({"profile": "3"}, "--profile 3: it takes A:B"),
        ({"report_to": "wandb"}, "--report_to wandb: Weights & Biases is not installed"),
        ({"use_8bit_adam": True}, "--use_8bit_adam needs torchao"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_once(
    flags: dict[str, Any], says: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("wandb", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tdm_fast.adamw_8bit", raising=False)
    with pytest.raises(ValueError, match=says):
        train(with_flags(config, **flags))
    assert not latest_checkpoint(config.run.output_dir)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lora_save", "adapter"], "--lora_save adapter: --roles full trains no adapter"),
        (["--lora_rank", "0"], "--lora_rank 0: it takes a whole number from 1 up"),
        (["--video_sizes", "17x64"], "--video_sizes 17x64: it takes frames x height x width"),
        (["--logging_steps", "0"], "--logging_steps 0: it takes a whole number from 1 up"),
    ],
)
def test_flags_that_cannot_work_are_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_train(arguments)


@pytest.mark.slow
def test_a_trace_of_some_iterations(config: TrainConfig) -> None:
    train(with_flags(config, profile="2:3"))
    import gzip

    trace = json.loads(gzip.decompress((config.run.output_dir / "trace-2-3.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"rollout", "fake", "student", "optimiser", "data"} <= names


def test_networks_are_configured_by_flags() -> None:
    config = parse_train(
        "--roles lora --lora_rank 4 --activation_checkpointing block --compile on --device cpu".split()
    )
    assert config.networks == NetworksConfig(
        roles="lora", lora_rank=4, activation_checkpointing="block", compile="on", device="cpu"
    )
