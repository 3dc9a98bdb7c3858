"""The pipeline against plain loops in float64 with their own schedulers, and what its arguments mean."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from tdm_fast.models.denoiser import count_forwards
from tdm_fast.models.loading import Pipeline, load_pipeline
from tdm_fast.models.student import save_student
from tdm_fast.notes import say_once
from tdm_fast.philox import randn
from tdm_fast.pipeline import OpenSoraPipeline, step_generators
from tdm_fast.sample import SampleConfig, sample
from tdm_fast.samplers import make_scheduler, sample_latents

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
    # Euler's start from 4096 times the noise costs digits; the others have float32's rounding in network and tables.
    assert error < (1e-3 if name.startswith("euler") else 1e-4), error


@torch.no_grad()
def test_a_video_does_not_depend_on_what_it_is_made_with(teacher: Pipeline) -> None:
    pipeline = made(teacher, "euler-ancestral")
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "seed": 5, "output_type": "latent"}
    whole = pipeline(PROMPTS, **arguments).videos
    for i, prompt in enumerate(PROMPTS):
        alone = pipeline(prompt, sample_offset=i, **arguments).videos
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-3, atol=1e-3)
    assert torch.equal(pipeline(PROMPTS, **arguments).videos, whole)
    other = pipeline(PROMPTS, **{**arguments, "seed": 6}).videos
    assert (other - whole).abs().mean() > 0.1


@torch.no_grad()
def test_samples_of_a_prompt_lie_side_by_side(teacher: Pipeline) -> None:
    pipeline = made(teacher)
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    noise = randn(4, teacher.latent_shape, seed=1)
    negatives = ["a large blue square", ""]
    twice = pipeline(PROMPTS[:2], negatives, num_samples_per_prompt=2, latents=noise, **arguments).videos
    for i, row in enumerate(twice):
        alone = pipeline(PROMPTS[i // 2], negatives[i // 2], latents=noise[i : i + 1], **arguments).videos
        torch.testing.assert_close(alone[0], row, rtol=1e-4, atol=1e-4)
    assert (twice[0] - twice[1]).abs().mean() > 0.1, "the same prompt, but other noise"
    unguided = {**arguments, "guidance_scale": 1.0}
    assert torch.equal(
        pipeline(PROMPTS[0], negatives[0], latents=noise[:1], **unguided).videos,
        pipeline(PROMPTS[0], negatives[1], latents=noise[:1], **unguided).videos,
    )


@torch.no_grad()
def test_generators_and_given_latents(teacher: Pipeline) -> None:
    pipeline = made(teacher, "ddpm")
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    first, again = (pipeline("red", generator=torch.Generator().manual_seed(1), **arguments).videos for _ in range(2))
    assert torch.equal(first, again)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, *teacher.latent_shape, generator=generator)
    assert torch.equal(pipeline("red", latents=noise, generator=generator, **arguments).videos, first)
    # Latents say the size where nothing else does; they are not changed.
    small, kept = torch.randn(1, 8, 1, 2, 6), noise.clone()
    assert pipeline("red", latents=small, **arguments).videos.shape == small.shape
    assert torch.equal(noise, kept)


@torch.no_grad()
def test_the_output_types_are_one_video(teacher: Pipeline) -> None:
    pipeline = made(teacher)
    outputs = {
        kind: pipeline(["red", "a large blue square"], num_inference_steps=2, seed=1, output_type=kind).videos
        for kind in ("latent", "pt", "np", "pil")
    }
    exact = (pipeline.decode(outputs["latent"]) / 2 + 0.5).clamp(0, 1)
    assert outputs["pt"].shape == (2, 5, 3, 32, 32)
    torch.testing.assert_close(outputs["pt"], exact, rtol=0, atol=1e-6)
    assert isinstance(outputs["np"], np.ndarray)
    np.testing.assert_allclose(outputs["np"], exact.permute(0, 1, 3, 4, 2).numpy(), rtol=0, atol=1e-6)
    for video, frames in zip(exact, outputs["pil"], strict=True):
        assert all(isinstance(frame, Image.Image) for frame in frames)
        pixels = np.stack([np.asarray(frame) for frame in frames])
        np.testing.assert_allclose(pixels / 255, video.permute(0, 2, 3, 1).numpy(), rtol=0, atol=0.5001 / 255)


@torch.no_grad()
def test_other_sizes_and_tiled_decoding(teacher: Pipeline) -> None:
    pipeline = made(teacher)
    arguments = {"num_inference_steps": 1, "seed": 1, "num_frames": 21, "height": 16, "width": 48, "output_type": "pt"}
    whole = pipeline("red", **arguments).videos
    assert whole.shape == (1, 21, 3, 16, 48)
    assert pipeline.latent_shape(21, 16, 48) == (8, 6, 2, 6)
    assert pipeline.latent_shape(None, None, None) == teacher.latent_shape
    pipeline.enable_vae_tiling()
    try:
        assert teacher.vae.vae.use_tiling
        tiled = pipeline("red", **arguments).videos
    finally:
        pipeline.disable_vae_tiling()
    assert not teacher.vae.vae.use_tiling
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": None}, "give either prompt or conditioning"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"output_type": "mp4"}, "output_type is 'mp4'; it takes one of pil, np, pt, latent"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it takes a finite number"),
        ({"guidance_rescale": -0.1}, r"guidance_rescale is -0.1; it takes 0 \(none\) to 1"),
        ({"num_samples_per_prompt": 0}, "num_samples_per_prompt is 0; it must be at least 1"),
        ({"negative_prompt": ["", "red"]}, "negative_prompt has 2 prompts beside 1; it takes 1 or as many"),
        ({"seed": 1, "generator": torch.Generator()}, "generator and seed 1 are both given"),
        (
            {"latents": torch.zeros(2, 8, 2, 4, 4)},
            r"latents have shape \(2, 8, 2, 4, 4\); it must be \(1, 8, 2, 4, 4\)",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it takes 1 to 1000"),
        ({"num_frames": 94}, r"num_frames is 94; it comes as 1 \+ n·4, so 93 or 97 would do"),
        ({"height": 648}, "height is 648; it comes as multiples of 16, so 640 or 656 would do"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0"),
    ],
)
def test_what_cannot_work_is_refused(teacher: Pipeline, arguments: dict[str, Any], says: str) -> None:
    pipeline = made(teacher)
    with count_forwards(pipeline.denoiser) as count, pytest.raises(ValueError, match=says):
        pipeline(**{"prompt": "red", "num_inference_steps": 2, **arguments})
    assert count.calls == 0


def test_guidance_needs_a_null_prompt(teacher: Pipeline) -> None:
    pipeline = made(teacher)
    conditioning = pipeline.encode(["red"])
    pipeline.text_encoder = None
    with pytest.raises(ValueError, match=r"guidance_scale is 7\.5, but there is no text encoder for the null prompt"):
        pipeline(conditioning=conditioning)
    with pytest.raises(ValueError, match="no text encoder: give conditioning instead"):
        pipeline("red", guidance_scale=1.0)
    assert pipeline(
        conditioning=conditioning, guidance_scale=1, num_inference_steps=1, output_type="latent"
    ).videos.ndim


@torch.no_grad()
def test_a_prompt_is_cut_off_at_the_limit(teacher: Pipeline) -> None:
    pipeline = made(teacher)
    words = "a small red circle moving left"
    (cut,) = pipeline.encode([words], 4).tensors.values()
    (same,) = pipeline.encode(["a small red"], 4).tensors.values()
    assert cut.shape == (1, 4, 8) and torch.equal(cut, same), "three words and the end"
    assert pipeline.encode([words]).tensors["encoder_hidden_states"].shape == (1, 7, 8)


@torch.no_grad()
def test_a_student_takes_its_own_steps(student: Path, teacher: Pipeline) -> None:
    pipeline = OpenSoraPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    noise = randn(1, teacher.latent_shape, seed=2)
    exact = sample_latents(teacher.denoiser, noise, NODES, pipeline.encode(["red"]))
    with count_forwards(pipeline.denoiser) as count:
        assert torch.equal(pipeline("red", seed=2, output_type="latent").videos, exact)
    assert (count.calls, count.samples) == (4, 4), "no guidance"
    assert torch.equal(pipeline("red", latents=noise, timesteps=NODES, output_type="latent").videos, exact)
    with pytest.raises(ValueError, match=r"num_inference_steps 3: .* a student of 4 steps"):
        pipeline("red", num_inference_steps=3)


@torch.no_grad()
def test_folders_go_out_and_in(student: Path, teacher: Pipeline, tmp_path: Path) -> None:
    for name, pipeline in {"teacher": made(teacher), "student": OpenSoraPipeline.from_pretrained(student)}.items():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / "saved" / name)
        again = OpenSoraPipeline.from_pretrained(tmp_path / "saved" / name)
        again.set_progress_bar_config(disable=True)
        assert (again.student is None) == (pipeline.student is None)
        arguments = {"seed": 1, "num_inference_steps": 4, "output_type": "pt"}
        assert torch.equal(again("red", **arguments).videos, pipeline("red", **arguments).videos)
    assert json.loads((tmp_path / "saved" / "teacher" / "model_index.json").read_text())["vae"][1] == "WFVAEModel"


@torch.no_grad()
def test_rectified_flow(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "flow"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher = load_pipeline(folder)
    pipeline = made(teacher, "euler")
    ours = pipeline(PROMPTS[:2], num_inference_steps=4, guidance_scale=2.0, seed=1, output_type="latent").videos
    model = copy.deepcopy(teacher.denoiser.model).double()
    x = randn(2, teacher.latent_shape, seed=1).double()
    texts = [pipeline.encode(list(p)) for p in (PROMPTS[:2], ["", ""])]
    sigmas = [*torch.linspace(float(scheduler.sigma_max), float(scheduler.sigma_min), 4, dtype=torch.float64), 0.0]
    shifted = [3 * float(s) / (1 + 2 * float(s)) for s in sigmas]  # diffusers shifts its ends, then all once more
    for now, then in pairwise(shifted):
        plain, negative = (
            model(
                x,
                torch.full((2,), 1000 * now),
                text.tensors["encoder_hidden_states"][:, None].double(),
                None,
                text.tensors["encoder_attention_mask"][:, None] if len(text.tensors) > 1 else None,
            ).sample
            for text in texts
        )
        x = x + (then - now) * (negative + 2 * (plain - negative))
    assert float((ours - x).abs().max() / x.abs().max()) < 1e-4
    for name in ("ddpm", "dpm++"):
        with pytest.raises(ValueError, match=rf"--scheduler {name[:3]}.*FlowMatchEuler.*; it takes few-step, euler"):
            make_scheduler(name, scheduler)


def test_noise_levels_are_the_models_own() -> None:
    own = DDPMScheduler(beta_start=1e-4, beta_end=0.03, prediction_type="v_prediction", clip_sample=True)
    for name in LOOPS:
        scheduler = make_scheduler(name, own)
        assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
        assert not scheduler.config.get("clip_sample") or name in ("euler", "euler-ancestral", "dpm++")
    own.alphas_cumprod = own.alphas_cumprod**2  # what no config says
    with pytest.raises(ValueError, match="--scheduler ddim: DDIMScheduler cannot have the noise levels of the model's"):
        make_scheduler("ddim", own)
    with pytest.raises(ValueError, match=r"--scheduler ddpm: .* CogVideoXDDIMScheduler; it takes few-step, ddim"):
        make_scheduler("ddpm", CogVideoXDDIMScheduler())


def test_the_command_takes_schedulers_sizes_and_files(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("red\n\na large blue square\n")
    arguments: dict[str, Any] = {"model": tiny_teacher, "prompts": tmp_path / "prompts.txt", "num_frames": 1, "seed": 3}
    pictures = []
    for i, scheduler in enumerate(("ddpm", "ddpm", "euler-ancestral")):
        arguments |= {"scheduler": scheduler, "num_steps": 3, "guidance": 2.0, "guidance_rescale": 0.5}
        output = tmp_path / f"{i}.png"
        sample(SampleConfig(**arguments, width=48, batch_size=1 + i, enable_tiling=i == 1, output=output))
        pictures.append(np.asarray(Image.open(output)).astype(int))
    assert pictures[0].shape[1] == 2 * (4 * 48 + 4)
    assert abs(pictures[0] - pictures[1]).max() <= 1 and abs(pictures[0] - pictures[2]).max() > 4
    assert "2 video(s), 3 steps, guidance 2" in capsys.readouterr().out


# The package as far as sampling touches it: its tables, and a pipeline that calls the transformer as its own does.
UPSTREAM = {
    "models/diffusion/__init__.py": """
