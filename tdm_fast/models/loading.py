"""Folders in the layout of diffusers pipelines, to and from the networks of one text-to-video model."""

from __future__ import annotations

import hashlib
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

from tdm_fast.checkpoint import read_json, whole_folder
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.vae import WFVAEWrapper
from tdm_fast.models.wfvae import SPATIAL_STRIDE, WFVAEModel
from tdm_fast.schedule import Schedule

INDEX_FILE = "model_index.json"
SAMPLER_FILE = "few_step.json"
METRICS_FILE = "teacher_metrics.json"
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

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """`(T, H, W)` of the videos that the VAE makes of such latents, in frames and pixels."""
        _, frames, height, width = self.latent_shape
        return (self.vae.vae.temporal_stride * (frames - 1) + 1, SPATIAL_STRIDE * height, SPATIAL_STRIDE * width)


def load_pipeline(folder: Path) -> Pipeline:
    """Load a teacher's or a student's folder onto the CPU, everything frozen and in evaluation mode.

    Raises ValueError when the folder is missing, half-written or holds a model of another class.
    """
    check_folder(folder)
    parts = {name: load_network(folder / name, cls) for name, cls in NETWORKS.items()}
    index = read_json(folder / INDEX_FILE)
    scheduler_class = getattr(diffusers, index["scheduler"][1], None)
    if scheduler_class is None:
        raise ValueError(f"{folder}: its scheduler is a {index['scheduler'][1]}, which diffusers does not know")
    scheduler = scheduler_class.from_pretrained(folder / "scheduler")
    transformer = parts["transformer"].requires_grad_(False).eval()
    check_sizes(folder, transformer.config, parts["vae"].config)
    width = parts["text_encoder"].config.d_model
    if width != transformer.config.caption_channels:
        raise ValueError(
            f"{folder}: the text encoder is {width} wide but the transformer takes caption_channels="
            f"{transformer.config.caption_channels}; the two folders are not of one model"
        )
    schedule = Schedule.from_scheduler(scheduler)
    return Pipeline(
        folder=folder,
        denoiser=OpenSoraDenoiser(transformer, schedule),
        vae=WFVAEWrapper(parts["vae"].requires_grad_(False).eval()),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=parts["text_encoder"].requires_grad_(False).eval(),
        timesteps=_own_timesteps(folder / SAMPLER_FILE, schedule.num_train_timesteps),
    )


def _own_timesteps(path: Path, num_train_timesteps: int) -> tuple[int, ...] | None:
    """The timesteps that a student's folder names; None where it is a teacher's."""
    if not path.exists():
        return None
    timesteps = read_json(path, "timesteps")["timesteps"]
    known = range(num_train_timesteps)
    if not isinstance(timesteps, list) or not timesteps or not all(type(t) is int and t in known for t in timesteps):
        raise ValueError(f"{path} is damaged: its timesteps are {timesteps}; each is a whole number below {len(known)}")
    return tuple(timesteps)


def load_metrics(folder: Path) -> dict[str, Any] | None:
    """The rows that a teacher's folder keeps of its own quality, or None. Raises ValueError when they are damaged."""
    path = folder / METRICS_FILE
    if not path.exists():
        return None
    metrics = read_json(path, "teacher", "teacher_few_step")
    for name in ("teacher", "teacher_few_step"):
        row = metrics[name] if isinstance(metrics[name], dict) else {}
        numbers = [row.get(key) for key in ("nfe", "guidance", "frechet", "prompt_accuracy", "videos")]
        interval = row.get("frechet_ci")
        numbers += interval if isinstance(interval, list) and len(interval) == 2 else [None]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{path} is damaged: {name} lacks numbers; `tdm-fast evaluate --sweep` writes it anew")
    return metrics


def digest(folder: Path, parts: Sequence[str]) -> str:
    """A short digest of what some parts of a model's folder contain; the same wherever the folder lies."""
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).iterdir() if path.is_file()):
        with open(path, "rb") as file:
            total.update(f"{path.parent.name}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def check_folder(folder: Path) -> None:
    """Refuse, with one message, a folder that `load_pipeline` cannot load. Reads headers only, no weights."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a folder with {INDEX_FILE} and {', '.join(PARTS)}")
    try:
        index = read_json(folder / INDEX_FILE)
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(f"{folder}: no {INDEX_FILE} in it (found: {found}); it takes a pipeline's folder") from None
    classes = {name: _class_name(index, name) for name in PARTS}
    for name, cls in NETWORKS.items():
        if classes[name] != cls.__name__:
            found = f"its {name} is a {classes[name]}" if classes[name] else f"it has no {name}"
            kind = index.get("_class_name", "model")
            raise ValueError(f"{folder} holds a {kind}: {found}; this version takes a {cls.__name__} there")
    missing = [name for name in PARTS if classes[name] is None or not any((folder / name).glob("*"))]
    if missing:
        raise ValueError(f"{folder} is half-written: {', '.join(missing)} missing; copy or make the folder again")
    for name in NETWORKS:
        check_weights(folder / name)


def check_sizes(folder: Path, transformer: Any, vae: Any) -> None:
    """Refuse latents that the transformer's patches cannot divide or the VAE cannot decode, from the two configs."""
    patch = transformer.patch_size
    for axis, unit in (("t", 1), ("h", patch), ("w", patch)):
        size = transformer[f"sample_size_{axis}"]
        if not isinstance(size, int) or size < 1 or size % unit:
            below = size // unit * unit if isinstance(size, int) else 0
            fitting = f"{below} or {below + unit}" if below > 0 else f"{unit}"
            raise ValueError(
                f"{folder / 'transformer'}: sample_size_{axis} is {size}; latents come in whole patches of {unit},"
                f" so {fitting} would do"
            )
    if transformer.in_channels != vae.latent_dim:
        raise ValueError(
            f"{folder}: the transformer takes latents of in_channels={transformer.in_channels} but the VAE decodes"
            f" latent_dim={vae.latent_dim}; the two folders are not of one model"
        )


def check_weights(folder: Path) -> None:
    """Refuse a network's folder that lacks its config or safetensors, or whose files are cut short."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is half-written: it takes config.json and weights as *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or half-written ({error}); copy or make the folder again") from error


def load_network(folder: Path, cls: Any) -> Any:
    """`cls.from_pretrained`, safetensors only. Raises ValueError for weights that are not all of this class."""
    keywords = {} if cls is T5EncoderModel else {"low_cpu_mem_usage": False}
    try:
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **keywords)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: its weights and config.json are not of one {cls.__name__}: {error}") from error
    for keys, says in (("missing_keys", "are missing"), ("unexpected_keys", "are too many")):
        if names := sorted(info[keys]):
            raise ValueError(f"{folder}: {len(names)} weights of {cls.__name__} {says}, {names[0]} first")
    return model


def _class_name(index: dict[str, Any], name: str) -> str | None:
    """The class that a pipeline's index names for a part, or None."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def save_student(folder: Path, transformer: nn.Module, teacher: Path, timesteps: Sequence[int]) -> None:
    """Write a student that samples by itself: its transformer, the teacher's other parts, the nodes of its trajectory.

    Written beside and renamed when whole. Raises SaveError when it cannot be written.
    """
    with whole_folder(folder) as partial:
        for name in PARTS[1:]:
            shutil.copytree(teacher / name, partial / name)
        shutil.copy(teacher / INDEX_FILE, partial / INDEX_FILE)
        (partial / SAMPLER_FILE).write_text(json.dumps({"timesteps": list(timesteps)}) + "\n")
        transformer.save_pretrained(partial / "transformer")  # type: ignore[operator]
