"""One network from its folder: config.json and weights, all of them, of the class that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from tdm_fast.files import read_json


def check_weights(folder: Path) -> None:
    """Refuse a network's folder that lacks its config or safetensors, or whose files are cut short or not all there."""
    files = sorted(folder.glob("*.safetensors"))
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


def load_network(folder: Path, cls: Any) -> Any:
    """`cls.from_pretrained`, no pickles. Raises ValueError for weights that are not all of this class."""
    keywords = {"low_cpu_mem_usage": False} if issubclass(cls, ModelMixin) else {}
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
            if issubclass(cls, PreTrainedModel)
            else cls.from_config(cls.load_config(folder))
        )
