"""From noise to latents: guidance, and one loop for diffusers' schedulers and the few-step trajectory alike."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from tdm_fast.files import read_json
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.sources import SAMPLER_FILE, Sources
from tdm_fast.ops import ode_step
from tdm_fast.schedule import Schedule, compute_dtype

FEW_STEP = "few-step"
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
"""Names of samplers to diffusers' schedulers for models with betas."""
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler"}
"""The same for rectified flow."""
COGVIDEOX_SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler"}
"""The same for models whose noise levels no other scheduler has."""


def trailing_timesteps(num_steps: int, num_train_timesteps: int) -> list[int]:
    """`num_steps` timesteps spaced evenly and descending from the last one ("trailing", arXiv 2305.08891)."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"--num_steps {num_steps}: it takes 1 to {num_train_timesteps}")
    return [round(num_train_timesteps * (1 - i / num_steps)) - 1 for i in range(num_steps)]


class FewStepSampler:
    """The deterministic trajectory through given table indices, called like a scheduler of diffusers.

    The last step ends at x0. `timesteps` are descending; they are a student's own nodes, or any for a teacher.
    """

    init_noise_sigma = 1.0

    def __init__(self, schedule: Schedule, timesteps: Sequence[int]) -> None:
        self.schedule = schedule
        self.timesteps = torch.tensor(list(timesteps))
        self._following = dict(pairwise([*timesteps, -1]))

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents at the next timestep, or x0, from `sample` `[B, ...]` and the raw output at `timestep` (0-d)."""
        t = torch.full((len(sample),), int(timestep), device=sample.device)
        t_next = torch.full_like(t, self._following[int(timestep)])
        return (ode_step(sample, model_output, schedule=self.schedule, t=t, t_next=t_next),)


