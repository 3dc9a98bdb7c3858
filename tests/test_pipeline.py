"""The pipeline against plain loops in float64 with their own schedulers, and what its arguments mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdm_fast.models.denoiser import count_forwards
from tdm_fast.models.loading import Pipeline, load_pipeline, save_student
from tdm_fast.philox import randn
from tdm_fast.pipeline import OpenSoraPipeline, step_generators
from tdm_fast.samplers import make_scheduler

PROMPTS = ["a small red circle moving left", "a large blue square", "red"]
NODES = (899, 674, 449, 224)
STEPS = 5


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Pipeline:
    return load_pipeline(tiny_teacher)


@pytest.fixture
def student(tiny_teacher: Path, tmp_path: Path) -> Path:
    save_student(tmp_path / "student", load_pipeline(tiny_teacher).denoiser.model, tiny_teacher, NODES)
    return tmp_path / "student"


def made(teacher: Pipeline, name: str | None = None) -> OpenSoraPipeline:
    """A pipeline with the scheduler of that name, or the teacher's own, DDIM."""
    pipeline = OpenSoraPipeline.of(teacher, None if name is None else make_scheduler(name, teacher.scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Plainly:
    """v-prediction with zero-terminal-SNR betas (arXiv 2305.08891) in float64; texts of 512 tokens with masks."""

    def __init__(self, teacher: Pipeline, guidance: float, rescale: float) -> None:
        self.model, encoder = (copy.deepcopy(n).double() for n in (teacher.denoiser.model, teacher.text_encoder))
        self.guidance, self.rescale = guidance, rescale
        tokens = [
            teacher.tokenizer(texts, padding="max_length", max_length=512, return_tensors="pt")
            for texts in (PROMPTS, [""] * len(PROMPTS))
        ]
        self.masks = [each.attention_mask for each in tokens]
        self.texts = [encoder(each.input_ids, each.attention_mask).last_hidden_state for each in tokens]
        root = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
        self.alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        self.timesteps = [999, 799, 599, 399, 199]

    def v(self, x: Tensor, t: float) -> Tensor:
        step = torch.full((len(x),), t)
        plain, negative = (
            self.model(x, step, text[:, None], None, mask[:, None]).sample
            for text, mask in zip(self.texts, self.masks, strict=True)
        )
        mixed = negative + self.guidance * (plain - negative)
        dims = (1, 2, 3, 4)
        rescaled = mixed * plain.std(dims, keepdim=True) / mixed.std(dims, keepdim=True)
        return self.rescale * rescaled + (1 - self.rescale) * mixed

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        bar = self.alpha_bar[t] if t >= 0 else torch.ones((), dtype=torch.float64)
        return bar.sqrt(), (1 - bar).sqrt()

    def ddim(self, x: Tensor, noises: list[Tensor]) -> Tensor:
        for t in self.timesteps:
            (alpha, sigma), (alpha_next, sigma_next), v = self.at(t), self.at(t - 200), self.v(x, t)
            x = alpha_next * (alpha * x - sigma * v) + sigma_next * (sigma * x + alpha * v)
        return x

    def ddpm(self, x: Tensor, noises: list[Tensor]) -> Tensor:
        """Samples of q(x_prev | x_t, x0) (arXiv 2006.11239, equations 6 and 7)."""
        for t, noise in zip(self.timesteps, noises, strict=True):
            (alpha, sigma), (before, below) = self.at(t), self.at(t - 200)
            beta = 1 - (alpha / before) ** 2
            x0 = alpha * x - sigma * self.v(x, t)
            mean = (before * beta * x0 + alpha / before * below**2 * x) / sigma**2
            x = mean + below / sigma * beta.sqrt() * noise
        return x

    def sigmas(self) -> list[Tensor]:
        bar = self.alpha_bar.clone()
        bar[-1] = 2.0**-24  # diffusers keeps this much signal where there is none
        return [*((1 - bar) / bar).sqrt()[self.timesteps], torch.zeros(())]

    def x0_at(self, x: Tensor, t: int, sigma: Tensor) -> Tensor:
        """From x = x0 + sigma * eps, which is x_t times sqrt(sigma^2 + 1)."""
        scale = (sigma**2 + 1).sqrt()
        return x / scale**2 - sigma / scale * self.v(x / scale, t)

    def euler(self, x: Tensor, noises: list[Tensor], *, ancestral: bool = False) -> Tensor:
        sigmas = self.sigmas()
        x = x * sigmas[0]
        for i, (t, noise) in enumerate(zip(self.timesteps, noises, strict=True)):
            x0, (now, then) = self.x0_at(x, t, sigmas[i]), sigmas[i : i + 2]
            up = then * (1 - (then / now) ** 2).sqrt() if ancestral else torch.zeros(())
            x = x0 + (then**2 - up**2).sqrt() / now * (x - x0) + up * noise
        return x

    def euler_ancestral(self, x: Tensor, noises: list[Tensor]) -> Tensor:
        return self.euler(x, noises, ancestral=True)

    def dpm(self, x: Tensor, noises: list[Tensor]) -> Tensor:
        """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); the last step, to no noise at all, is of first order."""
        sigmas, last, h_last = self.sigmas(), None, torch.zeros(())
        for i, t in enumerate(self.timesteps):
            now, then = sigmas[i : i + 2]
            x0 = self.x0_at(x * (now**2 + 1).sqrt(), t, now)
            h = (now / then).log()  # of lambda = -log sigma, for sigma = noise over signal
            towards = x0 if last is None or then == 0 else x0 + (x0 - last) * h / (2 * h_last)
            alpha = 1 / (then**2 + 1).sqrt()
            x = alpha * then / (now / (now**2 + 1).sqrt()) * x + alpha * (1 - then / now) * towards
            last, h_last = x0, h
        return x


LOOPS: dict[str, Callable[[Plainly, Tensor, list[Tensor]], Tensor]] = {
    "ddim": Plainly.ddim,
    "ddpm": Plainly.ddpm,
    "euler": Plainly.euler,
    "euler-ancestral": Plainly.euler_ancestral,
    "dpm++": Plainly.dpm,
}


@pytest.mark.parametrize(("guidance", "rescale"), [(3.0, 0.0), (4.5, 0.7)])
@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_a_scheduler_takes_its_steps(teacher: Pipeline, name: str, guidance: float, rescale: float) -> None:
    shape = (len(PROMPTS), *teacher.latent_shape)
    generators = step_generators(3, len(PROMPTS))
    noises = [torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).double() for _ in range(STEPS)]
    exact = LOOPS[name](Plainly(teacher, guidance, rescale), randn(len(PROMPTS), shape[1:], seed=3).double(), noises)
    pipeline = made(teacher, name)
    with count_forwards(pipeline.denoiser) as count:
        ours = pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            seed=3,
            output_type="latent",
        ).videos
    assert (count.calls, count.samples) == (STEPS, STEPS * 2 * len(PROMPTS))
    assert ours.dtype == torch.float32
    error = float((ours - exact).abs().max() / exact.abs().max())
    assert error < 2e-3, error
