"""Argument checks and small conversions that the ops share. On a GPU none of them looks at a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_fast.schedule import Schedule, per_sample

LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INT64_VALUES = 1 << 64
_INFINITY = float("inf")


def same_latents(like: str, reference: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all are latents `[B, ...]` of one shape, on one device, of a floating dtype."""
    shape, device = reference.shape, reference.device
    for name, tensor in ((like, reference), *others.items()):
        if not shape or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {like} {tuple(shape)}; both must be latents"
                " [B, ...] of one shape"
            )
        if tensor.dtype not in LATENT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; latents are float32, bfloat16, float16 or float64")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {like}'s device, {device}")


def one_per_sample(name: str, values: Tensor, latents: Tensor, *, integer: bool = False) -> None:
    """Raise ValueError unless `values` is `[B]` on the device of latents `[B, ...]`, int64 where `integer` asks it."""
    if values.shape != latents.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; it must be {tuple(latents.shape[:1])}, one per sample"
        )
    if integer and values.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {values.dtype}; timesteps must be torch.int64")
    if values.device != latents.device:
        raise ValueError(f"{name} is on {values.device}; it must be on the latents' device, {latents.device}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number above 0; infinity counts."""
    # Written so that NaN fails too, without math.isnan, which torch.compile cannot trace on a dynamic float.
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be a number above 0")


def finite_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not 0 < value < _INFINITY:
        raise ValueError(f"{name} is {value}; it must be a finite number above 0")


def schedule_on(schedule: Schedule, latents: Tensor) -> Schedule:
    """The schedule on the latents' device. Raises ValueError for anything that is no `Schedule`."""
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is a {type(schedule).__name__}; it must be a tdm_fast.Schedule, which"
            " Schedule.from_scheduler makes from a diffusers scheduler"
        )
    return schedule.to(latents.device)


def in_tables(length: int, lowest: int = 0, **timesteps: Tensor) -> None:
    """On the CPU, raise ValueError unless all `timesteps` are from `lowest` to `length - 1`."""
    for name, values in timesteps.items():
        if values.device.type != "cpu":
            continue
        listed = values.tolist()
        if listed and (min(listed) < lowest or max(listed) >= length):
            raise ValueError(f"{name} is {listed}; timesteps must be from {lowest} to {length - 1} in this schedule")


def counter(name: str, value: int | Tensor, device: torch.device) -> tuple[Tensor | None, int]:
    """A seed or an iteration as `(tensor, number)`: a 0-d int64 tensor on `device` and 0, or None and an int64.

    Integers wrap modulo 2^64. Raises ValueError for any other tensor.
    """
    if isinstance(value, float):
        raise ValueError(f"{name} is {value}; it must be an int or a 0-d torch.int64 tensor on {device}")
    if not isinstance(value, Tensor):
        half = _INT64_VALUES // 2
        return None, value if -half <= value < half else (value + half) % _INT64_VALUES - half
    elsewhere = value.device.type != device.type or device.index not in (None, value.device.index)
    if value.ndim != 0 or value.dtype != torch.int64 or elsewhere:
        raise ValueError(
            f"{name} is a tensor {tuple(value.shape)} of {value.dtype} on {value.device}; it must be an int or a 0-d"
            f" torch.int64 tensor on {device}"
        )
    return value, 0


def guidance(cfg: float | Tensor, latents: Tensor) -> tuple[Tensor | None, float]:
    """Guidance as `(tensor, number)`: a tensor `[B]` and 0.0 from a tensor `[B]` or 0-d, None and the float itself."""
    if not isinstance(cfg, Tensor):
        return None, float(cfg)
    if cfg.ndim == 0:
        cfg = cfg.expand(latents.shape[:1])
    one_per_sample("cfg", cfg, latents)
    return cfg.detach(), 0.0


def detached(tensor: Tensor) -> Tensor:
    """`tensor` without its gradient; itself if it has none."""
    return tensor.detach() if tensor.requires_grad else tensor


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward can come to one of `tensors`."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def float_vector(values: Tensor) -> Tensor:
    """`[B]` of any dtype as contiguous float32, as the kernels read it."""
    return values.to(torch.float32).contiguous()


def sample_mean(values: Tensor) -> Tensor:
    """Mean over everything but the batch: `[B, ...]` to `[B]`."""
    return values.mean(dim=tuple(range(1, values.ndim))) if values.ndim > 1 else values


def at_timesteps(tables: tuple[Tensor, ...], t: Tensor, ndim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Each of the tables `[N]` at `t` `[B]`, as `[B, 1, ...]` with `ndim` dimensions."""
    return tuple(per_sample(table[t].to(dtype), ndim) for table in tables)
