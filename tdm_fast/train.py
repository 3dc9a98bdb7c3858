"""The training loop. `tdm-fast train` and `python -m tdm_fast.train` are the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything large is imported, so that Ctrl-C is heard
    from tdm_fast import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from tdm_fast import tiny_shapes
from tdm_fast.attention import set_attention
from tdm_fast.checkpoint import Checkpoint, Checkpoints
from tdm_fast.config import TrainConfig
from tdm_fast.encoders import Encoder
from tdm_fast.evaluate import Yardstick, load_yardstick
from tdm_fast.files import SaveError, checkpoints, latest_checkpoint, truncate_log, write_atomically
from tdm_fast.guards import name_samples
from tdm_fast.host import keep_memory
from tdm_fast.metering import (
    Log,
    Row,
    StepTimer,
    check_report_to,
    json_line,
    measured_matmul_rate,
    parse_profile,
    peak_bytes,
    profile,
    report,
    speed,
)
from tdm_fast.models import upstream
from tdm_fast.models.families import OPENSORA
from tdm_fast.models.loading import Pipeline, load_empty, load_parts
from tdm_fast.models.sources import Sources
from tdm_fast.preemption import Preempted, Preemption
from tdm_fast.prompt_store import cached_prompts, fill
from tdm_fast.prompt_store import identity as identity_of
from tdm_fast.prompts import read_prompts
from tdm_fast.ranks import Ranks, check_batch, joined
from tdm_fast.report import finish
from tdm_fast.sample import generate
from tdm_fast.sharding import Collected, collect
from tdm_fast.sizing import Costs, iteration_flops, measure_costs, refuse_what_cannot_fit, with_batch_size
from tdm_fast.step import (
    Batch,
    State,
    check_context,
    choose_attention,
    compile_now,
    make_batch,
    make_state,
    resolve_device,
    update,
    uses_bf16,
)
from tdm_fast.text import PromptCache, fingerprint
from tdm_fast.video import to_uint8, write_video

VALIDATION_SEED = 2001
NUM_VALIDATION_PROMPTS = 8
# Flags that a resumed run may change: they decide when and where things happen, not what the weights become.
FREE_FLAGS = {
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps",
    "num_eval_videos", "logging_steps", "max_skipped_steps", "report_to", "profile", "lora_save", "sharding",
    "shard_size", "context_parallel", "reshard_after_forward", "gradient_accumulation_steps", "attention",
}  # fmt: skip
# Flags that say where the teacher's parts are and what size it is; what counts is what comes of them.
PLACES = {
    "model_path", "ae", "ae_path", "text_encoder_name_1", "text_encoder_name_2", "num_frames", "max_height",
    "max_width", "opensora_source", "prompt_cache", "prompt_column",
}  # fmt: skip
# Flags that it may change when it names the checkpoint to go on from: what helps one that diverged.
TUNED_FLAGS = ("learning_rate", "student_learning_rate", "max_grad_norm")
# Flags that `--train_batch_size auto` decides, and a run that goes on takes from its checkpoint.
FOUND_FLAGS = ("train_batch_size", "activation_checkpointing")


def train(config: TrainConfig) -> dict[str, Any]:
    """Distil a teacher; returns what `metrics.json` in the run's folder holds, on ranks other than the first nothing.

    One process, or as many as torchrun or `accelerate launch` have started: the first writes, shows and measures.
    Raises ValueError for a configuration that cannot work, before any work begins, SaveError when the run's folder
    cannot be written, with the last whole checkpoint intact, Preempted when SIGTERM or SIGUSR1 has ended the run, and
    RankLost when another rank has died.
    """
    began = time.monotonic()
    keep_memory()
    device = check_flags(config)
    n = config.networks
    sources = Sources.of_flags(config.model)
    check_teacher(config, sources)
    with joined(device, n.sharding, n.shard_size, n.context_parallel) as ranks:
        if (o := config.optimiser).train_batch_size != "auto":
            check_batch(o.train_batch_size, o.gradient_accumulation_steps, ranks.data_ranks)
        prompts = ranks.from_main(lambda: prompts_of(config))
        # Weights from files are read by each rank as far as it holds them; others are the same on every rank.
        in_shards = ranks.world > 1 and n.sharding != "none" and sources.has_weights and not sources.upstream
        empty = {"text_encoder"} | ({"transformer"} if in_shards else set())
        if not sources.upstream:  # before weights are read
            check_model(config, load_empty(sources))
        teacher = load_parts(sources, empty=empty if ranks.is_main else empty | {"vae"})
        if sources.upstream:
            check_model(config, teacher)
        # Now, because what is damaged must not show only when the training is over.
        yardstick = load_yardstick(teacher) if config.run.num_eval_videos and ranks.is_main else None
        with Checkpoints(config.run.output_dir, ranks, keep=config.run.checkpoints_total_limit) as store:
            return run(config, teacher.to(ranks.device), prompts, yardstick, store, ranks, began)


def check_flags(config: TrainConfig) -> torch.device:
    """The device that a run is on. Raises ValueError for one that is not there, and for what cannot be reported."""
    device = resolve_device(config.networks.device)
    check_report_to(config.run.report_to)
    if config.run.profile and parse_profile(config.run.profile)[0] > config.optimiser.max_train_steps:
        raise ValueError(
            f"--profile {config.run.profile}: the run has {config.optimiser.max_train_steps} iterations; it takes A:B"
            " with A among them"
        )
    return device


def check_teacher(config: TrainConfig, sources: Sources) -> None:
    """Raise ValueError for what a run wants of its teacher and cannot have."""
    if config.tdm.cfg != 1 and not sources.knows_null_prompt:
        raise ValueError(
            f"--cfg {config.tdm.cfg:g}: {sources.folder} is distilled and knows no null prompt that guidance could lead"
            " away from; --cfg 1 would do"
        )
    if config.run.lora_save == "adapter" and not sources.has_weights:
        raise ValueError(
            f"--lora_save adapter: {sources.name} has no weights on disk to keep beside the adapter; merged would do"
        )


def check_model(config: TrainConfig, teacher: Pipeline) -> None:
    """Raise ValueError for what a run wants of its teacher's network, schedule and size and cannot have."""
    if config.run.lora_save == "adapter" and teacher.weights and teacher.weights.changed:
        raise ValueError(
            f"--lora_save adapter: {teacher.folder} has an adapter or biases of its own beside its transformer,"
            " which another adapter would take the place of; merged would do"
        )
    choose_attention(config, teacher.denoiser.model, resolve_device(config.networks.device))
    check_context(config.networks.context_parallel, teacher.denoiser.model)
    if config.tdm.unify is not None:
        teacher.denoiser.time_embedding()  # raises where there is none to tell
    config.tdm.check(teacher.schedule)
    latent_shapes(config, teacher)


