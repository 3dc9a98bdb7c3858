"""Argument checks and small reductions that the ops share. None of them looks at a tensor's values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdm_fast.schedule import per_sample


def same_shape(name: str, tensor: Tensor, like: str, reference: Tensor) -> None:
    """Raise ValueError unless the latents `tensor` and `reference` are `[B, ...]` of one shape."""
    if reference.ndim < 1 or tensor.shape != reference.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and {like} {tuple(reference.shape)}; both must be latents [B, ...]"
            " of one shape"
        )


def one_per_sample(name: str, values: Tensor, latents: Tensor, *, integer: bool = False) -> None:
    """Raise ValueError unless `values` is `[B]` for latents `[B, ...]`, and int64 where `integer` is asked for."""
    if values.shape != latents.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be {tuple(latents.shape[:1])}, one per sample"
        )
    if integer and values.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {values.dtype}; timesteps must be torch.int64")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number above 0; infinity counts."""
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} is {value}; it must be a number above 0")


def guidance(cfg: float | Tensor, latents: Tensor, dtype: torch.dtype) -> float | Tensor:
    """`cfg - 1`, ready to be multiplied with latents, from a float, a 0-d tensor or a tensor `[B]`."""
    if not isinstance(cfg, Tensor):
        return cfg - 1.0
    if cfg.ndim > 0:
        one_per_sample("cfg", cfg, latents)
        cfg = per_sample(cfg, latents.ndim)
    return cfg.detach().to(dtype) - 1


def sample_mean(values: Tensor) -> Tensor:
    """Mean over everything but the batch: `[B, ...]` to `[B]`."""
    return values.mean(dim=tuple(range(1, values.ndim))) if values.ndim > 1 else values
