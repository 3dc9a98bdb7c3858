"""Sampling from the command line, and clips of cached prompts for whoever measures or shows them."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import arg

from tdm_fast.attention import Name as AttentionName
from tdm_fast.attention import choose, set_attention
from tdm_fast.config import BUNDLED_TEACHER, ModelConfig
from tdm_fast.encoders import EncoderFiles
from tdm_fast.models.families import OPENSORA
from tdm_fast.models.loading import Pipeline, load_metrics, load_parts
from tdm_fast.models.roles import cast_frozen
from tdm_fast.models.sources import Sources
from tdm_fast.philox import randn
from tdm_fast.pipeline import (
    OpenSoraPipeline,
    choose_timesteps,
    step_generators,
    upstream_pipeline,
    videos_at_once,
)
from tdm_fast.prompts import read_prompts
from tdm_fast.samplers import FEW_STEP, make_scheduler
from tdm_fast.step import resolve_device
from tdm_fast.stock_pipeline import StockSampler, default_guidance
from tdm_fast.text import PromptCache
from tdm_fast.video import SUFFIXES, captioned, enlarge, enlargement, grid, to_uint8, write_video

MOST_AT_ONCE = 48
UNMEASURED_GUIDANCE = 7.5  # Open-Sora Plan's own


def generate(
    pipeline: Pipeline,
    cache: PromptCache,
    indices: Sequence[int],
    timesteps: Sequence[int],
    *,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Clips of the cached prompts at `indices`, in chunks `[b, T, 3, H, W]`.

    Clip n's noise is a function of (seed, n) alone, so two models given the same seed start from the same noise, and
    the chunk size does not matter: up to 48, and a single one of large clips, if not given. Computed on the pipeline's
    device, with autocast to a `dtype` other than float32, and returned as float32 on the CPU.
    """
    sampler = sampler_of(pipeline)
    sampler.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"timesteps": timesteps, "guidance_scale": guidance, "seed": seed}
    return in_batches(sampler, cache, indices, chosen_batch(sampler, batch_size), dtype, **arguments)


def sampler_of(model: Pipeline, scheduler: Any = None) -> OpenSoraPipeline | StockSampler:
    """What makes videos with a model: this project's pipeline for Open-Sora Plan, diffusers' for its families."""
    return (OpenSoraPipeline.of if model.family is OPENSORA else StockSampler)(model, scheduler)


def chosen_batch(pipeline: OpenSoraPipeline | StockSampler, batch_size: int | None) -> int:
    """`batch_size`, or if not given up to 48, as many as are made at once of the pipeline's own size."""
    return min(MOST_AT_ONCE, videos_at_once(pipeline.video_shape)) if batch_size is None else batch_size


def in_batches(
    pipeline: OpenSoraPipeline | StockSampler,
    cache: PromptCache,
    indices: Sequence[int],
    batch_size: int,
    dtype: torch.dtype,
    **arguments: Any,
) -> Iterator[Tensor]:
    """Clips `[b, T, 3, H, W]`, about in [-1, 1], float32 on the CPU; `arguments`, a seed among them, are the call's."""
    for offset in range(0, len(indices), batch_size):
        chunk = indices[offset : offset + batch_size]
        texts: dict[str, Any] = {
            "conditioning": cache.batch(chunk),
            "negative_conditioning": cache.negatives(len(chunk)),
        }
        with autocast(pipeline.device, dtype):
            latents = pipeline(**texts, sample_offset=offset, output_type="latent", **arguments).videos
            clips = pipeline.decode(latents)
        yield clips.float().cpu()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Networks compute in `dtype`; float32 is as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(kw_only=True)
