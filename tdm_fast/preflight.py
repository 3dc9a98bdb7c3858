"""The rows of `tdm-fast check` about one `train` command: what train would refuse, found by its own functions.

No weights are read, nothing is encoded, trained or written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError

from tdm_fast.check import Row, Rows
from tdm_fast.checkpoint import inspect
from tdm_fast.config import TrainConfig, parse_train
from tdm_fast.encoders import LIMITS, WIDTHS, EncoderFiles, Kind, find_encoder, needs_download, offline_reason
from tdm_fast.evaluate import check_evaluator
from tdm_fast.files import SaveError, checkpoints, locked
from tdm_fast.memory import Estimate, gigabytes
from tdm_fast.models import upstream
from tdm_fast.models.loading import Pipeline, load_empty, weight_checks
from tdm_fast.models.sources import Sources
from tdm_fast.prompt_store import check_cache, identity
from tdm_fast.ranks import check_batch, planned, pretended
from tdm_fast.sizing import checkpoint_bytes, refuse_what_cannot_fit
from tdm_fast.step import choose_attention
from tdm_fast.text import PromptCache
from tdm_fast.train import (
    check_flags,
    check_resumable,
    check_teacher,
    free_flags,
    latent_shapes,
    own_flags,
    path_to_resume,
    prompts_of,
    refuse_another_runs,
)

T = TypeVar("T")

REFUSALS = (ValueError, SaveError, OSError, SafetensorError)
"""What ends `train` with one message and code 2."""
FEW_PROMPTS = 256
"""How many prompts, the longest, are made into tokens: a million of them take minutes."""
COPY = "copy or download the folder again, or name another"


def parse(arguments: Sequence[str]) -> TrainConfig | ValueError:
    """The run of these flags, or what `train` says of a value. Raises SystemExit with code 2 for unknown flags."""
    try:
        return parse_train(arguments, prog="tdm-fast check")
    except ValueError as error:
        return error


@dataclass(frozen=True)
class Found(Generic[T]):
    """A row, and what was found on the way to it; None where that failed."""

    row: Row
    value: T | None


def find(name: str, fix: str, work: Callable[[], T], says: Callable[[T], str] = str) -> Found[T]:
    """Do `work`; the row says of its value what `says` does; a refused one has train's message, with `fix`."""
    try:
        value = work()
        return Found(Row(name, "ok", says(value)), value)
    except REFUSALS as error:
        return Found(Row(name, "failed", str(error), fix), None)


def rows(config: TrainConfig | ValueError) -> Rows:
    """All rows of a run; those that need what an earlier one did not find are left out."""
    if isinstance(config, ValueError):
        yield Row("flags", "failed", str(config), "tdm-fast train --help says what each flag takes")
        return
    device = find("flags", "--device auto and --report_to tensorboard always do", lambda: check_flags(config))
    yield device.row
    ranks = find("ranks", "as many ranks as --sharding and --train_batch_size take", lambda: _ranks(config), _ranks_say)
    yield ranks.row
    prompts = find("prompts", "--prompts FILE", lambda: prompts_of(config), lambda found: f"{len(found)} prompts")
    yield prompts.row
    yield find("run's folder", "--output_dir FOLDER", lambda: _output(config)).row
    if (download := _download(config)) is not None:
        yield download
        return
    parts = partial(Sources.of_flags, config.model, find=_find_or_await)
    sources = find("teacher", COPY, parts, lambda found: str(found.folder))
    yield sources.row
    if sources.value is not None:
        yield from part_rows(config, sources.value, prompts.value, None if ranks.value is None else device.value)


