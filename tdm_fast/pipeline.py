"""`OpenSoraPipeline`: prompts to videos with a teacher or a student, as users of diffusers know it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from tdm_fast.config import ModelConfig
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.loading import Pipeline, load_parts
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser, say_unused, takes_two
from tdm_fast.models.sizes import units
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student
from tdm_fast.models.vae import VAEWrapper
from tdm_fast.philox import randn, random_integers
from tdm_fast.samplers import FewStepSampler, denoise, trailing_timesteps
from tdm_fast.schedule import Schedule
from tdm_fast.text import MAX_LENGTH, encode_prompts, pad

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Philox's stream that seeds what a scheduler draws in its steps; stream 0 is the noise that sampling starts from.
STEPS_STREAM = 1
# Frames x height x width of the videos that are made at once: 48 of tiny-shapes. A VAE of 128 base channels takes about
# 0.7 kB for each.
PIXELS_AT_ONCE = 48 * 17 * 64 * 64


def videos_at_once(video_shape: Sequence[int]) -> int:
    """How many videos of `(T, H, W)` frames and pixels are made at once where nobody says it: 1 of large ones."""
    return max(1, PIXELS_AT_ONCE // math.prod(video_shape))


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """Videos `[N, T, 3, H, W]` in [0, 1] ("pt"), `[N, T, H, W, 3]` ("np"), frames ("pil"), or latents ("latent")."""

    videos: Any


def choose_timesteps(pipeline: Pipeline, num_steps: int | None, *, flag: str = "--num_steps") -> list[int]:
    """A student's own nodes, or `num_steps` (50 if None) trailing timesteps for a teacher. A student of several numbers
    of steps becomes that of `num_steps`.

    Raises ValueError, naming `flag`, when a student is asked for a number of steps that it was not trained for.
    """
    if pipeline.timesteps is None:
        return trailing_timesteps(50 if num_steps is None else num_steps, pipeline.schedule.num_train_timesteps)
    if pipeline.trajectories and num_steps is not None:
        pipeline.set_num_steps(num_steps)  # a student of several, which has to be told
    elif num_steps not in (None, len(pipeline.timesteps)):
        raise ValueError(f"{flag} {num_steps}: {pipeline.folder} holds a student of {len(pipeline.timesteps)} steps")
    return list(pipeline.timesteps)


def check_num_steps(num_inference_steps: int | None, scheduler: Any) -> int:
    """A scheduler's number of steps, 50 if None. Raises ValueError for one that it cannot take."""
    steps, most = 50 if num_inference_steps is None else num_inference_steps, scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"num_inference_steps is {steps}; it takes 1 to {most}")
    return steps


