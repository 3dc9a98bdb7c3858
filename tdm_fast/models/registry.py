"""Open-Sora Plan's names: of transformers, of sizes to make videos in, of VAEs; and the folders that hold them.

`Diffusion_models`, `Diffusion_models_class` and the `ae_*` tables have the public names and meaning. A transformer's
name may end in the size of its videos, frames x height x width: `OpenSoraT2V_v1_3_93x640x640`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tdm_fast.models.autoencoder import VideoAutoencoder
from tdm_fast.models.networks import empty_network, load_network
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.sizes import latents_of, units
from tdm_fast.models.vae import CausalVAEWrapper, VAEWrapper, WFVAEWrapper

V = TypeVar("V")

DEFAULT_AE = "WFVAEModel_D8_4x8x8"
TRANSFORMER_SUBFOLDERS = ("model", "transformer", "any93x640x640", ".")
VAE_SUBFOLDERS = ("vae", ".")
# The published 2B model. `cross_attention_dim` is what its config records; it is heads x head_dim.
TWO_BILLION: dict[str, Any] = {
    "num_layers": 32,
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "cross_attention_dim": 2304,
    "caption_channels": 4096,
    "patch_size": 2,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "sparse1d": True,
    "sparse_n": 4,
}
_SIZE_AT_END = re.compile(r"_([1-9]\d*)x([1-9]\d*)x([1-9]\d*)$")


class Preset(NamedTuple):
    """The size of videos, in frames and pixels, that is part of a transformer's name."""

    num_frames: int
    height: int
    width: int


