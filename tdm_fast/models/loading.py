"""Folders in the layout of diffusers pipelines, to and from the networks of one text-to-video model."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from tdm_fast.checkpoint import read_json, whole_folder
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.vae import WFVAEWrapper
from tdm_fast.models.wfvae import SPATIAL_STRIDE, WFVAEModel
from tdm_fast.schedule import Schedule

INDEX_FILE = "model_index.json"
SAMPLER_FILE = "few_step.json"
BIASES_FILE = "num_steps.safetensors"
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
    scheduler: Any
    """Of diffusers; the denoiser's schedule is its noise levels."""
    timesteps: tuple[int, ...] | None
    """The nodes of a few-step student's trajectory, descending; None for a teacher."""
    trajectories: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The nodes for each number of steps that a student of several was told in training; empty for others."""
    biases: dict[int, Tensor] = field(default_factory=dict)
    """What makes it the student of each of them: the bias `[d]` of its time embedding's last linear."""

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """`(C, T, H, W)` of the latents that the transformer's config names as its own size."""
        config: Any = self.denoiser.model.config
        return (config.in_channels, config.sample_size_t, config.sample_size_h, config.sample_size_w)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move the networks to a device, but those that have no weights; returns itself."""
        for network in (self.denoiser, self.vae, self.text_encoder):
            if not any(parameter.is_meta for parameter in network.parameters()):
                network.to(device)
        return self

    def latents_of(self, size: str) -> tuple[int, ...]:
        """`(C, T, H, W)` of the latents of videos of `size`, frames x height x width such as 17x64x64.

        Raises ValueError, with the nearest sizes that would do, for one that VAE and patches do not divide.
        """
        frames, height, width = (int(number) for number in size.split("x"))
        config: Any = self.denoiser.model.config
        stride, unit = self.vae.vae.temporal_stride, SPATIAL_STRIDE * config.patch_size
        if (frames - 1) % stride or height % unit or width % unit:
            fitting = [max(1, round((frames - 1) / stride)) * stride + 1 if frames > 1 else 1]
            fitting += [max(1, round(side / unit)) * unit for side in (height, width)]
            raise ValueError(
                f"--video_sizes {size}: frames come as 1 + n·{stride}, height and width in multiples of {unit}; the"
                f" nearest that fits is {'x'.join(map(str, fitting))}"
            )
        latents = ((frames - 1) // stride + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        return (config.in_channels, *latents)

    @property
    def video_shape(self) -> tuple[int, int, int]:
        """`(T, H, W)` of the videos that the VAE makes of such latents, in frames and pixels."""
        _, frames, height, width = self.latent_shape
        return (self.vae.vae.temporal_stride * (frames - 1) + 1, SPATIAL_STRIDE * height, SPATIAL_STRIDE * width)

    @torch.no_grad()
    def set_num_steps(self, num_steps: int) -> None:
        """Make a student of several numbers of steps the one of `num_steps`; without this it is that of the most.

        Raises ValueError for a number that it was not trained for.
        """
        if num_steps not in self.trajectories:
            known = ", ".join(map(str, self.trajectories)) or str(len(self.timesteps or ()) or "any (a teacher)")
            raise ValueError(f"num_steps is {num_steps}; {self.folder} holds a model for {known}")
        bias: Any = self.denoiser.time_embedding().bias
        bias.copy_(self.biases[num_steps])
        self.timesteps = self.trajectories[num_steps]


def load_pipeline(folder: Path, *, empty: Collection[str] = ()) -> Pipeline:
    """Load a teacher's or a student's folder onto the CPU, everything frozen and in evaluation mode.

    A student whose folder keeps its adapter apart gets it merged. The networks named in `empty` are made on the meta
    device, without weights. Raises ValueError when the folder is missing, half-written or holds a model of another
    class, and for a transformer to be left empty that is a student of several files.
    """
    check_folder(folder)
    parts = {
        name: empty_network(folder / name, cls) if name in empty else load_network(folder / name, cls)
        for name, cls in NETWORKS.items()
    }
    index = read_json(folder / INDEX_FILE)
    scheduler_class = getattr(diffusers, index["scheduler"][1], None)
    if scheduler_class is None:
        raise ValueError(f"{folder}: its scheduler is a {index['scheduler'][1]}, which diffusers does not know")
    scheduler = scheduler_class.from_pretrained(folder / "scheduler")
    schedule = Schedule.from_scheduler(scheduler)
    own = _few_step(folder, schedule.num_train_timesteps)
    if "transformer" in empty and (own.adapter or own.trajectories):
        raise ValueError(
            f"{folder}: a student with an adapter or biases beside it is not loaded in shards; --sharding none would do"
        )
    if own.adapter is not None:
        _merge_adapter(parts["transformer"], folder / own.adapter)
    transformer = parts["transformer"].requires_grad_(False).eval()
    check_sizes(folder, transformer.config, parts["vae"].config)
    width = parts["text_encoder"].config.d_model
    if width != transformer.config.caption_channels:
        raise ValueError(
            f"{folder}: the text encoder is {width} wide but the transformer takes caption_channels="
            f"{transformer.config.caption_channels}; the two folders are not of one model"
        )
    denoiser = OpenSoraDenoiser(transformer, schedule)
    pipeline = Pipeline(
        folder=folder,
        denoiser=denoiser,
        vae=WFVAEWrapper(parts["vae"].requires_grad_(False).eval()),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=parts["text_encoder"].requires_grad_(False).eval(),
        scheduler=scheduler,
        timesteps=own.timesteps,
        trajectories=own.trajectories,
        biases=_load_biases(folder, own.trajectories, denoiser.time_embedding()) if own.trajectories else {},
    )
    if own.trajectories:
        pipeline.set_num_steps(max(own.trajectories))
    return pipeline


class FewStep(NamedTuple):
    """What a student's folder says of itself; a teacher's says nothing."""

    timesteps: tuple[int, ...] | None
    trajectories: dict[int, tuple[int, ...]]
    adapter: str | None


def _few_step(folder: Path, num_train_timesteps: int) -> FewStep:
    path = folder / SAMPLER_FILE
    if not path.exists():
        return FewStep(None, {}, None)
    settings = read_json(path, "timesteps")

    def nodes(timesteps: Any) -> tuple[int, ...]:
        known = range(num_train_timesteps)
        if (
            not isinstance(timesteps, list)
            or not timesteps
            or not all(type(t) is int and t in known for t in timesteps)
        ):
            raise ValueError(
                f"{path} is damaged: its timesteps are {timesteps}; each is a whole number below {len(known)}"
            )
        return tuple(timesteps)

    several, adapter = settings.get("num_steps", {}), settings.get("adapter")
    if not isinstance(several, dict) or not all(key.isdecimal() for key in several):
        raise ValueError(
            f"{path} is damaged: its num_steps are {several}; they are the timesteps of each number of steps"
        )
    if adapter is not None and (not isinstance(adapter, str) or Path(adapter).name != adapter):
        raise ValueError(f"{path} is damaged: its adapter is {adapter}; it is the name of a file beside it")
    return FewStep(nodes(settings["timesteps"]), {int(key): nodes(several[key]) for key in several}, adapter)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """A student's further file of tensors. Raises ValueError when it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"{path.parent} is half-written: {path.name} missing; copy or make the folder again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or half-written ({error}); copy or make the folder again") from error