class SampleConfig:
    """What `tdm-fast sample` makes."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; several are set side by side."""
    prompts: Path | None = None
    """File of prompts instead, one a line, or a table, as for `train`."""
    prompt_column: str | None = None
    """The column of such a file, if it is a table, that holds the prompts; found by its name if not given."""
    model: Path = BUNDLED_TEACHER
    """A student's or a teacher's folder, or as for `train` a transformer's, or a name; the bundled teacher if none is
    named."""
    model_path: Path | None = None
    """Folder of the transformer's weights where `--model` is a name."""
    ae: str | None = None
    """The VAE's name, such as WFVAEModel_D8_4x8x8, which `--ae_path` has to hold."""
    ae_path: Path | None = None
    """The VAE's folder; the model's own if not given."""
    text_encoder_name_1: str | None = None
    """T5, mT5 or UMT5: a hub name, or a folder with model and tokenizer; the model's own if not given."""
    text_encoder_name_2: str | None = None
    """A second encoder (CLIP), for a transformer that takes two."""
    scheduler: Literal["few-step", "ddpm", "ddim", "euler", "euler-ancestral", "dpm++"] = "few-step"
    """`few-step`: the deterministic trajectory, through a student's own timesteps, or evenly spaced ones for a teacher.
    The others are diffusers' schedulers with the model's noise levels."""
    num_steps: int | None = None
    """Network calls: a student's own number, or 50 for a teacher, if not given."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off. If not given 1 for a student, a teacher's measured best if its folder
    has one, else 7.5, or what its pipeline in diffusers takes."""
    guidance_rescale: float = 0.0
    """How far to take guided outputs back to the deviation without guidance, 0 (not at all) to 1."""
    num_frames: int | None = None
    """Frames of a video; the model's own number if not given."""
    height: Annotated[int | None, arg(aliases=["--max-height"])] = None
    """Its height in pixels, likewise."""
    width: Annotated[int | None, arg(aliases=["--max-width"])] = None
    """Its width in pixels, likewise."""
    seed: int = 0
    """Seed of the noise."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    batch_size: int | None = None
    """Videos that are made at once; up to 48, and one of large ones, if not given."""
    enable_tiling: bool = False
    """Decode in pieces of time: less memory for long videos. Large ones are, where it changes nothing."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What transformer and text encoders are kept in, and the VAE computes in; `auto` takes bfloat16 on a GPU."""
    attention: AttentionName = "auto"
    """What computes the transformer's attention, as for `train`."""
    device: str = "auto"
    """`cuda`, `cuda:1`, `cpu`; `auto` takes a GPU if there is one."""
    opensora_source: Literal["native", "upstream"] = "native"
    """Whose transformer and pipeline run: this project's, or those of the package `opensora`, which has no few-step
    sampler."""
    output: Path = Path("sample.mp4")
    """File to write: .mp4, .gif or .png (the frames side by side)."""


def best_guidance(pipeline: Pipeline, num_steps: int) -> float:
    """1 for a student; a teacher's measured best, at few steps or at many; its pipeline's where none is known."""
    if not pipeline.sources.knows_null_prompt:
        return 1.0
    metrics = load_metrics(pipeline.folder)
    if metrics is None:
        return UNMEASURED_GUIDANCE if pipeline.family is OPENSORA else default_guidance(pipeline)
    return float(metrics["teacher_few_step" if num_steps <= 8 else "teacher"]["guidance"])


def check_guidance(guidance: float | None) -> None:
    """Raise ValueError for a guidance that is no number."""
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance {guidance}: it takes a finite number; 1 is none")


def check_output(output: Path) -> None:
    """Raise ValueError for a file of another kind, and for one that cannot be written."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: it takes a name that ends in {', '.join(SUFFIXES)}")
    if output.is_dir():
        raise ValueError(f"--output {output}: it is a folder; it takes the name of a file")
    there = next(path for path in output.absolute().parents if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # what os.access says is not true of every file system
            pass
    except OSError as error:
        raise ValueError(
            f"--output {output}: nothing can be written to {there} ({error.strerror}); name another folder"
        ) from error


def check_flags(config: SampleConfig) -> None:
    """Raise ValueError for what cannot work whatever the model."""
    check_output(config.output)
    check_guidance(config.guidance)
    if not 0 <= config.guidance_rescale <= 1:
        raise ValueError(f"--guidance_rescale {config.guidance_rescale}: it takes 0 (none) to 1")
    if config.batch_size is not None and config.batch_size < 1:
        raise ValueError(f"--batch_size {config.batch_size}: it takes a whole number from 1 up")
    if config.opensora_source == "upstream" and config.scheduler == FEW_STEP:
        raise ValueError("--opensora_source upstream: its pipeline has no few-step sampler; name another --scheduler")


def sources_of(config: SampleConfig) -> Sources:
    """Where the model's parts are. Raises ValueError, naming the flag, for what is missing or of another model."""
    names = ("model", "model_path", "ae", "ae_path", "text_encoder_name_1", "text_encoder_name_2", "opensora_source")
    size: dict[str, Any] = {"num_frames": config.num_frames, "max_height": config.height, "max_width": config.width}
    return Sources.of_flags(ModelConfig(**{name: getattr(config, name) for name in names}, **size))