from tdm_fast import models
class OpenSoraT2V_v1_3(models.OpenSoraT2V_v1_3): ...
Diffusion_models = Diffusion_models_class = {"OpenSoraT2V_v1_3": OpenSoraT2V_v1_3}
""",
    "models/causalvideovae/__init__.py": "ae_wrapper = ae_stride_config = ae_channel_config = ae_norm = ae_denorm = {}",
    "sample/pipeline_opensora.py": """
from types import SimpleNamespace
import torch
from transformers import MT5Tokenizer
calls = []
class OpenSoraPipeline:
    def __init__(self, **parts):
        self.parts = parts
    def __call__(self, latents, **arguments):
        calls.append((self.parts, latents, arguments))
        mask, states = torch.ones_like(latents[:, 0]), torch.zeros(len(latents), 1, 3, 8)
        self.parts["transformer"](
            latents, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=states[..., 0] + 1,
            timestep=torch.zeros(len(latents)), pooled_projections=None, return_dict=False,
        )
        size = [arguments[name] for name in ("num_frames", "height", "width")]
        return SimpleNamespace(videos=torch.zeros(len(latents), *size, 3, dtype=torch.uint8))
""",
}


def test_the_upstream_pipeline_if_asked_for(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "sdp_kernel", torch.backends.cuda.sdp_kernel)  # which is replaced
    config = SampleConfig(
        prompt=("red", "a large blue square"),
        model=tiny_teacher,
        scheduler="euler-ancestral",
        opensora_source="upstream",
        num_steps=3,
        guidance=2.0,
        num_frames=9,
        output=tmp_path / "out.png",
    )
    with pytest.raises(ValueError, match="--opensora_source upstream: no package opensora can be imported"):
        sample(config)
    for name, text in UPSTREAM.items():
        path = tmp_path / "opensora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        sample(config)
        ((parts, latents, arguments),) = sys.modules["opensora.sample.pipeline_opensora"].calls
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
            del sys.modules[name]
    assert type(parts["scheduler"]).__name__ == "EulerAncestralDiscreteScheduler"
    assert type(parts["transformer"]).__module__ == "opensora.models.diffusion"
    assert parts["vae"].vae_scale_factor == (4, 8, 8)
    assert (arguments["num_frames"], arguments["height"], arguments["width"]) == (9, 32, 32)
    assert (arguments["num_inference_steps"], arguments["guidance_scale"]) == (3, 2.0)
    assert arguments["negative_prompt"] == ["", ""] and arguments["prompt"] == list(config.prompt)
    assert torch.equal(latents, randn(2, (8, 3, 4, 4), seed=0))
    assert (tmp_path / "out.png").exists()


@torch.no_grad()
def test_a_second_encoder_that_is_not_used_is_said_once(teacher: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()
    parts = (teacher.denoiser.model, teacher.vae, teacher.scheduler, teacher.text_encoder, teacher.tokenizer)
    pipeline = OpenSoraPipeline(*parts, teacher.text_encoder, teacher.tokenizer)
    for _ in range(2):
        assert pipeline.encode(["red"]).tensors.keys() == {"encoder_hidden_states"}
    assert capsys.readouterr().err.count("the second encoder is not used") == 1