class FewStepScheduler(FewStepSampler):
    """The same in the pipelines of diffusers, which tell networks what `timesteps` holds.

        pipeline = DiffusionPipeline.from_pretrained("runs/student")
        pipeline.scheduler = FewStepScheduler.from_pretrained("runs/student")
        pipeline(prompt, num_inference_steps=4, guidance_scale=1)

    `config` is that of the scheduler that it takes the place of.
    """

    order = 1

    def __init__(self, schedule: Schedule, timesteps: Sequence[int], config: Any = None) -> None:
        super().__init__(schedule, timesteps)
        self.config = FrozenDict({**(config or {}), "use_dynamic_shifting": False})
        self._nodes = list(timesteps)
        self._told = schedule.timesteps[self.timesteps].tolist()
        self.sigmas = schedule.sigma[self.timesteps]
        self.timesteps = schedule.timesteps[self.timesteps]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> FewStepScheduler:
        """That of a student's folder. Raises ValueError for a folder that holds none."""
        path = Path(folder) / SAMPLER_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {SAMPLER_FILE}; it takes a student's folder, which names its timesteps")
        own = Sources.of_folder(Path(folder)).scheduler_object()
        return cls(Schedule.from_scheduler(own), read_json(path, "timesteps")["timesteps"], own.config)

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Move `timesteps` to a device. Raises ValueError for another number of steps than there are."""
        if num_inference_steps not in (None, len(self._nodes)):
            raise ValueError(f"num_inference_steps is {num_inference_steps}; the student has {len(self._nodes)} steps")
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing to set: where a step is, is told by its timestep."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Networks are given the latents as they are."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """As `FewStepSampler.step`, from one of `timesteps`; `.prev_sample`, or a tuple without `return_dict`."""
        node = self._nodes[self._told.index(float(timestep))]
        (latents,) = super().step(model_output, torch.tensor(node), sample)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)


def make_scheduler(name: str, own: Any) -> Any:
    """The diffusers scheduler of a `SCHEDULERS` name, for a model that was trained with the scheduler `own`.

    Everything that both have in their configs stays (betas, prediction type, zero-terminal SNR, spacing), but for the
    clipping of x0 to [-1, 1], which is for pixels. Raises ValueError for a name that this kind of model cannot take,
    and for a scheduler that does not know `own`'s noise levels.
    """
    names = FLOW_SCHEDULERS if Schedule.from_scheduler(own).prediction_type == "flow" else SCHEDULERS
    if type(own).__name__.startswith("CogVideoX"):
        names = COGVIDEOX_SCHEDULERS
    if name not in names:
        raise ValueError(
            f"--scheduler {name}: the model was trained with a {type(own).__name__}; it takes"
            f" {', '.join([FEW_STEP, *names])}"
        )
    cls = getattr(diffusers, names[name])
    unclipped = {"clip_sample": False} if "clip_sample" in inspect.signature(cls.__init__).parameters else {}
    shift = {"shift": own.config["flow_shift"]} if names is FLOW_SCHEDULERS and "flow_shift" in own.config else {}
    scheduler = cls.from_config(own.config, **unclipped, **shift)
    # Not the last one, where a sampler may keep a little signal of a schedule that ends without any. What `scheduler`
    # has in its config says nothing: from_config also records what the class ignores.
    if names is SCHEDULERS and (scheduler.alphas_cumprod - own.alphas_cumprod)[:-1].abs().max() > 1e-4:
        raise ValueError(
            f"--scheduler {name}: {cls.__name__} cannot have the noise levels of the model's {type(own).__name__};"
            f" --scheduler {FEW_STEP} has them"
        )
    return scheduler


def joined(conditioning: Conditioning, negative: Conditioning | None, guidance: float) -> Conditioning | None:
    """[negative, conditioning] as the one batch of a guided step; None where guidance is 1 or nothing is negative."""
    return Conditioning.cat([negative, conditioning]) if negative is not None and guidance != 1 else None


def guided(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, both: Conditioning, guidance: float, rescale: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(guided output, output with the prompt alone), `[B, ...]`, from one call for `both` `[2B]`.

    Classifier-free guidance (arXiv 2207.12598), in float32 or better whatever the network computes in. With `rescale`
    above 0 the guided output is mixed with itself at the conditional one's standard deviation per sample
    (arXiv 2305.08891, section 3.4), which takes back the overexposure of strong guidance.
    """
    output = denoiser(x_t.repeat(2, *[1] * (x_t.ndim - 1)), t.repeat(2), both)
    unconditional, conditional = output.to(compute_dtype(output)).chunk(2)
    mixed = torch.lerp(unconditional, conditional, guidance)
    if rescale > 0:
        dims = tuple(range(1, mixed.ndim))
        deviations = [output.std(dim=dims, keepdim=True) for output in (conditional, mixed)]
        mixed = torch.lerp(mixed, mixed * (deviations[0] / deviations[1]), rescale)
    return mixed, conditional


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    noise: Tensor,
    sampler: Any,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Latents `[B, ...]` from `noise` of N(0, I), float32 or float64, in the sampler's steps.

    `sampler` is a `FewStepSampler`, or a diffusers scheduler whose timesteps have been set, on the CPU; `generator` is
    what one that adds noise draws it from (one, or one per sample). With `guidance` other than 1 every step also runs
    the negative conditioning, in the same call. `progress` wraps the timesteps.
    """
    both = joined(conditioning, negative, guidance)
    draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    # Schedulers of flow matching start from plain noise and have neither of the two.
    latents = noise * getattr(sampler, "init_noise_sigma", 1.0)
    scale = getattr(sampler, "scale_model_input", lambda sample, _: sample)
    for timestep in progress(sampler.timesteps):
        t = timestep.to(noise.device).expand(len(noise))
        x_t = scale(latents, timestep)
        if both is None:
            output = denoiser(x_t, t, conditioning)
        else:
            output, _ = guided(denoiser, x_t, t, both, guidance, rescale)
        output = output.to(compute_dtype(output))
        latents = sampler.step(output, timestep, latents, **draws, return_dict=False)[0]
    return latents


def sample_latents(
    denoiser: Denoiser,
    latents: Tensor,
    timesteps: Sequence[int],
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Follow the deterministic trajectory through `timesteps` (descending) from pure noise `[B, ...]` to x0."""
    sampler = FewStepSampler(denoiser.schedule, timesteps)
    return denoise(denoiser, latents, sampler, conditioning, negative, guidance)