def part_rows(
    config: TrainConfig, sources: Sources, prompts: Sequence[str] | None, device: torch.device | None
) -> Rows:
    """The rows of a teacher whose parts are there: whether each is whole, whether they fit, what the run takes."""
    if sources.upstream:
        yield find("opensora", "--opensora_source native", upstream.registries, lambda _: "its registries import").row
    yield find("guidance", "--cfg 1, or a teacher that is not distilled", lambda: _guidance(config, sources)).row
    awaited = _awaited(sources)
    for part, encoder in awaited.items():
        yield _download_row(part, encoder.flag, encoder.name, f"{encoder.width} wide; its files are not checked")
    checks = [
        find(part, COPY, check, partial(_place, sources, part))
        for part, check in weight_checks(sources).items()
        if part not in awaited
    ]
    yield from (check.row for check in checks)
    found = find("fit", "parts of one model, and a size that they divide", lambda: load_empty(sources), _size)
    yield found.row
    if found.value is None or any(check.row.state == "failed" for check in checks):
        return
    teacher = found.value
    if device is not None:
        wish = partial(choose_attention, config, teacher.denoiser.model, device)
        yield find("attention", "--attention auto", wish, lambda choice: choice.says).row
    yield find("trajectory", "--num_steps, --total_steps, --timesteps", lambda: config.tdm.check(teacher.schedule)).row
    shapes = find("latents", "--video_sizes that divide", lambda: latent_shapes(config, teacher), _listed)
    yield shapes.row
    if config.run.num_eval_videos:
        yield find("evaluator", "--num_eval_videos 0", lambda: check_evaluator(teacher), _evaluator).row
    if (folder := config.model.prompt_cache) is not None and not awaited:  # which hashes the encoder, as the run does
        fix = "tdm-fast encode fills one with these encoders"
        yield find(
            "prompt cache", fix, lambda: check_cache(folder, identity(sources.encoders)), "{} prompts".format
        ).row
    if prompts is None:
        return
    if (path := _checkpoint(config)) is not None:
        fix = "another --output_dir begins anew"
        yield find("checkpoint", fix, lambda: _resume(config, path, prompts, teacher)).row
    cache = find("tokens", "the encoder's own tokenizer", lambda: _cache(config, sources, prompts), _tokens)
    yield cache.row
    if device is not None and shapes.value is not None and cache.value is not None:
        yield _memory(config, teacher, cache.value, shapes.value, device)
        yield _disk(config, sources, teacher, device)


# ---- what each row does


def _ranks(config: TrainConfig) -> int:
    """As many as WORLD_SIZE says, one without it; each has a part of the batch."""
    n, o = config.networks, config.optimiser
    world, shape = planned(n.sharding, n.shard_size, n.context_parallel)
    if o.train_batch_size != "auto":
        check_batch(o.train_batch_size, o.gradient_accumulation_steps, world // shape[2])
    return world


def _ranks_say(world: int) -> str:
    return f"{world}, by WORLD_SIZE" if world > 1 else "1; WORLD_SIZE=N in front checks the run of N"


def _download(config: TrainConfig) -> Row | None:
    """A warning where the run would first download an encoder that nothing is known of; None where it would not."""
    model = config.model
    names = {"--text_encoder_name_1": model.text_encoder_name_1, "--text_encoder_name_2": model.text_encoder_name_2}
    for flag, name in names.items():
        known = any(name in widths for widths in WIDTHS.values())
        if name is not None and not known and needs_download(name) and offline_reason("model", name) is None:
            return _download_row("teacher", flag, name, "nothing after it is checked")
    return None


def _download_row(row: str, flag: str, name: str, says: str) -> Row:
    return Row(row, "warn", f"{flag} {name} would be downloaded first; {says}", f"hf download {name}, then check again")


class Awaited(EncoderFiles):
    """A published encoder that the run would download: its width is known, its files are not here."""

    @cached_property
    def width(self) -> int:
        return WIDTHS[self.kind][self.name]


def _find_or_await(name: str, *, flag: str, kind: Kind) -> EncoderFiles:
    """What `find_encoder` finds, or what is known of a published encoder where it would download it."""
    if name in WIDTHS[kind] and needs_download(name) and offline_reason("model", name) is None:
        return Awaited(name, flag, Path(name), Path(name), kind)
    return find_encoder(name, flag=flag, kind=kind)


def _awaited(sources: Sources) -> dict[str, Awaited]:
    """The encoders that are not here, by the names of their parts."""
    parts = zip(("text_encoder", "text_encoder_2"), sources.encoders, strict=False)
    return {part: encoder for part, encoder in parts if isinstance(encoder, Awaited)}


def _guidance(config: TrainConfig, sources: Sources) -> str:
    check_teacher(config, sources)
    return f"{config.tdm.cfg:g}"


def _place(sources: Sources, part: str, _: object) -> str:
    return str(sources.folders[part])


def _size(teacher: Pipeline) -> str:
    numel = sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    frames, height, width = teacher.video_shape
    return f"a network of {numel / 1e6:,.0f} million parameters; videos of {frames}x{height}x{width}"


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _evaluator(evaluator: object) -> str:
    return "none, so the student is not measured" if evaluator is None else "measures the student"


def _output(config: TrainConfig) -> str:
    """Whether the run's folder can be written and no other run is in it."""
    folder = config.run.output_dir
    there = _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder}: {there} is no folder that can be written to")
    path = path_to_resume(config)
    if there == folder:
        with locked(folder):
            pass
    return f"{folder}, " + ("from the beginning" if path is None else f"going on from {path}")