def _load_biases(folder: Path, known: Mapping[int, object], linear: nn.Linear) -> dict[int, Tensor]:
    path = folder / BIASES_FILE
    biases = _load_tensors(path)
    for k in map(str, known):
        shape = biases[k].shape if k in biases else None
        if shape != linear.bias.shape:
            raise ValueError(f"{path} has shape {shape} for {k} steps; the transformer takes {linear.bias.shape}")
    return {k: biases[str(k)] for k in known}


def _merge_adapter(transformer: Any, path: Path) -> None:
    """Add an adapter's file to a network's weights. Raises ValueError when the file is of another network."""
    # A bias in it says what the biases of the student's own file say; merging asks every adapted linear for one.
    tensors = {name: value for name, value in _load_tensors(path).items() if not name.endswith(".bias")}
    paths = {name.split(".lora_")[0].removeprefix("transformer.") for name in tensors}
    modules = dict(transformer.named_modules())
    if not paths or (odd := sorted(paths - modules.keys())):
        raise ValueError(f"{path} is of another network: it adapts {odd[0] if paths else 'nothing'}")
    try:
        transformer.load_lora_adapter(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is of another network: {error}") from error
    transformer.fuse_lora()
    transformer.unload_lora()


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


def empty_network(folder: Path, cls: Any) -> Any:
    """A network of a folder's config whose parameters are on the meta device; what it computes for itself is there."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return (
            cls(cls.config_class.from_pretrained(folder))
            if cls is T5EncoderModel
            else cls.from_config(cls.load_config(folder))
        )


def _class_name(index: dict[str, Any], name: str) -> str | None:
    """The class that a pipeline's index names for a part, or None."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def save_student(
    folder: Path,
    transformer: nn.Module | None,
    teacher: Path,
    timesteps: Sequence[int] | Mapping[int, Sequence[int]],
    *,
    biases: Mapping[int, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
    adapter: str | None = None,
) -> None:
    """Write a student that samples by itself: its transformer, the teacher's other parts, the nodes of its trajectory.

    Without a `transformer` it is the teacher's, and `adapter`, one of `files` (name and content), is merged into it at
    loading. For a student of several numbers of steps `timesteps` are the nodes of each, and `biases` `[d]` what makes
    it the one of each. Written beside and renamed when whole. Raises SaveError when it cannot be written.
    """
    settings: dict[str, Any] = {"timesteps": list(timesteps)}
    if isinstance(timesteps, Mapping):
        settings["timesteps"] = list(timesteps[max(timesteps)])
        settings["num_steps"] = {str(k): list(timesteps[k]) for k in sorted(timesteps)}
    if adapter is not None:
        settings["adapter"] = adapter
    with whole_folder(folder) as partial:
        for name in PARTS[0 if transformer is None else 1 :]:
            shutil.copytree(teacher / name, partial / name)
        shutil.copy(teacher / INDEX_FILE, partial / INDEX_FILE)
        (partial / SAMPLER_FILE).write_text(json.dumps(settings) + "\n")
        if biases is not None:
            tensors = {str(k): bias.detach().cpu().contiguous() for k, bias in biases.items()}
            save_file(tensors, partial / BIASES_FILE, metadata={"format": "pt"})
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        if transformer is not None:
            transformer.save_pretrained(partial / "transformer")  # type: ignore[operator]
