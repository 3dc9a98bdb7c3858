"""Sampling: the deterministic few-step trajectory of a student, and the guided many-step one of a teacher."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_fast.config import BUNDLED_TEACHER
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.loading import Pipeline, load_metrics, load_pipeline
from tdm_fast.ops import ode_step
from tdm_fast.philox import randn
from tdm_fast.text import PromptCache
from tdm_fast.video import SUFFIXES, captioned, enlarge, grid, to_uint8, write_video


def trailing_timesteps(num_steps: int, num_train_timesteps: int) -> list[int]:
    """`num_steps` timesteps spaced evenly and descending from the last one ("trailing", arXiv 2305.08891)."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"--num_steps {num_steps}: it takes 1 to {num_train_timesteps}")
    return [round(num_train_timesteps * (1 - i / num_steps)) - 1 for i in range(num_steps)]


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    latents: Tensor,
    timesteps: Sequence[int],
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Follow the deterministic trajectory through `timesteps` (descending) from pure noise to x0.

    latents: `[B, ...]` from N(0, I). With `guidance` other than 1 every step also runs the negative conditioning, in
    the same call, and extrapolates (classifier-free guidance, arXiv 2207.12598). Returns x0 `[B, ...]`.
    """
    both = Conditioning.cat([negative, conditioning]) if negative is not None and guidance != 1 else None
    for t, t_next in pairwise([*timesteps, -1]):
        step = torch.full((len(latents),), t, device=latents.device)
        if both is None:
            output = denoiser(latents, step, conditioning)
        else:
            unconditional, conditional = denoiser(
                latents.repeat(2, *[1] * (latents.ndim - 1)), step.repeat(2), both
            ).chunk(2)
            output = torch.lerp(unconditional, conditional, guidance)
        following = torch.full_like(step, t_next)
        latents = ode_step(latents, output, schedule=denoiser.schedule, t=step, t_next=following)
    return latents


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
    device = pipeline.device
    for offset in range(0, len(indices), batch_size):
        chunk = indices[offset : offset + batch_size]
        noise = randn(len(chunk), pipeline.latent_shape, seed=seed, sample_offset=offset, device=device)
        negative, conditioning = cache.negatives(len(chunk)).to(device), cache.batch(chunk).to(device)
        latents = sample_latents(pipeline.denoiser, noise, timesteps, conditioning, negative, guidance)
        with torch.no_grad():
            clips = pipeline.vae.decode(latents).float().cpu()
        yield clips  # outside of the block, which would otherwise hold for the caller as well


@dataclass(kw_only=True)
class SampleConfig:
    """What `tdm-fast sample` makes."""

    prompt: tuple[str, ...]
    """One or more prompts; several are set side by side."""
    model: Path = BUNDLED_TEACHER
    """Folder of a student or a teacher; the bundled teacher if none is named."""
    num_steps: int | None = None
    """Network calls: a student's own number, or 50 for a teacher, if not given."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off. 1 for a student, a teacher's measured best if its folder has one."""
    seed: int = 0
    """Seed of the noise."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    output: Path = Path("sample.mp4")
    """File to write: .mp4, .gif or .png (the frames side by side)."""


def choose_timesteps(pipeline: Pipeline, num_steps: int | None) -> list[int]:
    """A student's own nodes, or `num_steps` (50 if None) trailing timesteps for a teacher. A student of several numbers
    of steps becomes that of `num_steps`.

    Raises ValueError when a student is asked for a number of steps that it was not trained for.
    """
    if pipeline.timesteps is None:
        return trailing_timesteps(50 if num_steps is None else num_steps, pipeline.schedule.num_train_timesteps)
    if pipeline.trajectories and num_steps is not None:
        pipeline.set_num_steps(num_steps)  # a student of several, which has to be told
    elif num_steps not in (None, len(pipeline.timesteps)):
        raise ValueError(
            f"--num_steps {num_steps}: {pipeline.folder} holds a student of {len(pipeline.timesteps)} steps"
        )
    return list(pipeline.timesteps)


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
    if not config.prompt or not all(prompt.strip() for prompt in config.prompt):
        raise ValueError("--prompt: it takes at least one prompt, none of them empty")
    check_guidance(config.guidance)
    pipeline = load_pipeline(config.model)
    timesteps = choose_timesteps(pipeline, config.num_steps)
    guidance = best_guidance(pipeline, len(timesteps)) if config.guidance is None else config.guidance
    warn_unknown_words(pipeline.tokenizer, config.prompt)
    cache = PromptCache.encode(
        config.prompt, pipeline.tokenizer, pipeline.text_encoder, negative_prompt=config.negative_prompt
    )
    chunks = generate(pipeline, cache, range(len(cache)), timesteps, guidance=guidance, seed=config.seed)
    clips = [enlarge(to_uint8(clip), 4) for chunk in chunks for clip in chunk]
    write_video(config.output, grid([[captioned(clip, text) for clip, text in zip(clips, cache.prompts, strict=True)]]))
    print(f"{config.output}: {len(clips)} video(s), {len(timesteps)} steps, guidance {guidance:g}")


def warn_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say once which words of the prompts the tokenizer does not know; a word-level one reads them all as the same."""
    unknown = tokenizer.unk_token_id
    words = {word for prompt in prompts for word in prompt.split()}
    odd = sorted(word for word in words if unknown in tokenizer(word).input_ids)
    if odd:
        print(
            f"note: this model's vocabulary lacks {', '.join(odd)}; it was not trained on such prompts", file=sys.stderr
        )
