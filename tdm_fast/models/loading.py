"""Folders in the layout of diffusers pipelines, to and from the networks of one text-to-video model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from tdm_fast.checkpoint import SaveError
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.vae import WFVAEWrapper
from tdm_fast.models.wfvae import WFVAEModel
from tdm_fast.schedule import Schedule

INDEX_FILE = "model_index.json"
SAMPLER_FILE = "few_step.json"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
NETWORKS: dict[str, Any] = {
    "transformer": OpenSoraT2V_v1_3,
    "vae": WFVAEModel,
    "text_encoder": T5EncoderModel,
}


@dataclass
class Pipeline:
    """One model ready to sample: the denoiser with its schedule, the VAE, the text encoder and its own timesteps."""

    folder: Path
    denoiser: OpenSoraDenoiser
    vae: WFVAEWrapper
    tokenizer: Any
    text_encoder: nn.Module
    timesteps: tuple[int, ...] | None
    """The nodes of a few-step student's trajectory, descending; None for a teacher."""

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """`(C, T, H, W)` of the latents that the transformer's config names as its own size."""
        config: Any = self.denoiser.model.config
        return (config.in_channels, config.sample_size_t, config.sample_size_h, config.sample_size_w)


def load_pipeline(folder: Path) -> Pipeline:
    """Load a teacher's or a student's folder onto the CPU, everything frozen and in evaluation mode.

    Raises ValueError when the folder is missing, half-written or holds a model of another class.
    """
    check_folder(folder)
    parts = {name: _load(folder / name, cls) for name, cls in NETWORKS.items()}
    index = json.loads((folder / INDEX_FILE).read_text())
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    transformer = parts["transformer"].requires_grad_(False).eval()
    width = parts["text_encoder"].config.d_model
    if width != transformer.config.caption_channels:
        raise ValueError(
            f"{folder}: the text encoder is {width} wide but the transformer takes caption_channels="
            f"{transformer.config.caption_channels}; the two folders are not of one model"
        )
    sampler = folder / SAMPLER_FILE
    return Pipeline(
        folder=folder,
        denoiser=OpenSoraDenoiser(transformer, Schedule.from_scheduler(scheduler)),
        vae=WFVAEWrapper(parts["vae"].requires_grad_(False).eval()),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=parts["text_encoder"].requires_grad_(False).eval(),
        timesteps=tuple(json.loads(sampler.read_text())["timesteps"]) if sampler.exists() else None,
    )


def check_folder(folder: Path) -> None:
    """Refuse, with one message, a folder that `load_pipeline` cannot load. Reads headers only, no weights."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a folder with {INDEX_FILE} and {', '.join(PARTS)}")
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(f"{folder}: no {INDEX_FILE} in it (found: {found}); it takes a pipeline's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / INDEX_FILE} is damaged: {error}") from error
    missing = [name for name in PARTS if not any((folder / name).glob("*"))]
    if missing:
        raise ValueError(f"{folder} is half-written: {', '.join(missing)} missing; copy or make the folder again")
    for name, cls in NETWORKS.items():
        found = (index.get(name) or [None, None])[1]
        if found != cls.__name__:
            raise ValueError(f"{folder}: its {name} is a {found}; this version takes a {cls.__name__}")
        _check_weights(folder / name)


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is half-written: it takes config.json and weights as *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or half-written ({error}); copy or make the folder again") from error


def _load(folder: Path, cls: Any) -> Any:
    model, info = (
        cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False)
        if cls is not T5EncoderModel
        else cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder}: {len(missing)} weights of {cls.__name__} are missing, {missing[0]} first")
    return model


def save_student(folder: Path, transformer: nn.Module, teacher: Path, timesteps: Sequence[int]) -> None:
    """Write a student that samples by itself: its transformer, the teacher's other parts, the nodes of its trajectory.

    Written beside and renamed when whole. Raises SaveError when it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in PARTS[1:]:
            shutil.copytree(teacher / name, partial / name)
        shutil.copy(teacher / INDEX_FILE, partial / INDEX_FILE)
        (partial / SAMPLER_FILE).write_text(json.dumps({"timesteps": list(timesteps)}) + "\n")
        transformer.save_pretrained(partial / "transformer")  # type: ignore[operator]
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"could not write the student to {folder}: {error}") from error
