"""What a student's folder has beside the parts of its teacher: nodes of trajectories, biases, an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdm_fast.files import read_json, whole_folder
from tdm_fast.models.sources import SAMPLER_FILE, Sources

BIASES_FILE = "num_steps.safetensors"


class FewStep(NamedTuple):
    """What a student's folder says of itself; a teacher's says nothing."""

    timesteps: tuple[int, ...] | None
    trajectories: dict[int, tuple[int, ...]]
    adapter: str | None
    size: tuple[int, ...] | None = None


def read_few_step(folder: Path, num_train_timesteps: int) -> FewStep:
    """What a folder's sampler file says. Raises ValueError when it is damaged."""
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
    size = settings.get("size")
    if size is not None and not (isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)):
        raise ValueError(f"{path} is damaged: its size is {size}; it is [T, H, W] of its latents")
    known = {int(key): nodes(several[key]) for key in several}
    return FewStep(nodes(settings["timesteps"]), known, adapter, None if size is None else tuple(size))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """A student's further file of tensors. Raises ValueError when it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"{path.parent} is half-written: {path.name} missing; copy or make the folder again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or half-written ({error}); copy or make the folder again") from error


def load_biases(folder: Path, known: Mapping[int, object], linear: nn.Linear) -> dict[int, Tensor]:
    """`Pipeline.biases` for the numbers of steps `known`. Raises ValueError when they are not the linear's."""
    path = folder / BIASES_FILE
    biases = _load_tensors(path)
    for k in map(str, known):
        shape = biases[k].shape if k in biases else None
        if shape != linear.bias.shape:
            raise ValueError(f"{path} has shape {shape} for {k} steps; the transformer takes {linear.bias.shape}")
    return {k: biases[str(k)] for k in known}


def load_adapter(transformer: nn.Module, path: Path, prefix: str = "transformer.") -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter's file as `Weights.products` of a network. Raises ValueError when the file is of another network."""
    # A bias in it says what the biases of the student's own file say.
    tensors = {name: value for name, value in _load_tensors(path).items() if not name.endswith(".bias")}
    paths = {name.split(".lora_")[0].removeprefix(prefix) for name in tensors}
    modules = dict(transformer.named_modules())
    if not paths or (odd := sorted(paths - modules.keys())):
        raise ValueError(f"{path} is of another network: it adapts {odd[0] if paths else 'nothing'}")
    products = {}
    for name in sorted(paths):
        halves = [tensors.get(f"{prefix}{name}.lora_{half}.weight", torch.empty(0)) for half in "BA"]
        up, down = halves
        weight: Any = modules[name].weight
        if (*up.shape, *down.shape) != (weight.shape[0], up.shape[-1], up.shape[-1], *weight.shape[1:]):
            shapes = " and ".join(str(list(half.shape)) for half in halves)
            raise ValueError(f"{path} is of another network: size mismatch, {shapes} for {name} {list(weight.shape)}")
        products[f"{name}.weight"] = (up, down)
    return products


def save_student(
    folder: Path,
    transformer: nn.Module,
    teacher: Sources | Path,
    timesteps: Sequence[int] | Mapping[int, Sequence[int]],
    *,
    biases: Mapping[int, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
    adapter: str | None = None,
    size: Sequence[int] | None = None,
) -> None:
    """Write a student that samples by itself: its transformer, the teacher's other parts, the nodes of its trajectory.

    With an `adapter`, one of `files` (name and content), the weights are the teacher's, into which it is merged at
    loading, and `transformer` says the config alone. `size` is `(T, H, W)` of its latents where no config says it.
    For a student of several numbers of steps `timesteps` are the nodes of each, and `biases` `[d]` what makes it the
    one of each. The teacher's weights are linked where that is
    possible. Written beside and renamed when whole. Raises SaveError when it cannot be written.
    """
    sources = Sources.of_folder(teacher) if isinstance(teacher, Path) else teacher
    model: Any = transformer
    settings: dict[str, Any] = {"timesteps": list(timesteps)}
    if isinstance(timesteps, Mapping):
        settings["timesteps"] = list(timesteps[max(timesteps)])
        settings["num_steps"] = {str(k): list(timesteps[k]) for k in sorted(timesteps)}
    if adapter is not None:
        settings["adapter"] = adapter
    if size is not None:
        settings["size"] = list(size)
    part = sources.family.part
    with whole_folder(folder) as partial:
        sources.save(partial, [name for name in sources.folders if name != part or adapter is not None])
        (partial / SAMPLER_FILE).write_text(json.dumps(settings) + "\n")
        if biases is not None:
            tensors = {str(k): bias.detach().cpu().contiguous() for k, bias in biases.items()}
            save_file(tensors, partial / BIASES_FILE, metadata={"format": "pt"})
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        if adapter is None:
            model.save_pretrained(partial / part)
        else:
            model.save_config(partial / part)
