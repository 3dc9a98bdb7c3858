"""The training loop. `tdm-fast train` and `python -m tdm_fast.train` are the same."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything large is imported, so that Ctrl-C is heard
    from tdm_fast import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))

import torch
import yaml
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tdm_fast import tiny_shapes
from tdm_fast.checkpoint import (
    SaveError,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    locked,
    optimizer_tensors,
    save_checkpoint,
    truncate_log,
    write_atomically,
)
from tdm_fast.config import OptimiserConfig, TrainConfig
from tdm_fast.data import draw_prompts
from tdm_fast.distill import Roles, draw, fake_loss, rollout, student_loss
from tdm_fast.evaluate import Yardstick, load_yardstick
from tdm_fast.host import keep_memory, peak_memory
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.loading import Pipeline, digest, load_pipeline, save_student
from tdm_fast.philox import randn
from tdm_fast.report import finish
from tdm_fast.sample import generate
from tdm_fast.text import PromptCache, fingerprint, read_prompts
from tdm_fast.video import to_uint8, write_video

VALIDATION_SEED = 2001
NUM_VALIDATION_PROMPTS = 8
# Flags that a resumed run may change: they decide when things happen, not what the weights become.
FREE_FLAGS = {
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps",
    "num_eval_videos",
}  # fmt: skip


@dataclass
class State:
    """Everything that decides a run's future: two networks, the student's average, two optimisers, the iteration.

    And what the run has cost so far, earlier processes included.
    """

    roles: Roles
    ema: dict[str, Tensor]
    student_optimizer: torch.optim.AdamW
    fake_optimizer: torch.optim.AdamW
    student_rate: Callable[[int], float]
    iteration: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint."""
        return {
            "student": dict(self.roles.student.model.named_parameters()),
            "fake": dict(self.roles.fake.model.named_parameters()),
            "ema": self.ema,
            "student_optimizer": optimizer_tensors(self.student_optimizer),
            "fake_optimizer": optimizer_tensors(self.fake_optimizer),
        }

    def restore(self, groups: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Inverse of `groups`."""
        copy_weights(self.roles.student.model, groups["student"])
        copy_weights(self.roles.fake.model, groups["fake"])
        self.ema = groups["ema"]
        load_optimizer_tensors(self.student_optimizer, groups["student_optimizer"])
        load_optimizer_tensors(self.fake_optimizer, groups["fake_optimizer"])
        self.iteration, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.peak_memory = int(meta["peak_memory_bytes"])


def make_state(teacher: Denoiser, config: OptimiserConfig) -> State:
    """Student and fake score start as copies of the teacher; the teacher stays as it is."""
    student, fake = (copy.deepcopy(teacher).requires_grad_(True).train() for _ in range(2))
    rate = config.student_learning_rate or config.learning_rate / 5

    def optimizer(network: nn.Module, learning_rate: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            network.parameters(),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
        )

    student_optimizer = optimizer(student, rate)
    # Only the schedule's formula is wanted: a rate that is a function of the iteration needs no state to resume.
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer(student, rate),
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return State(
        roles=Roles(student, teacher, fake),
        ema={name: p.detach().clone() for name, p in student.model.named_parameters()},
        student_optimizer=student_optimizer,
        fake_optimizer=optimizer(fake, config.learning_rate),
        student_rate=lambda iteration: rate * float(factor(iteration)),
    )


def train_step(state: State, cache: PromptCache, config: TrainConfig, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """One iteration: a fake-score update, a student update, the average. Returns the row of `metrics.jsonl`."""
    iteration, tdm, optimiser = state.iteration, config.tdm, config.optimiser
    roles, batch = state.roles, optimiser.train_batch_size
    conditioning = cache.batch(draw_prompts(len(cache), batch, seed=tdm.seed, iteration=iteration))
    latents = randn(batch, latent_shape, seed=tdm.seed, iteration=iteration)
    draws = draw(tdm, batch, iteration)
    rolled = rollout(roles.student, latents, conditioning, roles.student.schedule, tdm, draws)

    state.fake_optimizer.zero_grad()
    loss_fake = fake_loss(roles, rolled, conditioning, tdm, draws, iteration)
    loss_fake.backward()
    state.fake_optimizer.step()

    state.student_optimizer.zero_grad()
    loss_student = student_loss(roles, rolled, conditioning, cache.negatives(1), tdm, draws, iteration)
    loss_student.backward()
    norm = nn.utils.clip_grad_norm_(roles.student.parameters(), optimiser.max_grad_norm)
    rate = state.student_rate(iteration)
    for group in state.student_optimizer.param_groups:
        group["lr"] = rate
    state.student_optimizer.step()

    with torch.no_grad():
        # A short run must not remember its start: the average is over as many iterations as there have been.
        decay = min(optimiser.ema_decay, (1 + iteration) / (10 + iteration)) if optimiser.use_ema else 0.0
        for name, parameter in roles.student.model.named_parameters():
            state.ema[name].lerp_(parameter, 1 - decay)
    state.iteration += 1
    return {
        "step": state.iteration,
        "loss_fake": loss_fake.item(),
        "loss_student": loss_student.item(),
        "grad_norm": norm.item(),
        "lr": rate,
    }


def train(config: TrainConfig) -> dict[str, Any]:
    """Distil a teacher; returns what `metrics.json` in the run's folder holds.

    Raises ValueError for a configuration that cannot work, before any work begins, and SaveError when the run's folder
    cannot be written, with the last whole checkpoint intact.
    """
    began = time.monotonic()
    keep_memory()
    teacher = load_pipeline(config.model.model)
    nodes = config.tdm.check(teacher.schedule)
    # Now, because what is damaged must not show only when the training is over.
    yardstick = load_yardstick(teacher) if config.run.num_eval_videos else None
    prompts = prompts_of(config)
    with locked(config.run.output_dir):
        return run(config, teacher, nodes, prompts, yardstick, began)


def run(
    config: TrainConfig,
    teacher: Pipeline,
    nodes: list[int],
    prompts: list[str],
    yardstick: Yardstick | None,
    began: float,
) -> dict[str, Any]:
    """What `train` does in the run's folder, when everything that it is given has been found to work."""
    output = config.run.output_dir
    cache = prompt_cache(config, teacher, prompts)
    state = make_state(teacher.denoiser, config.optimiser)
    mine = identity(config, cache)
    resume(config, state, mine)
    write_atomically(output / "config.yaml", yaml.safe_dump(config.flat(), sort_keys=False).encode())

    student = copy.copy(teacher)
    student.denoiser = copy.deepcopy(teacher.denoiser)
    try:
        loop(config, state, cache, student, nodes, mine, began)
    except OSError as error:
        last = latest_checkpoint(output)
        where = f"the last whole checkpoint is {last}" if last else "no checkpoint had been saved before"
        raise SaveError(f"could not write to {output}: {error.strerror or error}; {where}") from error
    copy_weights(student.denoiser.model, state.ema)
    student.timesteps = tuple(nodes)
    save_student(output / "student", student.denoiser.model, config.model.model, nodes)
    metrics = finish(output, teacher, student, cache, yardstick, config.run.num_eval_videos)
    metrics |= {
        "iterations": state.iteration,
        "train_seconds": round(state.seconds, 1),
        "peak_memory_bytes": max(state.peak_memory, peak_memory()),
    }
    write_atomically(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def loop(
    config: TrainConfig,
    state: State,
    cache: PromptCache,
    student: Pipeline,
    nodes: list[int],
    mine: dict[str, Any],
    began: float,
) -> None:
    """Iterate to the end, with log, TensorBoard, samples (made with `student`) and checkpoints."""
    output, total = config.run.output_dir, config.optimiser.max_train_steps
    first, spent = state.iteration, state.seconds
    truncate_log(output / "metrics.jsonl", lambda row: row["step"] <= first)
    with (
        SummaryWriter(str(output / "tensorboard"), purge_step=first + 1) as board,
        open(output / "metrics.jsonl", "a", buffering=1) as log,
        tqdm(initial=first, total=total, desc="train", mininterval=1, disable=first >= total) as progress,
    ):
        while state.iteration < total:
            step_began = time.monotonic()
            row = train_step(state, cache, config, student.latent_shape)
            refuse_divergence(row, output)
            row["seconds"] = round(time.monotonic() - step_began, 4)
            log.write(json.dumps(row) + "\n")
            for name in row.keys() - {"step"}:
                board.add_scalar(name, row[name], row["step"])
            progress.update()
            progress.set_postfix(fake=f"{row['loss_fake']:.4f}", student=f"{row['loss_student']:.3f}", refresh=False)
            done = state.iteration == total
            # The picture first: a run killed between the two makes it again, and never goes on without it.
            if done or state.iteration % config.run.validation_steps == 0:
                copy_weights(student.denoiser.model, state.ema)
                validate(student, cache, nodes, output / "samples" / f"step-{state.iteration:06d}.png")
            if done or state.iteration % config.run.checkpointing_steps == 0:
                state.seconds = spent + time.monotonic() - began
                keep = config.run.checkpoints_total_limit
                state.peak_memory = max(state.peak_memory, peak_memory())
                meta = {
                    "seconds": state.seconds,
                    "peak_memory_bytes": state.peak_memory,
                    "threads": torch.get_num_threads(),
                    "config": mine,
                }
                save_checkpoint(output, state.iteration, state.groups(), meta, keep=keep)


def refuse_divergence(row: dict[str, Any], output: Path) -> None:
    """Raise ValueError when an iteration's losses are not finite: the weights are lost, and must not be saved."""
    if not all(math.isfinite(value) for value in row.values()):
        numbers = ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "step")
        raise ValueError(
            f"iteration {row['step']} is not finite ({numbers}): the training diverged; lower rates may help. The last"
            f" whole checkpoint is {latest_checkpoint(output) or 'none'}"
        )


def prompts_of(config: TrainConfig) -> list[str]:
    """The prompts that a run draws from."""
    file = config.model.prompts
    return read_prompts(file) if file else tiny_shapes.all_prompts()


def prompt_cache(config: TrainConfig, teacher: Pipeline, prompts: list[str]) -> PromptCache:
    """The prompts' embeddings, from the run's folder if they are of these prompts, else encoded and saved there."""
    encoder = digest(config.model.model, ("text_encoder", "tokenizer"))
    name = f"prompts-{fingerprint([encoder, config.model.negative_prompt, *prompts])}.safetensors"
    path = config.run.output_dir / name
    if path.exists():
        with suppress(SafetensorError):  # a damaged cache is made again
            return PromptCache.load(path)
    negative = config.model.negative_prompt
    cache = PromptCache.encode(prompts, teacher.tokenizer, teacher.text_encoder, negative_prompt=negative)
    cache.save(path)
    return cache


def identity(config: TrainConfig, cache: PromptCache) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to: flags, with files' contents in place of their paths."""
    flags = {name: value for name, value in config.flat().items() if name not in FREE_FLAGS}
    teacher = digest(config.model.model, ("transformer", "scheduler", "text_encoder", "tokenizer"))
    return flags | {"model": f"sha256:{teacher}", "prompts": f"sha256:{fingerprint(cache.prompts)}"}


def resume(config: TrainConfig, state: State, mine: dict[str, Any]) -> None:
    """Load the checkpoint that `--resume_from_checkpoint` names into `state`; `mine` is the run's identity."""
    wanted, output = config.run.resume_from_checkpoint, config.run.output_dir
    if wanted == "none":
        if checkpoints(output):
            raise ValueError(
                f"--resume_from_checkpoint none, but {output} holds checkpoints of an earlier run, which would be lost;"
                " name another --output_dir or remove the folder"
            )
        return
    inside = output / wanted
    path = latest_checkpoint(output) if wanted == "latest" else inside if inside.is_dir() else Path(wanted)
    if path is None:
        return
    groups, meta = load_checkpoint(path)
    saved = meta.get("config")
    absent = sorted(state.groups().keys() - groups.keys())
    if saved is None or absent:
        raise ValueError(
            f"{path} is no checkpoint of a training run: it lacks {', '.join(absent) or 'its configuration'}"
        )
    changed = [f"{name} was {saved.get(name)}, is {mine.get(name)}" for name in mine if saved.get(name) != mine[name]]
    if changed:
        raise ValueError(
            f"{path} belongs to a run with another configuration ({'; '.join(changed)}); use its flags to go on with"
            " it, or another --output_dir to start anew"
        )
    state.restore(groups, meta)
    print(f"going on from {path}", file=sys.stderr)
    if (threads := torch.get_num_threads()) != meta["threads"]:
        print(
            f"note: the checkpoint was made with {meta['threads']} threads, this process has {threads}; sums are"
            " rounded in another order, so the weights will not be equal to the bit to an undisturbed run's",
            file=sys.stderr,
        )


def validate(student: Pipeline, cache: PromptCache, nodes: list[int], path: Path) -> None:
    """Sample fixed prompts from fixed noise; the picture has a row a prompt, a frame in four across."""
    count = min(NUM_VALIDATION_PROMPTS, len(cache))
    indices = [i * len(cache) // count for i in range(count)]
    clips = next(generate(student, cache, indices, nodes, seed=VALIDATION_SEED))
    write_video(path, torch.cat([to_uint8(clip)[::4] for clip in clips], dim=1))


@torch.no_grad()
def copy_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy named tensors into a model's parameters. Raises ValueError when they are another model's."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(f"the checkpoint is of another model: {len(odd)} weights differ, {odd[0]} first")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