def _checkpoint(config: TrainConfig) -> Path | None:
    """What the run would go on from; None also where that is refused, which another row says."""
    try:
        return path_to_resume(config)
    except ValueError:
        return None


def _resume(config: TrainConfig, path: Path, prompts: Sequence[str], teacher: Pipeline) -> str:
    """Whether the checkpoint to go on from is whole and this run's."""
    found = inspect(path, part=-1)  # the sizes of all files; their contents are read when the run goes on
    check_resumable(found, config)
    refuse_another_runs(found, own_flags(config, prompts, teacher), free_flags(config))
    return str(path)


def _existing(folder: Path) -> Path:
    """The folder, or of those around it the first that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _cache(config: TrainConfig, sources: Sources, prompts: Sequence[str]) -> PromptCache:
    """A cache of the longest prompts, which decide a run's memory, with states of zeros."""
    longest = sorted(prompts, key=len, reverse=True)[:FEW_PROMPTS]
    texts = [*longest, config.model.negative_prompt]
    states = [_zeros(encoder, texts) for encoder in sources.encoders]
    (*rows, negative), second = states[0], states[1] if len(states) > 1 else None
    if second is None:
        return PromptCache(tuple(longest), tuple(rows), negative)
    return PromptCache(tuple(longest), tuple(rows), negative, tuple(second[:-1]), second[-1])


def _zeros(files: EncoderFiles, texts: Sequence[str]) -> list[torch.Tensor]:
    """States of zeros of as many tokens as the texts have; of as many as can be where the tokenizer is not here."""
    if isinstance(files, Awaited):
        return [torch.zeros(1 if files.kind == "clip" else LIMITS[files.kind], files.width)] * len(texts)
    lengths = [1 if files.kind == "clip" else len(tokens) for tokens in files.empty().tokenize(texts)]
    return [torch.zeros(length, files.width) for length in lengths]


def _tokens(cache: PromptCache) -> str:
    return f"{max(map(len, cache.embeddings), default=0)} at most in a prompt"


def _memory(
    config: TrainConfig, teacher: Pipeline, cache: PromptCache, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> Row:
    """What the run will hold, as it computes it itself."""
    if config.optimiser.train_batch_size == "auto":
        return Row("memory", "ok", "decides the batch when the run begins")
    n = config.networks

    def estimated() -> Estimate:
        world, shape = planned(n.sharding, n.shard_size, n.context_parallel)
        with pretended(world, shape, device, n.sharding) as ranks:
            return refuse_what_cannot_fit(config, teacher.denoiser, cache, shapes, ranks)

    fix = "--train_batch_size, --activation_checkpointing, --roles lora; or several ranks, which share it"
    return find("memory", fix, estimated).row


def _disk(config: TrainConfig, sources: Sources, teacher: Pipeline, device: torch.device) -> Row:
    """Free disk against checkpoints, as many as are there at a time, and the student's folder."""
    output, run = config.run.output_dir, config.run
    there = _existing(output)
    one = checkpoint_bytes(config, teacher.denoiser, device)
    total = -(-config.optimiser.max_train_steps // run.checkpointing_steps)
    # A new one is whole before the oldest goes.
    count = min(total, (run.checkpoints_total_limit or total) + 1)
    student = sum(4 * parameter.numel() for parameter in teacher.denoiser.parameters())
    awaited = _awaited(sources).keys()
    copied = [
        path
        for part in sources.folders
        if part != sources.family.part and part.replace("tokenizer", "text_encoder") not in awaited
        for path in sources.files_of(part)
        if path.stat().st_dev != there.stat().st_dev  # else they are linked
    ]
    needed = count * one + student + sum(path.stat().st_size for path in copied)
    held = sum(file.stat().st_size for path in checkpoints(output) for file in path.iterdir())
    free = shutil.disk_usage(there).free
    says = f"{count} checkpoints of {gigabytes(one)} and the student take {gigabytes(needed)}"
    if held:
        says += f", {gigabytes(held)} of which are there"
    says += f"; {gigabytes(free)} are free in {there}"
    if needed - held <= free:
        return Row("disk", "ok", says)
    return Row("disk", "failed", says, "--checkpoints_total_limit 1, --roles lora, or an --output_dir on another disk")