class _Names(dict[str, V]):
    """A table of transformers whose names may have a size at their end, which changes nothing about the entry."""

    def __missing__(self, name: str) -> V:
        if name not in self:
            raise KeyError(name)
        return self[base_name(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(base_name(name))


def base_name(name: str) -> str:
    """A transformer's name without the size at its end."""
    return _SIZE_AT_END.sub("", name)


def open_sora_2b(**config: Any) -> OpenSoraT2V_v1_3:
    """Open-Sora Plan v1.3's transformer of 2.8 billion parameters, random weights; `config` overrides its own."""
    return OpenSoraT2V_v1_3(**TWO_BILLION | config)


Diffusion_models: dict[str, Callable[..., nn.Module]] = _Names(
    {"OpenSoraT2V_v1_3-2B/122": open_sora_2b, "OpenSoraT2V_v1_3": open_sora_2b}
)
"""What makes a transformer of random weights, by name, from its constructor's arguments."""
Diffusion_models_class: dict[str, type[nn.Module]] = _Names(
    {"OpenSoraT2V_v1_3-2B/122": OpenSoraT2V_v1_3, "OpenSoraT2V_v1_3": OpenSoraT2V_v1_3}
)
"""The class with `from_pretrained`, by name."""


class _Ae(NamedTuple):
    wrapper: type[VAEWrapper]
    strides: tuple[int, int, int]
    channels: int


_AES = {
    "CausalVAEModel_D4_2x8x8": _Ae(CausalVAEWrapper, (2, 8, 8), 4),
    "CausalVAEModel_D8_2x8x8": _Ae(CausalVAEWrapper, (2, 8, 8), 8),
    "CausalVAEModel_D4_4x8x8": _Ae(CausalVAEWrapper, (4, 8, 8), 4),
    "CausalVAEModel_D8_4x8x8": _Ae(CausalVAEWrapper, (4, 8, 8), 8),
    "WFVAEModel_D8_4x8x8": _Ae(WFVAEWrapper, (4, 8, 8), 8),
    "WFVAEModel_D16_4x8x8": _Ae(WFVAEWrapper, (4, 8, 8), 16),
    "WFVAEModel_D32_4x8x8": _Ae(WFVAEWrapper, (4, 8, 8), 32),
    "WFVAEModel_D32_8x8x8": _Ae(WFVAEWrapper, (8, 8, 8), 32),
}


def preset(name: str) -> Preset | None:
    """The size at the end of a transformer's name, None if there is none. Raises ValueError for an unknown name."""
    check_name(name)
    size = _SIZE_AT_END.search(name)
    return Preset(*map(int, size.groups())) if size else None


def is_known(name: str) -> bool:
    """Whether `name` is a transformer's, with or without a size at its end."""
    return name in Diffusion_models_class


def check_name(name: str) -> None:
    """Raises ValueError, with the known names, for one that is not a transformer's."""
    if not is_known(name):
        names = ", ".join(Diffusion_models_class)
        raise ValueError(
            f"--model {name!r} is not a model that is known here; it takes {names}, or one of them with the size of the"
            " videos at its end, frames x height x width (OpenSoraT2V_v1_3_93x640x640)"
        )


def check_ae(name: str) -> None:
    """Raises ValueError, with the known names, for one that is not a VAE's."""
    if name not in _AES:
        raise ValueError(f"--ae {name!r} is not a VAE that is known here; it takes {', '.join(_AES)}")


def build(name: str, *, ae: str = DEFAULT_AE, **config: Any) -> nn.Module:
    """A transformer of random weights, by name. Raises ValueError as `configuration` does."""
    arguments = configuration(name, ae=ae, **config)
    return Diffusion_models_class[name](**arguments)


def configuration(name: str, *, ae: str = DEFAULT_AE, **config: Any) -> dict[str, Any]:
    """The arguments of a transformer's constructor: the 2B configuration, in which `config` overrides what it names.

    Latents are those of the VAE named `ae`; a size in the name becomes `sample_size_*`. Raises ValueError for unknown
    names and for sizes that the VAE's strides and the patches do not divide.
    """
    check_ae(ae)
    size, channels = preset(name), _AES[ae].channels
    merged = TWO_BILLION | {"in_channels": channels, "out_channels": channels} | config
    if size is not None:
        latents = latents_of(size, units(_AES[ae].strides, merged["patch_size"]), f"--model {name}")
        own = dict(zip(("sample_size_t", "sample_size_h", "sample_size_w"), latents, strict=True))
        merged = own | merged
    return merged


def find_folder(
    folder: Path, cls: type | tuple[type, ...], subfolders: tuple[str, ...] = TRANSFORMER_SUBFOLDERS
) -> Path:
    """The first of some subfolders, or the folder itself ("."), with config.json and weights of the class, or of one.

    Raises ValueError when there is none; it lists what was tried and what is there.
    """
    classes = cls if isinstance(cls, tuple) else (cls,)
    names = [each.__name__ for each in classes]
    vae = all(issubclass(each, VideoAutoencoder) for each in classes)
    suffixes = [".safetensors", ".ckpt"] if vae else [".safetensors"]
    tried = []
    for place in (folder / name for name in subfolders):
        problem = _what_is_wrong(place, names, suffixes)
        if problem is None:
            return place
        tried.append(f"{place}: {problem}")
    raise ValueError(f"{folder} holds no {' or '.join(names)}. Tried " + "; ".join(tried))


def load_vae(name: str | None, folder: Path | str, *, empty: bool = False) -> VAEWrapper:
    """The VAE of a folder (or of `vae/` in it) with its scale, frozen and in evaluation mode, on the CPU.

    Raises ValueError for an unknown name, a folder without a VAE's config and weights, one whose class, strides or
    channels are not those of `name` (the message has the names that fit), and weights that are not all of it. With
    `empty` it is on the meta device and its weights are not read.
    """
    place = check_vae(name, Path(folder))
    wrapper: Any = _wrapper_of(place)
    load = empty_network if empty else load_network
    return wrapper(load(place, wrapper.model_class)).requires_grad_(False).eval()


def vae_class(folder: Path) -> type[VideoAutoencoder]:
    """The class of the VAE that `check_vae` has found in a folder."""
    return _wrapper_of(folder).model_class


def check_vae(name: str | None, folder: Path) -> Path:
    """Where in `folder` the VAE is that `load_vae` loads. Raises its ValueErrors, but for weights, which it leaves."""
    if name is not None:
        check_ae(name)
    place = find_folder(folder, tuple({ae.wrapper.model_class: None for ae in _AES.values()}), VAE_SUBFOLDERS)
    if name is None:
        return place
    wrapper = _wrapper_of(place)
    try:
        with torch.device("meta"):
            vae = wrapper.model_class.from_config(wrapper.model_class.load_config(place))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: its config.json does not make a {wrapper.model_class.__name__}: {error}") from error
    found = _Ae(wrapper, (vae.temporal_stride, vae.spatial_stride, vae.spatial_stride), vae.latent_channels)
    if found != _AES[name]:
        fitting = [other for other, ae in _AES.items() if ae == found]
        says = f"--ae {' or '.join(fitting)} would do" if fitting else "no name of --ae is of such; leave it out"
        raise ValueError(
            f"--ae {name}: {place} holds a {wrapper.model_class.__name__} with {found.channels} latent channels and"
            f" strides {'x'.join(map(str, found.strides))}; {says}"
        )
    return place


ae_wrapper: dict[str, Callable[[Path | str], VAEWrapper]] = {name: partial(load_vae, name) for name in _AES}
"""What loads a VAE with its scale from its folder, by the VAE's name."""
ae_stride_config: dict[str, list[int]] = {name: list(ae.strides) for name, ae in _AES.items()}
"""Frames, rows and columns per latent."""
ae_channel_config: dict[str, int] = {name: ae.channels for name, ae in _AES.items()}
"""Latent channels."""


def _to_signed(x: Tensor) -> Tensor:
    """Pixels from [0, 1] to [-1, 1]."""
    return 2.0 * x - 1.0


def _to_unsigned(x: Tensor) -> Tensor:
    """Pixels from [-1, 1] to [0, 1]."""
    return (x + 1.0) / 2.0


ae_norm: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(_AES, _to_signed)
"""Pixels from [0, 1] to what the VAE encodes."""
ae_denorm: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(_AES, _to_unsigned)
"""What the VAE decodes to pixels in [0, 1]."""


def _class_of(folder: Path) -> str | None:
    """The class that a folder's config.json names, None without one. Raises ValueError for a damaged file."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({error}); copy or make the folder again") from error
    return config.get("_class_name") if isinstance(config, dict) else None


def _what_is_wrong(folder: Path, class_names: list[str], suffixes: list[str]) -> str | None:
    """Why a folder cannot be loaded as one of some classes, in words for a list; None if nothing speaks against it."""
    if not folder.is_dir():
        return "no such folder"
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    if not (folder / "config.json").is_file():
        return f"no config.json (found: {found})"
    if (named := _class_of(folder)) not in class_names:
        return f"a {named}" if named else "its config.json names no class"
    if not any(any(folder.glob(f"*{suffix}")) for suffix in suffixes):
        return f"config.json without weights as *{' or *'.join(suffixes)} (found: {found})"
    return None


def _wrapper_of(folder: Path) -> type[VAEWrapper]:
    class_name = _class_of(folder)
    return next(ae.wrapper for ae in _AES.values() if ae.wrapper.model_class.__name__ == class_name)
