"""One network from its folder: config.json and weights, all of them, of the class that is asked for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from tdm_fast.files import read_json, weight_files


def check_weights(folder: Path) -> None:
    """Refuse a network's folder that lacks its config or safetensors, or whose files are cut short or not all there."""
    files = weight_files(folder)
    if not files and (others := sorted(path.name for path in folder.glob("*.safetensors"))):
        raise ValueError(
            f"{folder} holds {others[0]} and no weights without a precision in their name; rename them, or download"
            " those as well"
        )
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is half-written: it takes config.json and weights as *.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or half-written ({error}); copy or make the folder again") from error
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(read_json(index, "weight_map")["weight_map"].values())
        if missing := sorted(shards - {file.name for file in files}):
            raise ValueError(
                f"{folder} is half-written: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first;"
                " copy or make the folder again"
            )


def check_tensors(folder: Path, cls: Any, *, others: bool = False) -> None:
    """Refuse safetensors that are not all of this class and the folder's config; reads their headers only.

    `others` says that tensors that are no part of it may be there. Weights in other files show only when loaded.
    """
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118, no mapping
    if not found:
        return
    try:
        model = empty_network(folder, cls)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: its config.json does not make a {cls.__name__}: {error}") from error
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() & found.keys()):
        if found[name] != wanted[name]:
            raise ValueError(
                f"{folder}: its weights and config.json are not of one {cls.__name__}: {name} has shape {found[name]},"
                f" where the config makes it {wanted[name]}"
            )
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    _refuse_keys(folder, cls, wanted.keys() - found.keys() - tied, set() if others else found.keys() - wanted.keys())


def _refuse_keys(folder: Path, cls: Any, missing: Collection[str], unexpected: Collection[str]) -> None:
    for names, says in ((missing, "are missing"), (unexpected, "are too many")):
        if names:
            raise ValueError(f"{folder}: {len(names)} weights of {cls.__name__} {says}, {min(names)} first")


def load_network(folder: Path, cls: Any) -> Any:
    """`cls.from_pretrained`, no pickles. Raises ValueError for weights that are not all of this class."""
    whole = issubclass(cls, ModelMixin) and not cls._keep_in_fp32_modules  # which diffusers loads in one way only
    keywords = {"low_cpu_mem_usage": False} if whole else {}
    try:
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **keywords)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: its weights and config.json are not of one {cls.__name__}: {error}") from error
    _refuse_keys(folder, cls, info["missing_keys"], info["unexpected_keys"])
    return model


def empty_network(folder: Path, cls: Any) -> Any:
    """A network of a folder's config whose parameters are on the meta device; what it computes for itself is there."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return (
            cls(cls.config_class.from_pretrained(folder))
            if issubclass(cls, PreTrainedModel)
            else cls.from_config(cls.load_config(folder))
        )
