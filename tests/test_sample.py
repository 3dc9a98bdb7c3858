"""Sampling: the trajectory against diffusers and float64, independence of batches, and the command's files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from guide_parts import NAME, build_parts, edit_json
from PIL import Image
from torch import Tensor

from tdm_fast import cli
from tdm_fast import pipeline as pipelines
from tdm_fast import sample as module
from tdm_fast.attention import attend
from tdm_fast.encoders import find_encoder
from tdm_fast.models.denoiser import Conditioning, count_forwards
from tdm_fast.models.loading import Pipeline, load_parts, load_pipeline
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student
from tdm_fast.models.wfvae import WFVAEModel
from tdm_fast.philox import randn
from tdm_fast.pipeline import OpenSoraPipeline, choose_timesteps, videos_at_once
from tdm_fast.sample import SampleConfig, best_guidance, generate, sample
from tdm_fast.samplers import sample_latents
from tdm_fast.samplers import trailing_timesteps as trailing
from tdm_fast.text import PromptCache
from tdm_fast.video import captioned

PROMPTS = ("a small red circle moving left", "a large blue square", "red")
NODES = (899, 674, 449, 224)


@pytest.fixture(scope="module")
def pipeline(tiny_teacher: Path) -> Pipeline:
    return load_pipeline(tiny_teacher)


@pytest.fixture(scope="module")
def cache(pipeline: Pipeline) -> PromptCache:
    return PromptCache.encode(PROMPTS, pipeline.tokenizer, pipeline.text_encoder)


@pytest.fixture
def student(tiny_teacher: Path, tmp_path: Path) -> Path:
    save_student(tmp_path / "student", load_pipeline(tiny_teacher).denoiser.model, tiny_teacher, NODES)
    return tmp_path / "student"


def ddim(pipeline: Pipeline, noise: Tensor, num_steps: int, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """The same trajectory by diffusers' scheduler, both conditionings in calls of their own."""
    scheduler = DDIMScheduler.from_pretrained(pipeline.folder / "scheduler")
    scheduler.set_timesteps(num_steps)
    x = noise
    for t in scheduler.timesteps:
        outputs = [pipeline.denoiser.model(x, t.expand(len(x)), text[:, None])[0] for text in (cond, uncond)]
        x = scheduler.step(outputs[1] + guidance * (outputs[0] - outputs[1]), t, x, eta=0.0).prev_sample
    return x


def plainly(
    pipeline: Pipeline, noise: Tensor, timesteps: Sequence[int], cond: Tensor, uncond: Tensor, guidance: float
) -> Tensor:
    """The trajectory in float64 from the formulas: zero-terminal-SNR betas (arXiv 2305.08891), v-prediction, DDIM."""
    model = copy.deepcopy(pipeline.denoiser.model).double()
    root = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    alpha = (root - root[-1]) * root[0] / (root[0] - root[-1])
    sigma = (1 - alpha**2).sqrt()
    x = noise.double()
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        step = torch.full((len(x),), t)
        a, b = (model(x, step, text[:, None].double(), return_dict=False)[0] for text in (cond, uncond))
        v = b + guidance * (a - b)
        x0, eps = alpha[t] * x - sigma[t] * v, sigma[t] * x + alpha[t] * v
        x = x0 if t_next is None else alpha[t_next] * x0 + sigma[t_next] * eps
    return x


@pytest.mark.parametrize("num_steps", [1, 4, 7, 50, 999, 1000])
def test_timesteps_are_diffusers_trailing_ones(pipeline: Pipeline, num_steps: int) -> None:
    scheduler = DDIMScheduler.from_pretrained(pipeline.folder / "scheduler")
    scheduler.set_timesteps(num_steps)
    assert trailing(num_steps, 1000) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_a_number_of_steps_that_does_not_exist_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"--num_steps {num_steps}: it takes 1 to 1000"):
        trailing(num_steps, 1000)