class OpenSoraPipeline(DiffusionPipeline):
    """Open-Sora Plan's text-to-video pipeline for the transformer and the VAE of this project.

    A student's folder gives one that samples in the student's few steps, any other takes the steps of `scheduler`, a
    scheduler of diffusers (DDPM, DDIM, Euler, Euler-ancestral, DPM-Solver++, flow matching). `vae` is a wrapper as in
    `tdm_fast.models.vae`. Large videos are decoded one by one, and in pieces of time where the VAE's norms allow it;
    `enable_vae_tiling` has all decoded in pieces. `text_encoder_2` is for transformers that take
    two encoders' states, which Open-Sora Plan v1.3's does not: there it is not run, which is said once.
    """

    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]  # noqa: RUF012

    def __init__(
        self,
        transformer: nn.Module,
        vae: VAEWrapper,
        scheduler: Any,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        text_encoder_2: nn.Module | None = None,
        tokenizer_2: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae.vae,  # what has a config and can be saved; the wrapper's numbers are that config's
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.vae_wrapper = vae
        self.denoiser = OpenSoraDenoiser(transformer, Schedule.from_scheduler(scheduler))
        self.student: Pipeline | None = None
        """What knows the timesteps of the student that it samples as; None for the scheduler's steps."""

    @classmethod
    def of(cls, model: Pipeline, scheduler: Any = None) -> Self:
        """Around networks that are loaded already, nothing is copied. With a `scheduler` a student takes its steps."""
        steps = model.scheduler if scheduler is None else scheduler
        wanted = model.text_encoder is not None and takes_two(model.denoiser.model)
        second = model.encoders[1].load() if wanted else None
        pipeline = cls(
            model.denoiser.model,
            model.vae,
            steps,
            model.text_encoder,
            model.tokenizer,
            None if second is None else second.model,
            None if second is None else second.tokenizer,
        )
        assert isinstance(model.denoiser, OpenSoraDenoiser)
        pipeline.denoiser = model.denoiser
        pipeline.student = model if scheduler is None and model.timesteps is not None else None
        return pipeline

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike[str],
        *,
        ae_path: str | os.PathLike[str] | None = None,
        text_encoder_name_1: str | None = None,
        text_encoder_name_2: str | None = None,
    ) -> Self:
        """Load a teacher's or a student's folder, checked as `load_parts` does, onto the CPU in float32.

        A transformer's folder takes its VAE's folder and its text encoder (a folder or a hub name) beside it, named
        as the commands' flags; in a pipeline's folder they replace its own.
        """
        flags = ModelConfig(
            model=Path(folder),
            ae_path=None if ae_path is None else Path(ae_path),
            text_encoder_name_1=text_encoder_name_1,
            text_encoder_name_2=text_encoder_name_2,
        )
        return cls.of(load_parts(Sources.of_flags(flags)))

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Write a folder that `from_pretrained` and the commands load; `options` are diffusers', for a teacher."""
        if self.student is None:
            super().save_pretrained(folder, **options)
            return
        nodes = self.student.trajectories or self.student.timesteps
        assert nodes is not None
        save_student(Path(folder), self.transformer, self.student.sources, nodes, biases=self.student.biases or None)

    def enable_vae_tiling(self) -> None:
        """Decode in pieces of time from now on: memory no longer grows with a video's length."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole videos again, but for large ones of a VAE to which it makes no difference."""
        self.vae.disable_tiling()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_samples_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        sample_offset: int = 0,
        latents: Tensor | None = None,
        conditioning: Conditioning | None = None,
        negative_conditioning: Conditioning | None = None,
        max_sequence_length: int = MAX_LENGTH,
        output_type: str = "pil",
        timesteps: Sequence[int] | None = None,
    ) -> OpenSoraPipelineOutput:
        """Sample `num_samples_per_prompt` videos of each prompt, N in all, those of one prompt side by side.

        Args:
            prompt: one or several; what exceeds `max_sequence_length` tokens is cut off. Or `conditioning`, encoded.
            negative_prompt: what guidance leads away from, one for all or one per prompt. Or `negative_conditioning`.
            num_frames, height, width: of the video; the transformer's own size if not given.
            num_inference_steps: a student's own, or 50, if not given.
            guidance_scale: classifier-free guidance (arXiv 2207.12598), 1 is none; 1 for a student and 7.5 otherwise
                if not given. Negative and prompt go through the network in one call, in this order.
            guidance_rescale: how far to go back to the deviation without guidance (arXiv 2305.08891), 0 to 1.
            generator: torch's, one or one per video, for the noise to start from and what a scheduler adds.
            seed: instead of a generator: video i's noise is a function of (`seed`, `sample_offset` + i) alone, however
                prompts are batched. Without either torch's global generator draws.
            latents: noise `[N, C, T', H', W']` of N(0, I) to start from instead.
            output_type: "pil", "np", "pt" or "latent".
            timesteps: follow the deterministic trajectory through these, descending, instead of the scheduler.

        Raises:
            ValueError: for what cannot work, naming it, before any network runs.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it takes one of {', '.join(OUTPUT_TYPES)}")
        if guidance_scale is None:
            guidance_scale = 1.0 if self.student is not None else 7.5
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it takes a finite number, 1 for none")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; it takes 0 (none) to 1")
        if num_samples_per_prompt < 1:
            raise ValueError(f"num_samples_per_prompt is {num_samples_per_prompt}; it must be at least 1")
        if generator is not None and seed is not None:
            raise ValueError(f"generator and seed {seed} are both given; leave one out")
        shape = self.latent_shape(num_frames, height, width, latents)
        sampler = self.sampler(num_inference_steps, timesteps)
        given = (conditioning, negative_conditioning)
        conditioning, negative = self._texts(prompt, negative_prompt, *given, guidance_scale, max_sequence_length)
        conditioning = _repeated(conditioning, num_samples_per_prompt)
        batch_size, device = len(conditioning), self._execution_device
        if latents is None:
            latents = self._noise(batch_size, shape, generator, seed, sample_offset)
        elif latents.shape != (batch_size, *shape):
            raise ValueError(f"latents have shape {tuple(latents.shape)}; it must be {(batch_size, *shape)}")
        latents = denoise(
            self.denoiser,
            latents.to(device),
            sampler,
            conditioning.to(device),
            None if negative is None else _repeated(negative, num_samples_per_prompt).to(device),
            guidance_scale,
            guidance_rescale,
            generator=generator if seed is None else step_generators(seed, batch_size, sample_offset),
            progress=self.progress_bar,
        )
        videos: Any = latents
        if output_type != "latent":
            frames = self.decode(latents).transpose(1, 2).float()
            videos = VideoProcessor(vae_scale_factor=1).postprocess_video(frames, output_type=output_type)
        return OpenSoraPipelineOutput(videos=videos)

    def _texts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str],
        conditioning: Conditioning | None,
        negative: Conditioning | None,
        guidance_scale: float,
        max_sequence_length: int,
    ) -> tuple[Conditioning, Conditioning | None]:
        """What is given, or encoded, of prompts and negative prompts; of the latter as many as of the former."""
        if (prompt is None) == (conditioning is None):
            raise ValueError("give either prompt or conditioning")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        count = len(prompts) if conditioning is None else len(conditioning)
        if count == 0:
            raise ValueError("prompt is an empty list; it takes at least one")
        if guidance_scale == 1:
            negatives, negative = [], None
        elif negative is None and self.text_encoder is None:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but there is no text encoder for the null prompt: give"
                " negative_conditioning, or 1 for no guidance"
            )
        elif negative is None and len(negatives) not in (1, count):
            raise ValueError(f"negative_prompt has {len(negatives)} prompts beside {count}; it takes 1 or as many")
        if conditioning is None:
            conditioning = self.encode(prompts, max_sequence_length)
        if negatives and negative is None:
            negative = self.encode(negatives, max_sequence_length)
        return conditioning, None if negative is None else negative.expand(count)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[N, C, T', H', W']` to videos `[N, T, 3, H, W]`, about in [-1, 1]."""
        shape = self._video_shape(latents.shape[2:])
        in_pieces, vae = self.vae.use_tiling, self.vae
        if vae.tiling_is_exact and math.prod(shape) > PIXELS_AT_ONCE:
            vae.enable_tiling()
        try:
            parts = latents.to(vae.dtype).split(videos_at_once(shape))
            return torch.cat([self.vae_wrapper.decode(part) for part in parts])
        finally:
            vae.use_tiling = in_pieces

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int = MAX_LENGTH) -> Conditioning:
        """Prompts to conditioning, padded to the longest of them only: the mask would hide the rest of 512 tokens.

        Raises ValueError without a text encoder, and for a length below 1.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: give conditioning instead of prompts")
        if max_sequence_length < 1:
            raise ValueError(f"max_sequence_length is {max_sequence_length}; it must be at least 1")
        rows = encode_prompts(prompts, self.tokenizer, self.text_encoder, max_length=max_sequence_length)
        if self.text_encoder_2 is None:
            return pad(rows)
        if not takes_two(self.transformer):
            say_unused(type(self.transformer).__name__)
            return pad(rows)
        return pad(rows, encode_prompts(prompts, self.tokenizer_2, self.text_encoder_2))

    def latent_shape(
        self, num_frames: int | None, height: int | None, width: int | None, latents: Tensor | None = None
    ) -> tuple[int, ...]:
        """`(C, T', H', W')` of a video; an axis that is not given is that of `latents`, else the transformer's own.

        Raises ValueError, with the nearest lengths that fit, for one that VAE and patches do not divide.
        """
        config = self.transformer.config
        own = (config.sample_size_t, config.sample_size_h, config.sample_size_w)
        shape = [config.in_channels, *(own if latents is None else latents.shape[2:])]
        lengths = {"num_frames": num_frames, "height": height, "width": width}
        axes = zip(lengths.items(), units(self.vae_wrapper.strides, config.patch_size), strict=True)
        for axis, ((name, length), unit) in enumerate(axes, start=1):
            if length is not None:
                shape[axis] = unit.latents(length, f"{name} is {length}")
        return tuple(shape)

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """`(T, H, W)` of the transformer's own size of videos, in frames and pixels."""
        return self._video_shape(self.latent_shape(None, None, None)[1:])

    def _video_shape(self, latents: Sequence[int]) -> tuple[int, int, int]:
        """`(T, H, W)` of the videos of such latents."""
        axes = units(self.vae_wrapper.strides, self.transformer.config.patch_size)
        frames, height, width = (unit.pixels(size) for unit, size in zip(axes, latents, strict=True))
        return frames, height, width

    def sampler(self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None) -> Any:
        """What takes the steps, its `timesteps` set. Raises ValueError for numbers of steps that do not exist."""
        if timesteps is None and self.student is not None:
            timesteps = choose_timesteps(self.student, num_inference_steps, flag="num_inference_steps")
        if timesteps is not None:
            return FewStepSampler(self.denoiser.schedule, timesteps)
        self.scheduler.set_timesteps(check_num_steps(num_inference_steps, self.scheduler))
        return self.scheduler

    def _noise(
        self,
        batch_size: int,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        seed: int | None,
        sample_offset: int,
    ) -> Tensor:
        device = self._execution_device
        if seed is not None:
            return randn(batch_size, shape, seed=seed, sample_offset=sample_offset, device=device)
        return randn_tensor((batch_size, *shape), generator=generator, device=device, dtype=torch.float32)


