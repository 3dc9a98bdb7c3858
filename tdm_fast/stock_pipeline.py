"""diffusers' own pipelines as samplers of the families that have one, called as `OpenSoraPipeline` is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from tdm_fast.files import read_json
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.families import INDEX_FILE, StockFamily
from tdm_fast.models.loading import Pipeline
from tdm_fast.philox import randn
from tdm_fast.pipeline import check_num_steps, choose_timesteps, step_generators, videos_at_once
from tdm_fast.samplers import FewStepScheduler
from tdm_fast.stock_text import bare_pipeline


class StockSampler:
    """The pipeline of a model's family around its networks, nothing copied, for prompts that are encoded already.

    A student takes its own few steps, any other model those of `scheduler`, or of its own one if none is given.
    """

    def __init__(self, model: Pipeline, scheduler: Any = None) -> None:
        family = model.family
        assert isinstance(family, StockFamily)
        self.model, self.family = model, family
        self.scheduler = model.scheduler if scheduler is None else scheduler
        self.student = model if scheduler is None and model.timesteps is not None else None
        parts = {family.part: model.denoiser.model, "vae": model.vae.vae, "scheduler": self.scheduler}
        self.pipeline = bare_pipeline(read_json(model.folder / INDEX_FILE), parts)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """`(T, H, W)` of what it makes, in frames and pixels; T = 1 of images."""
        return self.model.video_shape

    def set_progress_bar_config(self, **options: Any) -> None:
        """As a diffusers pipeline's."""
        self.pipeline.set_progress_bar_config(**options)

    def enable_vae_tiling(self) -> None:
        """Decode in pieces from now on."""
        vae: Any = self.model.vae.vae
        vae.enable_tiling()

    def sampler(self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None) -> Any:
        """What takes the steps, its `timesteps` set. Raises ValueError for numbers of steps that do not exist."""
        if timesteps is None and self.student is not None:
            timesteps = choose_timesteps(self.student, num_inference_steps, flag="num_inference_steps")
        if timesteps is not None:
            return FewStepScheduler(self.model.schedule, timesteps, self.model.scheduler.config)
        steps = check_num_steps(num_inference_steps, self.scheduler)
        self.scheduler.set_timesteps(steps)
        return self.scheduler

    @torch.no_grad()
    def __call__(
        self,
        *,
        conditioning: Conditioning,
        negative_conditioning: Conditioning,
        seed: int,
        sample_offset: int = 0,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        output_type: str = "latent",
    ) -> Any:
        """`.videos` are latents `[N, C, T, H, W]` or `[N, C, H, W]`; the arguments are `OpenSoraPipeline`'s.

        Raises ValueError for a `guidance_rescale` that the pipeline does not know, and a guidance below 1, which turns
        guidance off in diffusers.
        """
        assert output_type == "latent"
        self.check(guidance_scale, guidance_rescale)
        count, device = len(conditioning), self.device
        negative: Conditioning | None = None
        if guidance_scale != 1:  # of one length, as the pipelines want
            both = Conditioning.cat([conditioning, negative_conditioning.expand(count)]).to(device)
            conditioning, negative = both[:count], both[count:]
        sampler = self.pipeline.scheduler = self.sampler(num_inference_steps, timesteps)
        few_step = isinstance(sampler, FewStepScheduler)  # others may take more timesteps than steps
        steps = len(sampler.timesteps) if few_step else check_num_steps(num_inference_steps, sampler)
        noise = randn(count, self.model.latent_shape, seed=seed, sample_offset=sample_offset, device=device)
        frames, height, width = self.video_shape
        arguments = {"guidance_rescale": guidance_rescale} if guidance_rescale else {}
        output = self.pipeline(
            **self.family.arguments(conditioning.to(device), negative),
            **self.family.pixels(height, width, frames),
            **arguments,
            latents=self.family.stock_layout(noise),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=step_generators(seed, count, sample_offset),
            output_type="latent",
        )
        return diffusers.utils.BaseOutput(videos=self.family.stock_layout(output[0]))

    def check(self, guidance_scale: float, guidance_rescale: float) -> None:
        """Raise ValueError for guidance that the pipeline cannot have."""
        name = type(self.pipeline).__name__
        if guidance_rescale and "guidance_rescale" not in inspect.signature(self.pipeline.__call__).parameters:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; {name} knows none, so it takes 0")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale is {guidance_scale}; {name} takes 1 (none) or more")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to videos `[N, T, 3, H, W]`, about in [-1, 1]; images are videos of one frame."""
        vae = self.model.vae
        parts = latents.to(vae.dtype).split(videos_at_once(self.model.video_shape_of(latents.shape[1:])))
        return torch.cat([vae.decode(part) for part in parts])


def default_guidance(model: Pipeline) -> float:
    """The guidance that the pipeline of a teacher's family takes if none is given."""
    cls = getattr(diffusers, read_json(model.folder / INDEX_FILE)["_class_name"])
    return float(inspect.signature(cls.__call__).parameters["guidance_scale"].default)
