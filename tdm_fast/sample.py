"""Sampling from the command line, and clips of cached prompts for whoever measures or shows them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdm_fast.config import BUNDLED_TEACHER
from tdm_fast.models.loading import Pipeline, load_metrics, load_parts
from tdm_fast.models.sources import Sources
from tdm_fast.philox import randn
from tdm_fast.pipeline import OpenSoraPipeline, choose_timesteps, step_generators, upstream_pipeline
from tdm_fast.prompts import read_prompts
from tdm_fast.samplers import FEW_STEP, make_scheduler
from tdm_fast.step import resolve_device
from tdm_fast.text import PromptCache
from tdm_fast.video import SUFFIXES, captioned, enlarge, grid, to_uint8, write_video


def generate(
    pipeline: Pipeline,
    cache: PromptCache,
    indices: Sequence[int],
    timesteps: Sequence[int],
    *,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 48,
) -> Iterator[Tensor]:
    """Clips of the cached prompts at `indices`, in chunks `[b, T, 3, H, W]`.

    Clip n's noise is a function of (seed, n) alone, so two models given the same seed start from the same noise, and
    the chunk size does not matter. Computed on the pipeline's device, returned as float32 on the CPU.
    """
    sampler = OpenSoraPipeline.of(pipeline)
    sampler.set_progress_bar_config(disable=True)
    return in_batches(sampler, cache, indices, batch_size, timesteps=timesteps, guidance_scale=guidance, seed=seed)


def in_batches(
    pipeline: OpenSoraPipeline, cache: PromptCache, indices: Sequence[int], batch_size: int, **arguments: Any
) -> Iterator[Tensor]:
    """Clips `[b, T, 3, H, W]`, about in [-1, 1], float32 on the CPU; `arguments`, a seed among them, are the call's."""
    for offset in range(0, len(indices), batch_size):
        chunk = indices[offset : offset + batch_size]
        texts: dict[str, Any] = {
            "conditioning": cache.batch(chunk),
            "negative_conditioning": cache.negatives(len(chunk)),
        }
        latents = pipeline(**texts, sample_offset=offset, output_type="latent", **arguments).videos
        yield pipeline.decode(latents).float().cpu()