def upstream_pipeline(pipeline: OpenSoraPipeline) -> Any:
    """The package `opensora`'s own pipeline around the same parts. Raises ValueError when it cannot be imported.

    It takes the steps of the diffusers scheduler and knows no few-step student.
    """
    try:
        with _old_tokenizer():
            module = import_module("opensora.sample.pipeline_opensora")
    except ImportError as error:
        raise ValueError(
            f"--opensora_source upstream: the package opensora's pipeline does not import here ({error}); install what"
            " it lacks, or use --opensora_source native"
        ) from error
    vae: Any = pipeline.vae_wrapper
    vae.vae_scale_factor = vae.strides  # where that code looks for them
    names = ["text_encoder", "tokenizer", "transformer", "scheduler"]
    names += ["text_encoder_2", "tokenizer_2"] if pipeline.text_encoder_2 is not None else []
    parts = {name: getattr(pipeline, name) for name in names}
    return module.OpenSoraPipeline(vae=vae, **parts)


@contextmanager
def _old_tokenizer() -> Iterator[None]:
    """Have transformers 5 hand out a class that it has dropped: the package names it as a type and nothing else."""
    there: Any = transformers
    if hasattr(there, "MT5Tokenizer"):
        yield
        return
    there.MT5Tokenizer = transformers.T5Tokenizer
    try:
        yield
    finally:
        del there.MT5Tokenizer


def step_generators(seed: int, batch_size: int, sample_offset: int = 0) -> list[torch.Generator]:
    """A generator per sample for what a scheduler draws: a function of the seed and the sample's global index."""
    words = random_integers((1,), batch_size, seed=seed, stream=STEPS_STREAM, sample_offset=sample_offset)
    return [torch.Generator().manual_seed(int(word)) for word in words]


def _repeated(conditioning: Conditioning, times: int) -> Conditioning:
    """Every sample `times` times in a row."""
    return conditioning[torch.arange(len(conditioning)).repeat_interleave(times)]
