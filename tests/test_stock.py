"""Pipelines of diffusers as teachers: parts, text states, sizes, refusals; their students in stock pipelines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_networks import TEXT_TOKENS
from tiny_pipelines import PIPELINES, PROMPTS, SD3, build, size
from torch import Tensor

from tdm_fast import cli, preflight
from tdm_fast.config import ModelConfig, parse_train
from tdm_fast.encode import EncodeConfig, encode
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.loading import Pipeline, load_empty, load_parts, load_pipeline
from tdm_fast.models.roles import make_networks
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student
from tdm_fast.philox import randn
from tdm_fast.sample import SampleConfig, generate, sample
from tdm_fast.samplers import FewStepSampler, FewStepScheduler, denoise, make_scheduler
from tdm_fast.stock_pipeline import StockSampler, default_guidance
from tdm_fast.text import PromptCache
from tdm_fast.train import train

NODES = (999, 856, 665, 399)
EVEN = (999, 749, 499, 249)
ONE_ITERATION = (
    "--max_train_steps 1 --train_batch_size 2 --lr_warmup_steps 0 --logging_steps 1 --report_to none"
    " --student_learning_rate 1e-3 --timesteps 999 856 665 399"
).split()

pytestmark = pytest.mark.usefixtures("known_estimates")
ALIKE = ("pixart_sigma", "sd35", "cogvideox_2b")
"""Whose pipeline and network are of classes that a faster test has as well."""
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in PIPELINES]
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A teacher's folder of each family, made when it is asked for; to be read only."""
    root = tmp_path_factory.mktemp("stock")
    return lambda name: root / name if (root / name).exists() else build(name, root / name)


def flags_of(folder: Path, name: str) -> ModelConfig:
    frames, height, width = size(name)
    return ModelConfig(model=folder, num_frames=frames, max_height=height, max_width=width)


def teacher_of(folder: Path, name: str) -> Pipeline:
    return load_parts(Sources.of_flags(flags_of(folder, name)))


def texts(model: Pipeline) -> PromptCache:
    return PromptCache.encode_with([files.load() for files in model.encoders], PROMPTS)


def changed(model: Pipeline) -> Any:
    """The teacher's network with other weights: what a training would leave."""
    network: Any = model.denoiser.model
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def stock_texts(pipeline: Any, name: str, prompts: list[str]) -> dict[str, Tensor]:
    """What the stock pipeline's own loop gives its network for these prompts."""
    if name.startswith("pixart"):
        states, mask, *_ = pipeline.encode_prompt(prompts, False)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    if name in ("sdxl", *SD3):
        more = () if name == "sdxl" else (None, None)
        states, _, pooled, _ = pipeline.encode_prompt(prompts, *more, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "encoder_2_hidden_states": pooled[:, None]}
    if name == "sd15":
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}
    length = 512 if name == "wan" else pipeline.transformer.config.max_text_seq_length
    given = pipeline.encode_prompt(prompts, None, False, max_sequence_length=length)
    return {"encoder_hidden_states": given[0]}


def stock_call(name: str) -> dict[str, Any]:
    """What a stock pipeline's call is given besides prompts, noise and steps."""
    frames, height, width = size(name)
    given: dict[str, Any] = {"height": height, "width": width, "guidance_scale": 1.0}
    if name.startswith("pixart"):
        return given | {"use_resolution_binning": False, "clean_caption": False}
    if name.startswith("cogvideox"):
        given["max_sequence_length"] = TEXT_TOKENS
    return given | ({"num_frames": frames} if frames > 1 else {})


@every_family
@torch.no_grad()
def test_cached_prompts_mean_to_the_network_what_the_stock_pipelines_do(
    folders: Callable[[str], Path], name: str
) -> None:
    model = teacher_of(folders(name), name)
    stock = DiffusionPipeline.from_pretrained(folders(name))
    x, t = randn(3, model.latent_shape, seed=1), torch.tensor([999, 500, 20])
    ours = model.denoiser(x, t, texts(model).batch([0, 1, 2]))
    theirs = model.denoiser(x, t, Conditioning(stock_texts(stock, name, PROMPTS)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@every_family
def test_a_student_in_the_stock_pipeline_is_our_own_sampler(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    teacher, prompts = teacher_of(folders(name), name), PROMPTS[:2]
    shape = teacher.family.time_and_space(teacher.latent_shape)
    save_student(tmp_path / "student", changed(teacher), folders(name), NODES, size=shape)
    student = load_pipeline(tmp_path / "student")
    assert student.timesteps == NODES and student.latent_shape == teacher.latent_shape
    assert student.video_shape == size(name)

    noise, cache = randn(2, student.latent_shape, seed=3), texts(student)
    ours = denoise(student.denoiser, noise, FewStepSampler(student.schedule, NODES), cache.batch([0, 1]))
    through = StockSampler(student)
    through.set_progress_bar_config(disable=True)
    again = through(conditioning=cache.batch([0, 1]), negative_conditioning=cache.negatives(2), seed=3).videos
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)

    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")  # from prompts, with its own text encoders
    stock.scheduler = FewStepScheduler.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, **stock_call(name)}
    layout = noise.transpose(1, 2) if name.startswith("cogvideox") else noise
    theirs = stock(prompts, latents=layout, output_type="latent", **call)[0]
    theirs = theirs.transpose(1, 2) if name.startswith("cogvideox") else theirs
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)

    shown = stock(prompts, latents=layout, output_type="pt", **call)[0]
    shown = shown if shown.ndim == 5 else shown[:, None]
    clips = torch.cat(list(generate(student, cache, [0, 1], NODES, seed=3)))
    torch.testing.assert_close((clips / 2 + 0.5).clamp(0, 1), shown, rtol=1e-4, atol=1e-4)