def sample(config: SampleConfig) -> None:
    """Sample the prompts and write the file. Raises ValueError for what cannot work, before any weights are read."""
    check_flags(config)
    prompts = prompts_of(config)
    device, upstream = resolve_device(config.device), config.opensora_source == "upstream"
    half = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    sources = sources_of(config)
    # Configs and headers alone; the shapes of the package's transformer are those of ours.
    empty = load_parts(replace(sources, upstream=False), empty={"transformer", "vae", "text_encoder"})
    prepare(empty, config)
    chosen = choose(config.attention, empty.denoiser.model, device, dtype)
    # The encoders are gone before the other networks come; the package's pipeline encodes by itself.
    cache = None if upstream else encode(empty.encoders, prompts, config.negative_prompt, device, dtype)
    model = load_parts(sources, empty=set() if upstream else {"text_encoder"})
    cast_frozen(model.denoiser.model, dtype)
    set_attention(model.denoiser.model, chosen.backend)
    if model.text_encoder is not None:
        model.text_encoder.to(dtype)
    pipeline, arguments = prepare(model.to(device), config)
    if config.enable_tiling:
        pipeline.enable_vae_tiling()
    batch_size = chosen_batch(pipeline, config.batch_size)
    if cache is None:
        assert isinstance(pipeline, OpenSoraPipeline)
        chunks = with_upstream(pipeline, prompts, config, batch_size, dtype, arguments)
    else:
        pipeline.set_progress_bar_config(disable=None, leave=False)  # None: only where someone can watch it
        chunks = in_batches(pipeline, cache, range(len(cache)), batch_size, dtype, seed=config.seed, **arguments)
    clips = [clip if clip.dtype == torch.uint8 else to_uint8(clip) for chunk in chunks for clip in chunk]
    factor = enlargement(clips[0], most=4)  # small videos are hard to see
    rows = [captioned(enlarge(clip, factor), text) for clip, text in zip(clips, prompts, strict=True)]
    write_video(config.output, grid([rows]))
    steps, guidance = arguments["num_inference_steps"], arguments["guidance_scale"]
    print(f"{config.output}: {len(clips)} video(s), {steps} steps, guidance {guidance:g}")


def prepare(model: Pipeline, config: SampleConfig) -> tuple[OpenSoraPipeline | StockSampler, dict[str, Any]]:
    """What makes the videos, and the arguments of its calls; the model's networks may still be without weights.

    Raises ValueError for a scheduler or a number of steps that the model cannot take.
    """
    few_step = config.scheduler == FEW_STEP
    pipeline = sampler_of(model, None if few_step else make_scheduler(config.scheduler, model.scheduler))
    timesteps = choose_timesteps(model, config.num_steps) if few_step else None
    num_steps = len(pipeline.sampler(config.num_steps, timesteps).timesteps)
    guidance = best_guidance(model, num_steps) if config.guidance is None else config.guidance
    if isinstance(pipeline, StockSampler):
        pipeline.check(guidance, config.guidance_rescale)
    return pipeline, {
        "num_inference_steps": num_steps,
        "timesteps": timesteps,
        "guidance_scale": guidance,
        "guidance_rescale": config.guidance_rescale,
    }


def encode(
    encoders: Sequence[EncoderFiles],
    prompts: Sequence[str],
    negative_prompt: str,
    device: torch.device,
    dtype: torch.dtype,
) -> PromptCache:
    """The prompts by one or two text encoders, which are in memory no longer than that."""
    loaded = [files.load(dtype) for files in encoders]
    warn_unknown_words(loaded[0].tokenizer, prompts)
    for encoder in loaded:
        encoder.model.to(device)
    return PromptCache.encode_with(loaded, prompts, negative_prompt=negative_prompt)


def prompts_of(config: SampleConfig) -> list[str]:
    """What `--prompt` or `--prompts` say. Raises ValueError for both, neither, and empty prompts."""
    if config.prompts is not None and config.prompt:
        raise ValueError(f"--prompts {config.prompts}: --prompt names prompts as well; leave one out")
    file = config.prompts
    prompts = read_prompts(file, config.prompt_column) if file is not None else list(config.prompt)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt: it takes at least one prompt, none of them empty")
    return prompts


def with_upstream(
    pipeline: OpenSoraPipeline,
    prompts: Sequence[str],
    config: SampleConfig,
    batch_size: int,
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> Iterator[Tensor]:
    """Clips uint8 `[b, T, H, W, 3]` by the upstream package's pipeline, from the noise that ours would start from."""
    upstream = upstream_pipeline(pipeline)
    warn_unknown_words(pipeline.tokenizer, prompts)
    shape = pipeline.latent_shape(None, None, None)
    frames, height, width = pipeline.video_shape  # the pipeline looks for the model's size under other names
    arguments = {name: value for name, value in arguments.items() if name != "timesteps"}
    for offset in range(0, len(prompts), batch_size):
        chunk = list(prompts[offset : offset + batch_size])
        with autocast(pipeline.device, dtype):
            output = upstream(
                prompt=chunk,
                negative_prompt=[config.negative_prompt] * len(chunk),
                num_frames=frames,
                height=height,
                width=width,
                latents=randn(len(chunk), shape, seed=config.seed, sample_offset=offset, device=pipeline.device),
                generator=step_generators(config.seed, len(chunk), offset),
                **arguments,
            )
        yield output.videos


def warn_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say once which words of the prompts the tokenizer does not know; a word-level one reads them all as the same."""
    unknown = tokenizer.unk_token_id
    if unknown in tokenizer("").input_ids:  # CLIP's is the one that ends every prompt
        return
    words = {word for prompt in prompts for word in prompt.split()}
    odd = sorted(word for word in words if unknown in tokenizer(word).input_ids)
    if odd:
        print(
            f"note: this model's vocabulary lacks {', '.join(odd)}; it was not trained on such prompts", file=sys.stderr
        )
