"""Open-Sora Plan's own package `opensora`, where it can be imported: its registries, and its models for our denoisers.

It was written for other versions of its libraries; what stands in the way of running its models is mended here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdm_fast.models import registry
from tdm_fast.models.networks import load_network

DIFFUSION, CAUSAL_VIDEO_VAE = "opensora.models.diffusion", "opensora.models.causalvideovae"


class Registries(NamedTuple):
    """The package's tables, by their own names; ours of the same names are in `tdm_fast.models.registry`."""

    Diffusion_models: Mapping[str, Callable[..., nn.Module]]
    Diffusion_models_class: Mapping[str, type[nn.Module]]
    ae_wrapper: Mapping[str, Callable[..., nn.Module]]
    ae_stride_config: Mapping[str, list[int]]
    ae_channel_config: Mapping[str, int]
    ae_norm: Mapping[str, Callable[[Tensor], Tensor]]
    ae_denorm: Mapping[str, Callable[[Tensor], Tensor]]


def is_importable() -> bool:
    """Whether a package `opensora` is there. It may still lack what it imports: see `registries`."""
    return importlib.util.find_spec("opensora") is not None


def registries() -> Registries:
    """The package's registries.

    Raises ValueError when there is no such package, or when importing it fails, with what it lacks.
    """
    if not is_importable():
        raise ValueError(
            "--opensora_source upstream: no package opensora can be imported; put a checkout of Open-Sora Plan on"
            " PYTHONPATH, or use --opensora_source native"
        )
    try:
        modules = [importlib.import_module(name) for name in (DIFFUSION, CAUSAL_VIDEO_VAE)]
        tables = [getattr(modules[0 if name.startswith("Diffusion") else 1], name) for name in Registries._fields]
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--opensora_source upstream: the package opensora does not import here ({error}); install what it lacks,"
            " or use --opensora_source native"
        ) from error
    return Registries(*tables)


def build(name: str, *, ae: str = registry.DEFAULT_AE, **config: Any) -> nn.Module:
    """The package's transformer of random weights, configured as `registry.build` configures ours.

    Raises ValueError as `registry.build` does, for a package that does not import, and a name that it does not know.
    """
    cls = _entry(registries().Diffusion_models_class, registry.base_name(name))
    return runnable(cls(**registry.configuration(name, ae=ae, **config)))


def load_transformer(folder: Path, name: str = "OpenSoraT2V_v1_3") -> nn.Module:
    """The package's transformer with the weights of a folder (`registry.find_folder`), on the CPU.

    Raises ValueError for a package that does not import, a name that it does not know, and a folder that does not hold
    the whole of such a model.
    """
    cls = _entry(registries().Diffusion_models_class, registry.base_name(name))
    return runnable(load_network(registry.find_folder(folder, cls), cls))


def runnable(model: nn.Module) -> nn.Module:
    """The package's transformer, called like ours from now on: masks may be None, and it runs on any device.

    Its class, weights and configuration stay its own.
    """
    model.register_forward_pre_hook(_fill_masks, with_kwargs=True)
    # It allows attention one kernel, which CPUs do not have, by a switch that PyTorch is giving up; PyTorch may choose.
    torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()  # type: ignore[assignment]
    return model


def _fill_masks(
    _model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Ones for masks that the denoiser leaves out. `args` are its x_t, timestep and encoder_hidden_states."""
    if "added_time_embedding" in keywords:
        raise ValueError(
            "--opensora_source upstream: its transformer cannot be told a number of steps (--unify); native can"
        )
    if keywords.get("attention_mask") is not None:  # the package's own pipeline calls it, with everything by name
        return args, keywords
    x_t, _, states = args
    mask = keywords["encoder_attention_mask"]
    if isinstance(states, list):
        masks = mask or [None] * len(states)
        mask = [_ones(each) if own is None else own for each, own in zip(states, masks, strict=True)]
    elif mask is None:
        mask = _ones(states)
    filled = {"attention_mask": x_t.new_ones(x_t.shape[0], *x_t.shape[2:]), "encoder_attention_mask": mask}
    return args, keywords | filled


def _ones(states: Tensor) -> Tensor:
    """A mask `[B, 1, L]` that keeps all of `[B, 1, L, D]`."""
    return states.new_ones(states.shape[:-1])


def _entry(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"--opensora_source upstream: the package opensora has no {name}; it has {', '.join(table)}")
    return table[name]