STOCK_SCHEDULERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpm": ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}, {"timesteps": NODES}),
    "ddim": ("CogVideoXDDIMScheduler", {}, {"num_inference_steps": 4}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [(t + 1) / 1000 for t in NODES]}),
}
"""A scheduler of diffusers with settings, and what a call is given, that take the steps of a student."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=pytest.mark.slow if name in ALIKE else ())
        for name, kind in [
            *(("pixart_alpha", "dpm"), ("pixart_sigma", "dpm"), ("sd15", "dpm"), ("sdxl", "dpm")),
            *(("cogvideox_2b", "ddim"), ("cogvideox_5b", "ddim"), ("sd3", "flow"), ("sd35", "flow")),
        ]
    ],
)
def test_schedulers_of_diffusers_that_take_a_students_steps(
    folders: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    teacher, nodes = teacher_of(folders(name), name), EVEN if kind == "ddim" else NODES
    shape = teacher.family.time_and_space(teacher.latent_shape)
    save_student(tmp_path / "student", changed(teacher), folders(name), nodes, size=shape)
    student = load_pipeline(tmp_path / "student")
    noise, cache = randn(2, student.latent_shape, seed=3), texts(student)
    ours = denoise(student.denoiser, noise, FewStepSampler(student.schedule, nodes), cache.batch([0, 1]))

    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    cls, settings, steps = STOCK_SCHEDULERS[kind]
    stock.scheduler = getattr(diffusers, cls).from_config(stock.scheduler.config, **settings)
    stock.set_progress_bar_config(disable=True)
    layout = noise.transpose(1, 2) if name.startswith("cogvideox") else noise
    theirs = stock(PROMPTS[:2], latents=layout, output_type="latent", **steps, **stock_call(name))[0]
    theirs = theirs.transpose(1, 2) if name.startswith("cogvideox") else theirs
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


@every_family
def test_a_students_adapter_in_the_stock_pipeline(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    teacher = teacher_of(folders(name), name)
    networks = make_networks(teacher.denoiser, kind="lora", lora_rank=2)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in networks.trainable("student").values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    shape = teacher.family.time_and_space(teacher.latent_shape)
    networks.save(tmp_path / "student", folders(name), NODES, lora_save="adapter", size=shape)
    student = load_pipeline(tmp_path / "student")
    plain = teacher_of(folders(name), name)

    x, t, cache = randn(2, student.latent_shape, seed=2), torch.tensor([999, 399]), texts(plain)
    with torch.no_grad():
        merged, before = (model.denoiser(x, t, cache.batch([0, 1])) for model in (student, plain))
    assert (merged - before).abs().max() > 1e-2 * before.abs().max()

    stock = DiffusionPipeline.from_pretrained(folders(name))
    file = tmp_path / "student" / "pytorch_lora_weights.safetensors"
    if name.startswith("pixart"):  # whose network in diffusers loads no adapters by itself
        weights = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        targets = sorted({key.split(".lora_")[0] for key in weights})
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), stock.transformer, "default")
        set_peft_model_state_dict(stock.transformer, weights, "default")
    else:
        stock.load_lora_weights(file.parent, weight_name=file.name)
    plain.denoiser.model = getattr(stock, plain.family.part).eval()
    with torch.no_grad():
        adapted = plain.denoiser(x, t, cache.batch([0, 1]))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4 * float(merged.abs().max()))


@pytest.mark.slow
@every_family
def test_the_command_distils_it(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    frames, height, width = map(str, size(name))
    flags = ["--model", str(folders(name)), "--num_frames", frames, "--max_height", height, "--max_width", width]
    flags += ["--prompts", str(prompts), "--output_dir", str(tmp_path / "run"), *ONE_ITERATION]
    train(parse_train(flags))
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(torch.isfinite(torch.tensor(row[f"loss_{role}"])) for role in ("student", "fake"))
    student = load_pipeline(tmp_path / "run" / "student")
    assert student.timesteps == NODES and student.video_shape == size(name)
    for picture in ("comparison.png", "comparison.mp4", "samples/step-000001.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 0
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    assert type(stock).__name__ == PIPELINES[name]
    sample(SampleConfig(model=tmp_path / "run" / "student", prompt=("red",), output=tmp_path / "one.png"))
    assert (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize("name", [pytest.param("sd15", marks=pytest.mark.slow), "wan"])
def test_a_run_can_be_checked_before(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    frames, height, width = map(str, size(name))
    flags = ["--model", str(folders(name)), "--num_frames", frames, "--max_height", height, "--max_width", width]
    found = list(preflight.rows(parse_train([*flags, "--output_dir", str(tmp_path / "run"), *ONE_ITERATION])))
    assert all(row.state == "ok" for row in found), [row for row in found if row.state != "ok"]
    names = [row.name for row in found]
    assert "unet" in names if name == "sd15" else "transformer" in names
    assert {"teacher", "vae", "text_encoder", "fit", "trajectory", "latents", "tokens", "memory", "disk"} <= set(names)


def test_prompts_are_encoded_ahead_by_the_command(folders: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    cache = encode(EncodeConfig(prompts=str(prompts), output_dir=tmp_path / "cache", model=folders("sd3")))
    model = teacher_of(folders("sd3"), "sd3")
    for name, tensor in texts(model).batch([2, 0]).tensors.items():
        torch.testing.assert_close(cache.batch([2, 0]).tensors[name], tensor)


def test_sdxls_null_prompt_is_zeros_where_its_folder_says_so(folders: Callable[[str], Path], tmp_path: Path) -> None:
    negatives = texts(teacher_of(folders("sdxl"), "sdxl")).negatives(1).tensors
    assert not any(tensor.any() for tensor in negatives.values())
    folder = build("sdxl", tmp_path / "sdxl", force_zeros_for_empty_prompt=False)
    assert all(tensor.any() for tensor in texts(teacher_of(folder, "sdxl")).negatives(1).tensors.values())


@pytest.mark.parametrize(("name", "guidance"), [("sd15", 7.5), ("pixart_alpha", 4.5), ("cogvideox_2b", 6.0)])
def test_guidance_and_schedulers_of_a_teacher(folders: Callable[[str], Path], name: str, guidance: float) -> None:
    model = teacher_of(folders(name), name)
    assert default_guidance(model) == guidance
    if name == "sd15":
        assert type(make_scheduler("euler", model.scheduler)).__name__ == "EulerDiscreteScheduler"
    if name == "cogvideox_2b":
        assert make_scheduler("ddim", model.scheduler).config.snr_shift_scale == 3.0


def test_wans_shift_survives_another_scheduler(folders: Callable[[str], Path]) -> None:
    assert make_scheduler("euler", teacher_of(folders("wan"), "wan").scheduler).shift == 3.0


def test_the_networks_own_sizes(folders: Callable[[str], Path]) -> None:
    assert load_empty(Sources.of_folder(folders("sd15"))).video_shape == (1, 32, 32)
    wan = load_empty(Sources.of_folder(folders("wan")))
    assert wan.video_shape == (81, 480, 832)
    assert wan.family.own_size(wan.config, (4, 16, 16)) == (21, 30, 52)  # with the VAE of 2.2's TI2V-5B


def edited(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(file: Path, end: str) -> None:
    """Take the tensor whose name ends so out of a file."""
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith(end))]
    save_file(tensors, file, metadata={"format": "pt"})


def test_pixart_under_its_networks_former_name(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Published folders say Transformer2DModel, which diffusers reads as PixArtTransformer2DModel."""
    folder = Path(shutil.copytree(folders("pixart_alpha"), tmp_path / "teacher"))
    edited(folder, "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edited(folder, "transformer/config.json", _class_name="Transformer2DModel", norm_type="ada_norm_single")
    teacher = teacher_of(folder, "pixart_alpha")
    save_student(tmp_path / "student", changed(teacher), folder, NODES, size=(1, 4, 6))
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "student").transformer) is type(teacher.denoiser.model)