def latent_shapes(config: TrainConfig, teacher: Pipeline) -> list[tuple[int, ...]]:
    """The sizes of latents `(C, T, H, W)` that a run mixes. Raises ValueError for one that the model cannot take."""
    return [teacher.latents_of(size) for size in config.run.video_sizes] or [teacher.latent_shape]


def run(
    config: TrainConfig,
    teacher: Pipeline,
    prompts: list[str],
    yardstick: Yardstick | None,
    store: Checkpoints,
    ranks: Ranks,
    began: float,
) -> dict[str, Any]:
    """What `train` does in the run's folder, when everything that it is given has been found to work."""
    output = config.run.output_dir
    found = checkpoint_to_resume(config, store)
    if found is not None:  # before the prompts are encoded, which may take hours
        known = store.on_main(lambda: own_flags(config, prompts, teacher))
        refuse_another_runs(found, known, free_flags(config))
    cache = prompt_cache(config, teacher, prompts, ranks)
    shapes = latent_shapes(config, teacher)
    config = with_batch_size(config, teacher.denoiser, cache, shapes, found.meta["config"] if found else None, ranks)
    mine = store.on_main(lambda: identity(config, cache, teacher))
    if found is not None:
        refuse_another_runs(found, mine, free_flags(config))
    expected = store.on_main(lambda: refuse_what_cannot_fit(config, teacher.denoiser, cache, shapes, ranks))
    costs = store.on_main(lambda: measure_costs(config, teacher.denoiser, cache, shapes, ranks))
    if ranks.is_main:
        print(f"memory: {expected}", file=sys.stderr)
    empty = any(parameter.is_meta for parameter in teacher.denoiser.parameters())
    state = make_state(teacher.denoiser, config, ranks, teacher.weights if empty else None)
    if found is not None:
        resume(state, found, store)
    compile_now(state, cache, config, shapes)
    if ranks.is_main:
        if state.compilations is not None:
            print(state.compilations, file=sys.stderr)
        write_atomically(output / "config.yaml", yaml.safe_dump(config.flat(), sort_keys=False).encode())

    student = copy.copy(teacher)
    student.denoiser = type(teacher.denoiser)(teacher.denoiser.model, teacher.schedule)
    student.timesteps = tuple(config.tdm.check())
    try:
        with Preemption(ranks) as preemption:
            loop(config, state, cache, student, shapes, costs, mine, store, preemption, began)
    except OSError as error:
        last = latest_checkpoint(output)
        where = f"the last whole checkpoint is {last}" if last else "no checkpoint had been saved before"
        raise SaveError(f"could not write to {output}: {error.strerror or error}; {where}") from error
    found_student = collect(state.networks, state.student_weights, ranks)
    if found_student is None:
        return {}
    nodes = {k: dataclasses.replace(config.tdm, num_steps=k).check() for k in config.tdm.unify or ()}
    state.networks.save(
        output / "student",
        teacher.sources,
        nodes or list(student.timesteps),
        weights=found_student.weights,
        lora_save=config.run.lora_save,
        base=found_student.base,
        size=None if teacher.family is OPENSORA else teacher.family.time_and_space(teacher.latent_shape),
    )
    if empty:  # it is looked at beside the student
        teacher = load_parts(teacher.sources, empty={"text_encoder"}).to(ranks.device)
        tell_attention(config, teacher)
    adopt(student, state, config, found_student)
    if yardstick is not None:  # whose prompts are tiny-shapes', whatever the run's are
        teacher.load_text_encoder()
        student.tokenizer, student.text_encoder = teacher.tokenizer, teacher.text_encoder
    metrics = finish(
        output,
        teacher,
        student,
        cache,
        yardstick,
        config.run.num_eval_videos,
        guidance=config.tdm.cfg,
        dtype=torch.bfloat16 if uses_bf16(config, state.device) else torch.float32,
    )
    metrics |= {
        "iterations": state.iteration,
        "train_seconds": round(state.seconds, 1),
        "peak_memory_bytes": max(state.peak_memory, peak_bytes(state.device)),
    }
    write_atomically(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def adopt(student: Pipeline, state: State, config: TrainConfig, found: Collected) -> None:
    """Have `student` sample with what the run has made of its network so far."""
    k = config.tdm.num_steps if config.tdm.unify else None
    network = state.networks.student_network(found.weights, num_steps=k, base=found.base)
    student.denoiser.model = upstream.runnable(network) if student.sources.upstream else network
    student.denoiser.model.to(state.device)
    tell_attention(config, student)


def tell_attention(config: TrainConfig, model: Pipeline) -> None:
    """Have a model that only samples run the same attention as the networks that are trained."""
    network = model.denoiser.model
    set_attention(network, choose_attention(config, network, model.device).backend)


class Watch:
    """What is seen of a run: `metrics.jsonl`, a board, the bar. All are told when `flush` reads the device."""

    def __init__(
        self, config: TrainConfig, state: State, shapes: Sequence[tuple[int, ...]], costs: Sequence[Costs]
    ) -> None:
        self.config, self.state, self.costs = config, state, dict(zip(shapes, costs, strict=True))
        self.log, self.timer = Log(), StepTimer(state.device)
        dtype = torch.bfloat16 if uses_bf16(config, state.device) else torch.float32
        self.rate = measured_matmul_rate(state.device, dtype) if state.ranks.is_main else 1.0
        self._batches: list[tuple[Sequence[int], int]] = []
        """Of each iteration the prompts of all ranks, and this one's operations; no tensors, which would stay."""
        self._late = 0

    def add(self, batch: Batch, values: dict[str, Tensor]) -> None:
        """Keep an iteration's numbers; the device is not waited for."""
        known = {"num_steps": batch.tdm.num_steps} if batch.tdm.unify else {}
        self.log.add(self.state.iteration, values, lr=self.state.student_rate(self.state.iteration - 1), **known)
        flops = iteration_flops(self.costs[tuple(batch.latents.shape[1:])], batch) // self.state.ranks.context
        self._batches.append((batch.all_prompts, flops))

    def flush(self) -> list[Row]:
        """The rows since the last call. Raises ValueError when too many updates in a row had to be skipped."""
        rows, times, batches = self.log.flush(), self.timer.flush(), self._batches
        self._batches = []
        for row, seconds, (prompts, flops) in zip(rows, times, batches, strict=True):
            size = len(prompts)
            row |= {name: round(value, 5) for name, value in seconds.items()}
            row |= speed(seconds["seconds"], size, flops, self.rate)
            row["peak_memory_bytes"] = peak_bytes(self.state.device)
            said = name_samples(row, range(size), prompts)
            if said and self.state.ranks.is_main:
                tqdm.write(said, file=sys.stderr)
        compilations = self.state.compilations
        if compilations is not None and compilations.after_warm_up > self._late:
            self._late = compilations.after_warm_up
            tqdm.write(
                f"note: compiled after the warm-up, which should have met everything: {compilations}", sys.stderr
            )
        return rows


def loop(
    config: TrainConfig,
    state: State,
    cache: PromptCache,
    student: Pipeline,
    shapes: Sequence[tuple[int, ...]],
    costs: Sequence[Costs],
    mine: dict[str, Any],
    store: Checkpoints,
    preemption: Preemption,
    began: float,
) -> None:
    """Iterate to the end, with log, board, trace, samples (made with `student`) and checkpoints.

    Raises Preempted, with what has been done saved, when the run is to leave before its end.
    """
    output, total, every = config.run.output_dir, config.optimiser.max_train_steps, config.run.logging_steps
    first, spent = state.iteration, state.seconds
    if first >= total:
        return
    main = state.ranks.is_main
    if main:
        truncate_log(output / "metrics.jsonl", lambda row: row["step"] <= first)
    watch = Watch(config, state, shapes, costs)
    window = parse_profile(config.run.profile) if config.run.profile and main else None
    with (
        report(config.run.report_to if main else "none", output, start=first + 1, config=config.flat()) as show,
        open(output / "metrics.jsonl" if main else os.devnull, "a", buffering=1) as log,
        tqdm(initial=first, total=total, desc="train", mininterval=1, disable=not main) as progress,
        profile(window, output, start=first + 1) as traced,
    ):
        while state.iteration < total:
            with watch.timer.step():
                with watch.timer("data"):
                    batch = make_batch(state.iteration, cache, config, shapes, state.device, state.ranks)
                watch.add(batch, update(state, batch, config, watch.timer))
            traced()
            progress.update()
            stop, failing = preemption.agreed(failing=store.failed)
            if failing:
                store.wait()  # raises SaveError
            done = state.iteration == total
            saving = done or stop is not None or state.iteration % config.run.checkpointing_steps == 0
            if saving or state.iteration % every == 0:
                for row in watch.flush():
                    log.write(json_line(row))
                    show(row)
                    losses = {name: f"{row[f'loss_{name}']:.4g}" for name in ("fake", "student")}
                    progress.set_postfix(losses, refresh=False)
                # After the rows, which name the samples, and before anything is saved.
                state.guard.raise_if_stuck(config.run.max_skipped_steps, store.last)
            # The picture first: a run killed between the two makes it again, and never goes on without it.
            # One that has to leave has no time for it.
            if done or (stop is None and state.iteration % config.run.validation_steps == 0):
                collected = collect(state.networks, state.student_weights, state.ranks, state.device)
                if collected is not None:
                    adopt(student, state, config, collected)
                    dtype = torch.bfloat16 if uses_bf16(config, state.device) else torch.float32
                    validate(student, cache, output / "samples" / f"step-{state.iteration:06d}.png", dtype)
                    if state.ranks.world > 1:
                        student.denoiser.model = torch.nn.Module()  # what was collected is not to stay
                state.ranks.barrier()
            if saving:
                state.seconds = spent + time.monotonic() - began
                state.peak_memory = max(state.peak_memory, peak_bytes(state.device))
                meta = {
                    "seconds": state.seconds,
                    "peak_memory_bytes": state.peak_memory,
                    "threads": torch.get_num_threads(),
                    "config": mine,
                }
                store.save(state.iteration, state.groups(), meta)
            if done or stop is not None:
                store.wait()
            if stop is not None and not done:
                raise Preempted(stop, state.iteration, store.last)


def prompts_of(config: TrainConfig) -> list[str]:
    """The prompts that a run draws from."""
    file, cache = config.model.prompts, config.model.prompt_cache
    if file is not None:
        return read_prompts(file, config.model.prompt_column)
    return tiny_shapes.all_prompts() if cache is None else cached_prompts(cache)


def prompt_cache(config: TrainConfig, teacher: Pipeline, prompts: list[str], ranks: Ranks | None = None) -> PromptCache:
    """The prompts' embeddings, from `--prompt_cache` or the run's folder as far as they are there.

    What is missing is encoded by all ranks, and added there; the text encoders are in memory no longer than that.
    """
    ranks, files = ranks or Ranks(), teacher.encoders
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    encoders = ranks.from_main(lambda: identity_of(files))

    def load() -> list[Encoder]:
        loaded = [each.load(dtype) for each in files]
        for encoder in loaded:
            encoder.model.to(ranks.device)
        return loaded

    return fill(
        config.model.prompt_cache or config.run.output_dir / f"prompts-{encoders}",
        prompts,
        encoders,
        load,
        dtype=dtype,
        negative_prompt=config.model.negative_prompt,
        ranks=ranks,
    )


def identity(config: TrainConfig, cache: PromptCache, teacher: Pipeline) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to: flags, with files' contents in place of their paths."""
    contents = teacher.sources.digest(*(part for part in teacher.sources.folders if part != "vae"))
    return own_flags(config, cache.prompts, teacher) | {"model": f"sha256:{contents}"}


def own_flags(config: TrainConfig, prompts: Sequence[str], teacher: Pipeline) -> dict[str, Any]:
    """The part of a run's identity that is known without reading its teacher's weights."""
    flags = {name: value for name, value in config.flat().items() if name not in FREE_FLAGS | PLACES | {"model"}}
    return flags | {
        "prompts": f"sha256:{fingerprint(prompts)}",
        "latents": None if teacher.has_own_size else "x".join(map(str, teacher.latent_shape)),
    }


def checkpoint_to_resume(config: TrainConfig, store: Checkpoints) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names, its tensors not read yet; None where a run begins anew.

    Raises ValueError when it is missing, damaged, no training run's, or when a run would bury another's checkpoints.
    """
    path = store.on_main(lambda: path_to_resume(config))
    if path is None:
        return None
    found = store.read(path)
    check_resumable(found, config)
    return found


def check_resumable(found: Checkpoint, config: TrainConfig) -> None:
    """Raise ValueError for a checkpoint that lacks what a training run goes on from."""
    needed = {"student", "fake", "student_optimizer", "fake_optimizer", "guard"}
    absent = sorted((needed | ({"ema"} if config.optimiser.use_ema else set())) - found.groups.keys())
    if found.meta.get("config") is None or absent:
        raise ValueError(
            f"{found.path} is no checkpoint of a training run: it lacks {', '.join(absent) or 'its configuration'}"
        )


def free_flags(config: TrainConfig) -> Collection[str]:
    """The flags that a run that goes on may have other values of, besides those that are always free."""
    tuned = () if config.run.resume_from_checkpoint == "latest" else TUNED_FLAGS
    return (*tuned, *FOUND_FLAGS) if config.optimiser.train_batch_size == "auto" else tuned


def path_to_resume(config: TrainConfig) -> Path | None:
    """What `--resume_from_checkpoint` names. Raises ValueError where a run would bury another's checkpoints."""
    wanted, output = config.run.resume_from_checkpoint, config.run.output_dir
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and latest_checkpoint(output):
        wanted = "latest"  # torchrun has started this run again, which goes on from where it was
    if wanted == "none":
        if checkpoints(output):
            raise ValueError(
                f"--resume_from_checkpoint none, but {output} holds checkpoints of an earlier run, which would be lost;"
                " name another --output_dir or remove the folder"
            )
        return None
    inside = output / wanted
    return latest_checkpoint(output) if wanted == "latest" else inside if inside.is_dir() else Path(wanted)


def refuse_another_runs(found: Checkpoint, mine: dict[str, Any], free: Collection[str] = ()) -> None:
    """Raise ValueError when a checkpoint is of a run of another `identity`, but for the flags in `free`."""
    saved = found.meta["config"]
    names = [name for name in mine if name not in free and saved.get(name) != mine[name]]
    changed = [f"{name} was {saved.get(name)}, is {mine[name]}" for name in names]
    if changed:
        raise ValueError(
            f"{found.path} belongs to a run with another configuration ({'; '.join(changed)}); use its flags to go on"
            " with it, or another --output_dir to start anew"
        )


def resume(state: State, found: Checkpoint, store: Checkpoints) -> None:
    """Go on from a checkpoint."""
    state.restore(found, store.load)
    if not state.ranks.is_main:
        return
    print(f"going on from {found.path}", file=sys.stderr)
    if (threads := torch.get_num_threads()) != found.meta["threads"]:
        print(
            f"note: the checkpoint was made with {found.meta['threads']} threads, this process has {threads}; sums are"
            " rounded in another order, so the weights will not be equal to the bit to an undisturbed run's",
            file=sys.stderr,
        )


def validate(student: Pipeline, cache: PromptCache, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Sample fixed prompts from fixed noise; the picture has a row a prompt, a frame in four across."""
    count = min(NUM_VALIDATION_PROMPTS, len(cache))
    indices = [i * len(cache) // count for i in range(count)]
    assert student.timesteps is not None
    chunks = generate(student, cache, indices, student.timesteps, seed=VALIDATION_SEED, dtype=dtype)
    write_video(path, torch.cat([to_uint8(clip)[::4] for chunk in chunks for clip in chunk], dim=1))