@pytest.mark.parametrize(("num_steps", "guidance"), [(4, 4.5), (20, 2.0), (5, 1.0), (1, 3.0)])
@torch.no_grad()
def test_guided_sampling_is_diffusers_ddim(
    pipeline: Pipeline, cache: PromptCache, num_steps: int, guidance: float
) -> None:
    cond, uncond = cache.embeddings[0].expand(3, -1, -1), cache.negative.expand(3, -1, -1)
    noise = randn(3, pipeline.latent_shape, seed=0)
    ours = sample_latents(
        pipeline.denoiser,
        noise,
        trailing(num_steps, 1000),
        Conditioning({"encoder_hidden_states": cond}),
        Conditioning({"encoder_hidden_states": uncond}),
        guidance,
    )
    theirs = ddim(pipeline, noise, num_steps, cond, uncond, guidance)
    exact = plainly(pipeline, noise, trailing(num_steps, 1000), cond, uncond, guidance)
    scale = exact.abs().max()
    error_ours, error_theirs = (float((x - exact).abs().max() / scale) for x in (ours, theirs))
    # diffusers' tables are float32 throughout, ours come from float64; beyond that both are the network's own rounding,
    # which is 0.6e-5 to 2.5e-5 at the strongest guidance, depending on threads and processor.
    assert error_theirs < 1e-3
    assert error_ours < max(2 * error_theirs, 5e-5)
    assert (ours - noise).abs().mean() > 0.1


def test_guidance_of_1_runs_no_negative(pipeline: Pipeline, cache: PromptCache) -> None:
    for guidance, samples in ((1.0, 3 * 2), (1.5, 3 * 4)):
        with count_forwards(pipeline.denoiser) as count:
            next(generate(pipeline, cache, [0, 1], [900, 500, 100], guidance=guidance))
        assert (count.calls, count.samples) == (3, samples)


def test_clips_do_not_depend_on_what_they_are_made_with(pipeline: Pipeline, cache: PromptCache) -> None:
    indices = [0, 1, 2, 1, 0]
    whole = torch.cat(list(generate(pipeline, cache, indices, NODES, guidance=2.0, seed=3)))
    assert whole.shape == (5, 5, 3, 32, 32)
    for batch_size in (1, 2, 3):
        chunks = list(generate(pipeline, cache, indices, NODES, guidance=2.0, seed=3, batch_size=batch_size))
        assert [len(chunk) for chunk in chunks[:-1]] == [batch_size] * (len(chunks) - 1)
        torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-3, atol=1e-4)
    assert (whole[0] - whole[4]).abs().mean() > 1e-2, "the same prompt, but other noise"
    assert torch.equal(whole, torch.cat(list(generate(pipeline, cache, indices, NODES, guidance=2.0, seed=3))))
    other = torch.cat(list(generate(pipeline, cache, indices, NODES, guidance=2.0, seed=4)))
    assert (whole - other).abs().mean() > 1e-2


def test_how_many_videos_are_made_at_once() -> None:
    sizes = ((17, 64, 64), (29, 256, 256), (93, 640, 640), (1, 4096, 4096))
    assert [videos_at_once(size) for size in sizes] == [48, 1, 1, 1]


@pytest.mark.parametrize("exact", [True, False])
def test_large_clips_are_made_one_by_one_and_decoded_in_pieces_where_that_is_exact(
    pipeline: Pipeline, cache: PromptCache, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    whole = torch.cat(list(generate(pipeline, cache, [0, 1, 2], NODES)))
    seen, decode = [], WFVAEModel.decode_latents

    def watched(vae: WFVAEModel, z: Tensor) -> Tensor:
        seen.append((len(z), vae.use_tiling))
        return decode(vae, z)

    monkeypatch.setattr(WFVAEModel, "decode_latents", watched)
    monkeypatch.setattr(WFVAEModel, "tiling_is_exact", exact)
    monkeypatch.setattr(pipelines, "PIXELS_AT_ONCE", 5 * 32 * 32 - 1)
    chunks = list(generate(pipeline, cache, [0, 1, 2], NODES))
    assert [len(chunk) for chunk in chunks] == [1, 1, 1] and seen == [(1, exact)] * 3
    assert not pipeline.vae.vae.use_tiling
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-3, atol=1e-4)
    seen.clear()
    whole_batch = OpenSoraPipeline.of(pipeline).decode(torch.zeros(2, *pipeline.latent_shape))
    assert whole_batch.shape == (2, 5, 3, 32, 32) and seen == [(1, exact)] * 2


def test_clips_in_bfloat16_are_nearly_those_in_float32(pipeline: Pipeline, cache: PromptCache) -> None:
    exact = next(generate(pipeline, cache, [0, 1], NODES, guidance=2.0))
    rounded = next(generate(pipeline, cache, [0, 1], NODES, guidance=2.0, dtype=torch.bfloat16))
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).std() / exact.std())
    assert 1e-4 < error < 0.1, error


def test_the_callers_gradients_stay_on(pipeline: Pipeline, cache: PromptCache) -> None:
    for clips in generate(pipeline, cache, [0], [900]):
        assert torch.is_grad_enabled() and not clips.requires_grad