@dataclass(kw_only=True)
class SampleConfig:
    """What `tdm-fast sample` makes."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; several are set side by side."""
    prompts: Path | None = None
    """File of prompts instead, one a line."""
    model: Path = BUNDLED_TEACHER
    """Folder of a student or a teacher; the bundled teacher if none is named."""
    scheduler: Literal["few-step", "ddpm", "ddim", "euler", "euler-ancestral", "dpm++"] = "few-step"
    """`few-step`: the deterministic trajectory, through a student's own timesteps, or evenly spaced ones for a teacher.
    The others are diffusers' schedulers with the model's noise levels."""
    num_steps: int | None = None
    """Network calls: a student's own number, or 50 for a teacher, if not given."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off. 1 for a student, a teacher's measured best if its folder has one."""
    guidance_rescale: float = 0.0
    """How far to take guided outputs back to the deviation without guidance, 0 (not at all) to 1."""
    num_frames: int | None = None
    """Frames of a video; the model's own number if not given."""
    height: int | None = None
    """Its height in pixels, likewise."""
    width: int | None = None
    """Its width in pixels, likewise."""
    seed: int = 0
    """Seed of the noise."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    batch_size: int = 48
    """Videos that are made at once."""
    enable_tiling: bool = False
    """Decode in pieces of time: less memory for long videos."""
    device: str = "auto"
    """`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one."""
    opensora_source: Literal["native", "upstream"] = "native"
    """Whose transformer and pipeline run: this project's, or those of the package `opensora`, which has no few-step
    sampler."""
    output: Path = Path("sample.mp4")
    """File to write: .mp4, .gif or .png (the frames side by side)."""


def best_guidance(pipeline: Pipeline, num_steps: int) -> float:
    """1 for a student; a teacher's measured best, at few steps or at many; 1 where nothing is known."""
    metrics = load_metrics(pipeline.folder) if pipeline.timesteps is None else None
    if metrics is None:
        return 1.0
    return float(metrics["teacher_few_step" if num_steps <= 8 else "teacher"]["guidance"])


def check_guidance(guidance: float | None) -> None:
    """Raise ValueError for a guidance that is no number."""
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance {guidance}: it takes a finite number; 1 is none")


def sample(config: SampleConfig) -> None:
    """Sample the prompts and write the file. Raises ValueError for what cannot work, before any network runs."""
    if config.output.suffix not in SUFFIXES:
        raise ValueError(f"--output {config.output}: it takes a name that ends in {', '.join(SUFFIXES)}")
    prompts = prompts_of(config)
    check_guidance(config.guidance)
    if not 0 <= config.guidance_rescale <= 1:
        raise ValueError(f"--guidance_rescale {config.guidance_rescale}: it takes 0 (none) to 1")
    if config.batch_size < 1:
        raise ValueError(f"--batch_size {config.batch_size}: it takes a whole number from 1 up")
    if config.opensora_source == "upstream" and config.scheduler == FEW_STEP:
        raise ValueError("--opensora_source upstream: its pipeline has no few-step sampler; name another --scheduler")
    device = resolve_device(config.device)
    sources = replace(Sources.of_folder(config.model), upstream=config.opensora_source == "upstream")
    model = load_parts(sources).to(device)
    few_step = config.scheduler == FEW_STEP
    pipeline = OpenSoraPipeline.of(model, None if few_step else make_scheduler(config.scheduler, model.scheduler))
    timesteps = choose_timesteps(model, config.num_steps) if few_step else None
    num_steps = len(pipeline.sampler(config.num_steps, timesteps).timesteps)
    arguments: dict[str, Any] = {
        "num_frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "num_inference_steps": num_steps,
        "guidance_scale": best_guidance(model, num_steps) if config.guidance is None else config.guidance,
        "guidance_rescale": config.guidance_rescale,
    }
    pipeline.latent_shape(config.num_frames, config.height, config.width)
    if config.enable_tiling:
        pipeline.enable_vae_tiling()
    warn_unknown_words(model.tokenizer, prompts)
    if config.opensora_source == "upstream":
        chunks = with_upstream(pipeline, prompts, config, arguments)
    else:
        pipeline.set_progress_bar_config(disable=None, leave=False)  # None: only where someone can watch it
        cache = PromptCache.encode(prompts, model.tokenizer, model.text_encoder, negative_prompt=config.negative_prompt)
        arguments |= {"timesteps": timesteps, "seed": config.seed}
        chunks = in_batches(pipeline, cache, range(len(cache)), config.batch_size, **arguments)
    clips = [clip if clip.dtype == torch.uint8 else to_uint8(clip) for chunk in chunks for clip in chunk]
    factor = max(1, min(4, 512 // max(clips[0].shape[1:3])))  # small videos are hard to see
    rows = [captioned(enlarge(clip, factor), text) for clip, text in zip(clips, prompts, strict=True)]
    write_video(config.output, grid([rows]))
    print(f"{config.output}: {len(clips)} video(s), {num_steps} steps, guidance {arguments['guidance_scale']:g}")


def prompts_of(config: SampleConfig) -> list[str]:
    """What `--prompt` or `--prompts` say. Raises ValueError for both, neither, and empty prompts."""
    if config.prompts is not None and config.prompt:
        raise ValueError(f"--prompts {config.prompts}: --prompt names prompts as well; leave one out")
    prompts = read_prompts(config.prompts) if config.prompts is not None else list(config.prompt)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt: it takes at least one prompt, none of them empty")
    return prompts


def with_upstream(
    pipeline: OpenSoraPipeline, prompts: Sequence[str], config: SampleConfig, arguments: dict[str, Any]
) -> Iterator[Tensor]:
    """Clips uint8 `[b, T, H, W, 3]` by the upstream package's pipeline, from the noise that ours would start from."""
    upstream = upstream_pipeline(pipeline)
    shape = pipeline.latent_shape(config.num_frames, config.height, config.width)
    time, *space = pipeline.vae_wrapper.strides  # the pipeline looks for the model's size under other names
    height, width = (latents * stride for latents, stride in zip(shape[2:], space, strict=True))
    arguments = {**arguments, "num_frames": (shape[1] - 1) * time + 1, "height": height, "width": width}
    for offset in range(0, len(prompts), config.batch_size):
        chunk = list(prompts[offset : offset + config.batch_size])
        yield upstream(
            prompt=chunk,
            negative_prompt=[config.negative_prompt] * len(chunk),
            latents=randn(len(chunk), shape, seed=config.seed, sample_offset=offset, device=pipeline.device),
            generator=step_generators(config.seed, len(chunk), offset),
            **arguments,
        ).videos


def warn_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say once which words of the prompts the tokenizer does not know; a word-level one reads them all as the same."""
    unknown = tokenizer.unk_token_id
    words = {word for prompt in prompts for word in prompt.split()}
    odd = sorted(word for word in words if unknown in tokenizer(word).input_ids)
    if odd:
        print(
            f"note: this model's vocabulary lacks {', '.join(odd)}; it was not trained on such prompts", file=sys.stderr
        )
