"""Pipeline folders: what loads, and what is refused with one message that names it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tdm_fast import files
from tdm_fast.evaluate import load_evaluator
from tdm_fast.evaluator import ShapesEvaluator
from tdm_fast.files import SaveError
from tdm_fast.models.loading import load_pipeline
from tdm_fast.models.student import save_student

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher, to be spoilt."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, folder / "transformer" / WEIGHTS)


def add_weight(folder: Path, part: str, weights: str = WEIGHTS) -> None:
    tensors = load_file(folder / part / weights)
    save_file({**tensors, "lora_A.weight": torch.zeros(1)}, folder / part / weights, metadata={"format": "pt"})


def make_ddpm(folder: Path) -> None:
    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    (folder / "unet").mkdir()
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DModel"]}))


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self.path), "w"))


def only_pickled(folder: Path, weights: str, pickled: str) -> None:
    (folder / weights).unlink()
    (folder / pickled).write_bytes(pickle.dumps({"weight": Trap(folder.parent / "unpickled")}))


def wider_text_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    config = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


def test_a_teacher_loads_frozen_with_its_schedule(tiny_teacher: Path) -> None:
    pipeline = load_pipeline(tiny_teacher)
    assert pipeline.folder == tiny_teacher and pipeline.timesteps is None
    assert pipeline.latent_shape == (8, 2, 4, 4)
    assert pipeline.schedule.prediction_type == "v_prediction" and pipeline.schedule.alpha[-1] == 0
    networks = (pipeline.denoiser.model, pipeline.vae.vae, pipeline.text_encoder)
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    assert not any(module.training for network in networks for module in network.modules())
    saved = load_file(tiny_teacher / "transformer" / WEIGHTS)
    assert all(torch.equal(saved[name], p) for name, p in pipeline.denoiser.model.named_parameters())


def test_a_student_is_a_folder_of_its_own(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = load_pipeline(tiny_teacher)
    network = load_pipeline(tiny_teacher).denoiser.model
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    for _ in range(2):  # the second time it replaces what is there
        save_student(tmp_path / "run" / "student", network, tiny_teacher, [899, 674, 449, 224])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["student"]
    student = load_pipeline(tmp_path / "run" / "student")
    assert student.timesteps == (899, 674, 449, 224) and student.latent_shape == teacher.latent_shape
    for (name, ours), theirs in zip(
        student.denoiser.model.named_parameters(), teacher.denoiser.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs + 1), name
    assert all(torch.equal(a, b) for a, b in zip(student.vae.parameters(), teacher.vae.parameters(), strict=True))
    assert torch.equal(student.schedule.alpha, teacher.schedule.alpha)
    assert student.tokenizer("a red circle").input_ids == teacher.tokenizer("a red circle").input_ids


def test_a_student_that_cannot_be_written_leaves_the_old_one(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_pipeline(tiny_teacher).denoiser.model
    save_student(tmp_path / "student", network, tiny_teacher, [899, 449])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((network, "save_pretrained"), (shutil, "copy"), (files, "sync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(SaveError, match=f"could not write {tmp_path}/student: No space left on device"):
                save_student(tmp_path / "student", network, tiny_teacher, [899, 449])
        assert load_pipeline(tmp_path / "student").timesteps == (899, 449)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "model: no such folder; a model is a folder with model_index.json and transformer, vae"),
        (lambda f: (f / "model_index.json").unlink(), r"no model_index.json in it \(found: scheduler, text_encoder"),
        (lambda f: cut(f / "model_index.json", 0.5), "model_index.json is damaged"),
        (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe"), "model_index.json is damaged"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json is damaged"),
        (make_ddpm, "holds a DDPMPipeline; it takes one of OpenSoraPipeline, PixArtAlphaPipeline, "),
        (
            lambda f: edit(f / "model_index.json", transformer=["x", "OpenSoraT2V_v1_5"]),
            "its transformer is a OpenSoraT2V_v1_5; this version takes a OpenSoraT2V_v1_3",
        ),
        (
            lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
            "its vae is a AutoencoderKL; this version takes a WFVAEModel",
        ),
        (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "NoScheduler"]), "scheduler is a NoScheduler"),
        (lambda f: edit(f / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"]), "EDMEuler"),
        (lambda f: edit(f / "model_index.json", tokenizer=None), "half-written: tokenizer missing"),
        (lambda f: shutil.rmtree(f / "vae"), "half-written: vae missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "half-written: tokenizer missing"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), "vae is half-written: it takes config.json and weights"),
        (lambda f: (f / "vae" / "config.json").unlink(), "vae is half-written: it takes config.json and weights"),
        (lambda f: cut(f / "transformer" / WEIGHTS, 0.7), f"transformer/{WEIGHTS} is damaged or half-written"),
        (lambda f: cut(f / "transformer" / WEIGHTS, 0), f"transformer/{WEIGHTS} is damaged or half-written"),
        (lambda f: cut(f / "text_encoder" / "model.safetensors", 0.9), "model.safetensors is cut short or damaged"),
        (drop_weight, "transformer: 1 weights of OpenSoraT2V_v1_3 are missing, proj_out.bias first"),
        (lambda f: add_weight(f, "transformer"), "1 weights of OpenSoraT2V_v1_3 are too many, lora_A.weight first"),
        (lambda f: add_weight(f, "vae"), "1 weights of WFVAEModel are too many, lora_A.weight first"),
        (lambda f: edit(f / "transformer" / "config.json", patch_size=1), "are not of one OpenSoraT2V_v1_3"),
        (wider_text_encoder, "text_encoder: it is 16 wide but the teacher takes caption_channels=8; none of the"),
        (lambda f: edit(f / "transformer" / "config.json", sample_size_h=7), "sample_size_h is 7; .* 6 or 8 would do"),
        (lambda f: edit(f / "transformer" / "config.json", sample_size_w=1), "sample_size_w is 1; .* 2 would do"),
        (lambda f: edit(f / "transformer" / "config.json", sample_size_t=None), "its config has no sample_size_t"),
        (lambda f: edit(f / "transformer" / "config.json", sample_size_t=0), "sample_size_t is 0"),
    ],
)
def test_what_cannot_work_is_refused(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=says) as error:
        load_pipeline(folder)
    assert str(folder) in str(error.value) or "EDM" in says


@pytest.mark.parametrize(
    "text", ['{"timesteps": [899', "{}", '{"timesteps": []}', '{"timesteps": [1000]}', '{"timesteps": "899"}']
)
def test_a_damaged_trajectory_is_refused(folder: Path, text: str) -> None:
    (folder / "few_step.json").write_text(text)
    with pytest.raises(ValueError, match=r"few_step.json is damaged: "):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_damaged_config_is_a_message(folder: Path, part: str) -> None:
    for file in (folder / part).glob("*.json"):
        cut(file, 0.5)
    with pytest.raises((ValueError, OSError)):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "weights", "pickled"),
    [
        ("transformer", WEIGHTS, "diffusion_pytorch_model.bin"),
        ("vae", WEIGHTS, "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_weights_are_never_unpickled(folder: Path, part: str, weights: str, pickled: str) -> None:
    only_pickled(folder / part, weights, pickled)
    with pytest.raises(ValueError, match=r"weights as \*.safetensors|are not of one T5EncoderModel"):
        load_pipeline(folder)
    assert not (folder / "unpickled").exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "unpickled"))).close()
    assert (tmp_path / "unpickled").exists()


def test_an_evaluators_weights_are_never_unpickled_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluator in it"):
        load_evaluator(tmp_path)
    ShapesEvaluator(width=4, feature_dim=4).save_pretrained(tmp_path / "evaluator")
    assert not load_evaluator(tmp_path).training
    cut(tmp_path / "evaluator" / WEIGHTS, 0.5)
    with pytest.raises(ValueError, match="is damaged or half-written"):
        load_evaluator(tmp_path)
    only_pickled(tmp_path / "evaluator", WEIGHTS, "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights as \*.safetensors"):
        load_evaluator(tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_latents_of_another_vae_are_refused(folder: Path) -> None:
    vae = load_pipeline(folder).vae.vae
    narrow = {"latent_dim": 4, "scale": [1.0] * 4, "shift": [0.0] * 4}
    type(vae).from_config({**vae.config, **narrow}).save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match=r"in_channels=8 but the VAE in .*vae decodes 4 channels"):
        load_pipeline(folder)