def test_a_student_keeps_its_own_timesteps(pipeline: Pipeline, student: Path) -> None:
    assert choose_timesteps(pipeline, None) == trailing(50, 1000)
    assert choose_timesteps(pipeline, 3) == trailing(3, 1000)
    loaded = load_pipeline(student)
    assert choose_timesteps(loaded, None) == choose_timesteps(loaded, 4) == list(NODES)
    for steps in (3, 0, 50):
        with pytest.raises(ValueError, match=f"--num_steps {steps}: .*a student of 4 steps"):
            choose_timesteps(loaded, steps)


def test_the_measured_guidance_is_the_default(tiny_teacher: Path, tmp_path: Path, student: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    assert best_guidance(load_pipeline(folder), 50) == best_guidance(load_pipeline(folder), 4) == 7.5
    edit_json(folder / "model_index.json", is_distilled=True)
    assert best_guidance(load_pipeline(folder), 50) == 1.0
    edit_json(folder / "model_index.json", is_distilled=None)
    row = {"nfe": 8, "guidance": 3, "frechet": 1.0, "frechet_ci": [0.9, 1.1], "prompt_accuracy": 0.5, "videos": 576}
    metrics = json.dumps({"teacher": {**row, "guidance": 1.5}, "teacher_few_step": row})
    (folder / "teacher_metrics.json").write_text(metrics)
    assert (best_guidance(load_pipeline(folder), 50), best_guidance(load_pipeline(folder), 4)) == (1.5, 3.0)
    (student / "teacher_metrics.json").write_text(metrics)
    assert best_guidance(load_pipeline(student), 4) == 1.0


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_command_writes_what_its_name_says(
    student: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / f"clip{suffix}"
    sample(SampleConfig(prompt=PROMPTS[:2], model=student, output=output, seed=5))
    band = captioned(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), "").shape[1] - 1
    size = (2 * (4 * 32 + 4), band + 4 * 32 + 4)  # two clips side by side, four times enlarged, captions above, gaps
    if suffix == ".mp4":
        with av.open(str(output)) as container:
            frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    else:
        with Image.open(output) as image:
            frames = [image.size] * getattr(image, "n_frames", 1)
    assert frames == ([(5 * size[0], size[1])] if suffix == ".png" else [size] * 5)
    assert f"{output}: 2 video(s), 4 steps, guidance 1" in capsys.readouterr().out


def test_the_seed_decides(student: Path, tmp_path: Path) -> None:
    pictures = []
    for i, seed in enumerate((5, 5, 6)):
        output = tmp_path / f"{i}.png"
        sample(SampleConfig(prompt=PROMPTS[:1], model=student, output=output, seed=seed))
        pictures.append(output.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_words_that_the_model_does_not_know_are_named(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(SampleConfig(prompt=("a small orange Circle moving left fast",), model=student, output=tmp_path / "a.png"))
    assert "vocabulary lacks fast, orange;" in capsys.readouterr().err


def test_networks_and_encoders_are_in_bfloat16_if_asked_for(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, files = [], module.in_batches

    def watched(sampler: OpenSoraPipeline, *arguments: object, **others: object) -> object:
        assert sampler.text_encoder is None, "it has been dropped"
        seen.append(sampler.transformer.dtype)
        return files(sampler, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "in_batches", watched)
    pictures = []
    for dtype in ("auto", "fp32", "bf16"):
        output = tmp_path / f"{dtype}.png"
        sample(SampleConfig(prompt=PROMPTS[:1], model=student, output=output, dtype=dtype, device="cpu"))
        pictures.append(np.asarray(Image.open(output)).astype(float))
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert (pictures[0] == pictures[1]).all()
    assert 0 < abs(pictures[2] - pictures[0]).mean() < 8


def test_the_attention_asked_for_runs(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attended(*arguments: Any, backend: str, **others: Any) -> Tensor:
        seen.append(backend)
        return attend(*arguments, backend=backend, **others)

    monkeypatch.setattr("tdm_fast.models.opensora_layers.attend", attended)
    pictures = []
    for name in ("auto", "math"):
        output = tmp_path / f"{name}.png"
        sample(SampleConfig(prompt=PROMPTS[:1], model=student, output=output, attention=name, device="cpu"))
        pictures.append(np.asarray(Image.open(output)).astype(float))
    half = len(seen) // 2
    assert set(seen[:half]) == {"sdpa"} and set(seen[half:]) == {"math"}
    assert abs(pictures[1] - pictures[0]).max() <= 1


def test_parts_are_found_as_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_video", lambda path, frames: torch.save(frames, path))
    parts = build_parts(tmp_path / "parts")
    places = {"ae_path": parts / "vae", "text_encoder_name_1": str(parts / "t5")}
    flags = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    flags += ["--ae", "WFVAEModel_D8_4x8x8", "--num_steps", "2", "--prompt", "two cats", "--seed", "3"]
    named = ["--model", NAME, "--model_path", str(parts), "--num_frames", "9", "--max_height", "48", "--width", "32"]
    for name, model in (("a.png", ["--model", str(parts / "transformer")]), ("b.png", named)):
        assert cli.main(["sample", *flags, *model, "--output", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.count("1 video(s), 2 steps, guidance 7.5") == 2
    pipeline = OpenSoraPipeline.from_pretrained(parts / "transformer", **places)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("two cats", seed=3, timesteps=trailing(2, 1000), output_type="pt").videos[0]
    shown = torch.load(tmp_path / "a.png")[:, -4 - 4 * 32 : -4 : 4, : 4 * 32 : 4]
    torch.testing.assert_close(shown / 255, video.permute(0, 2, 3, 1), rtol=0, atol=0.51 / 255)
    assert torch.load(tmp_path / "b.png").shape[::2] == (9, 4 * 32 + 4)
    assert cli.main(["sample", *flags[2:], "--model", str(parts / "transformer")]) == 2
    assert "--ae_path is needed" in capsys.readouterr().err


def test_both_encoders_encode_for_a_transformer_that_takes_two(tmp_path: Path) -> None:
    parts = build_parts(tmp_path)
    files = [find_encoder(parts / name, flag="--text_encoder_name") for name in ("t5", "clip")]
    cache = module.encode(files, ["two cats"], "", torch.device("cpu"), torch.float32)
    first, second = (each.load() for each in files)
    exact = PromptCache.encode(
        ["two cats"], first.tokenizer, first.model, tokenizer_2=second.tokenizer, encoder_2=second.model
    )
    assert cache.batch([0]).tensors.keys() == {"encoder_hidden_states", "encoder_2_hidden_states"}
    for ours, known in ((cache.batch([0]), exact.batch([0])), (cache.negatives(1), exact.negatives(1))):
        assert all(torch.equal(ours.tensors[name], known.tensors[name]) for name in known.tensors)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"output": Path("clip.avi")}, "--output clip.avi: it takes a name that ends in"),
        ({"output": Path("/proc/x.png")}, "--output /proc/x.png: nothing can be written to /proc"),
        ({"output": Path(__file__) / "x.png"}, "x.png: nothing can be written to .*test_sample.py"),
        ({"prompt": ()}, "--prompt: it takes at least one"),
        ({"prompt": ("red", " ")}, "--prompt: it takes at least one prompt, none of them empty"),
        ({"prompts": Path("list.txt")}, "--prompts list.txt: --prompt names prompts as well; leave one out"),
        ({"num_steps": 0}, "--num_steps 0: it takes 1 to 1000"),
        ({"num_steps": 1001, "scheduler": "ddpm"}, "num_inference_steps is 1001; it takes 1 to 1000"),
        ({"num_frames": 7}, r"num_frames is 7; it comes as 1 \+ n·4, so 5 or 9 would do"),
        ({"height": 40}, "height is 40; it comes as multiples of 16, so 32 or 48 would do"),
        ({"width": 8}, "width is 8; it comes as multiples of 16, so 16 would do"),
        ({"guidance": float("nan")}, "--guidance nan: it takes a finite number"),
        ({"guidance_rescale": 1.5}, r"--guidance_rescale 1.5: it takes 0 \(none\) to 1"),
        ({"batch_size": 0}, "--batch_size 0: it takes a whole number from 1 up"),
        ({"device": "tpu"}, "--device tpu: it takes auto, cpu, cuda"),
        ({"attention": "flash", "device": "cpu"}, r"--attention flash: it needs a CUDA device .* would do: auto, sdpa"),
        ({"opensora_source": "upstream"}, "its pipeline has no few-step sampler; name another --scheduler"),
        ({"model": Path("no/such/folder")}, "no/such/folder: no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], says: str
) -> None:
    def by_headers(sources: Sources, *, empty: set[str]) -> Pipeline:
        assert empty >= {"transformer", "vae", "text_encoder"}
        return load_parts(sources, empty=empty)

    monkeypatch.setattr(module, "load_parts", by_headers)
    monkeypatch.setattr(module, "encode", lambda *_: pytest.fail("a network ran"))
    given = {"prompt": ("red",), "model": tiny_teacher, "output": tmp_path / "clip.png", **values}
    with pytest.raises(ValueError, match=says):
        sample(SampleConfig(**given))
    assert not any(tmp_path.iterdir())