@torch.no_grad()
def test_sd3_without_its_t5(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sd3"), tmp_path / "teacher"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    edited(folder, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    rows = texts(teacher_of(folder, "sd3")).batch([0, 1, 2]).tensors
    stock = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    for name, wanted in stock_texts(stock, "sd3", PROMPTS).items():
        torch.testing.assert_close(rows[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_students_folder_loads_without_what_its_teachers_lacks(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders("sd15"), tmp_path / "teacher"))
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    edited(folder, "model_index.json", **checker)
    teacher = teacher_of(folder, "sd15")
    save_student(tmp_path / "student", teacher.denoiser.model, folder, NODES, size=(1, 4, 6))
    assert DiffusionPipeline.from_pretrained(tmp_path / "student").safety_checker is None


def test_a_text_encoder_that_lacks_weights_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sd15"), tmp_path / "teacher"))
    without(folder / "text_encoder" / "model.safetensors", "q_proj.weight")
    with pytest.raises(ValueError, match=r"text_encoder lacks 1 weights of CLIPTextModel, .*q_proj.weight first"):
        texts(teacher_of(folder, "sd15"))


def test_the_precision_without_a_name_is_taken(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sd15"), tmp_path / "teacher"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: (0 * tensor).half() for name, tensor in load_file(file).items()}
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    plain, both = (Sources.of_folder(each) for each in (folders("sd15"), folder))
    assert plain.digest("unet") == both.digest("unet")
    file.unlink()
    with pytest.raises(ValueError, match=r"unet holds diffusion_pytorch_model.fp16.safetensors and no weights without"):
        Sources.of_folder(folder)


REFUSED: dict[str, tuple[str, Callable[[Path], None], list[str], str]] = {
    "unknown pipeline": (
        "sd15", lambda f: edited(f, "model_index.json", _class_name="FluxPipeline"), [],
        r"holds a FluxPipeline; it takes one of OpenSoraPipeline, PixArtAlphaPipeline.*WanPipeline",
    ),
    "another network": (
        "sd15", lambda f: edited(f, "model_index.json", unet=["diffusers", "UNet2DModel"]), [],
        r"whose unet is a UNet2DModel; it takes a UNet2DConditionModel there",
    ),
    "two experts": (
        "wan", lambda f: edited(f, "model_index.json", boundary_ratio=0.9), [], r"has two transformers.*2\.1",
    ),
    "frames": ("wan", lambda f: None, ["--num_frames", "6"], r"num_frames is 6.*5 or 9 would do"),
    "cogvideox's frames": ("cogvideox_2b", lambda f: None, ["--num_frames", "13"], r"num_frames is 13.*9 or 17"),
    "frames of an image": ("sd15", lambda f: None, ["--num_frames", "2"], r"num_frames is 2.*comes as 1, so 1"),
    "height": ("sd3", lambda f: None, ["--max_height", "40"], r"max_height is 40.*multiples of 16.*32 or 48"),
    "positions": ("sd3", lambda f: None, ["--max_height", "112"], r"max_height is 112; .* positions for 96 pixels"),
    "scheduler": (
        "sd15",
        lambda f: (
            edited(f, "model_index.json", scheduler=["diffusers", "RePaintScheduler"]),
            edited(f, "scheduler/scheduler_config.json", _class_name="RePaintScheduler"),
        )[0], [],
        r"scheduler.*RePaintScheduler.*must be one of",
    ),
    "unify": ("sd15", lambda f: None, ["--unify", "2", "4"], r"unify: a UNet2D.* cannot be told .*; leave it out"),
    "timesteps": (
        "sd15", lambda f: None, ["--timesteps", "999", "856", "900"],
        r"timesteps are 999 856 900; they must descend strictly",
    ),
    "steps": (
        "sd15", lambda f: None, ["--timesteps", "999", "856", "--num_steps", "3"],
        r"num_steps is 3, but by timesteps 999 856 it is 2",
    ),
    "vae": ("sd15", lambda f: None, ["--ae_path", "elsewhere"], r"--ae_path elsewhere: .*holds a StableDiffusionPipe"),
    "text encoder's width": (
        "pixart_alpha", lambda f: edited(f, "text_encoder/config.json", d_model=16), [],
        r"text encoders are 16 wide, but its transformer takes 8",
    ),
    "missing part": ("sd15", lambda f: shutil.rmtree(f / "vae"), [], r"half-written: vae missing"),
    "latents": (
        "sd15", lambda f: edited(f, "unet/config.json", in_channels=9), [],
        r"in_channels=9 but the VAE .* decodes 4 channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, change, flags, message = REFUSED[case]
    shutil.copytree(folders(name), tmp_path / "teacher")
    change(tmp_path / "teacher")
    size_flags = [] if any(flag.startswith(("--num_f", "--max_h")) for flag in flags) else ["--max_height", "32"]
    command = ["train", "--model", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "run"), *size_flags]
    try:
        code = cli.main([*command, *flags])
    except SystemExit as end:  # the parser's own way out
        code = int(end.code or 0)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2 and re.search(message, said), said
    assert not (tmp_path / "run").exists()
