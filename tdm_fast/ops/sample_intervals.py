"""Which step of the trajectory, which interval and which timestep an update works on, per sample (arXiv 2503.06674)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch
from tdm_fast.ops._checks import counter
from tdm_fast.philox import Purpose, bounded, check_stream, random_integers
from tdm_fast.schedule import Schedule

Intervals = tuple[Tensor, Tensor, Tensor, Tensor]
"""`(k, t_gen, t_mid, t)`, int64 `[B]` each."""
MAX_NODES = 256
"""Longest trajectory that the kernels take, whose arguments hold it; longer ones run the definition."""


def trajectory_nodes(num_steps: int, total_steps: int) -> list[int]:
    """Timesteps t_k = k * T // K - 1 of the student's steps, k = K ... 1: (4, 900) gives [899, 674, 449, 224].

    Raises ValueError unless K = `num_steps` divides T = `total_steps`: else a rollout in equal strides would leave the
    timesteps that the student is trained at.
    """
    if num_steps < 1 or total_steps < 1:
        raise ValueError(f"num_steps is {num_steps} and total_steps {total_steps}; both must be at least 1")
    if total_steps % num_steps:
        below = total_steps - total_steps % num_steps
        fits = " or ".join(str(value) for value in (below, below + num_steps) if value > 0)
        raise ValueError(f"num_steps is {num_steps}, which does not divide total_steps {total_steps}; {fits} would do")
    return [step * total_steps // num_steps - 1 for step in range(num_steps, 0, -1)]


def resolve_nodes(num_steps: int, total_steps: int, nodes: Sequence[int] | None) -> list[int]:
    """The trajectory's timesteps, descending: explicit `nodes` if there are any, else the formula's.

    Raises ValueError if explicit nodes do not descend to 0 or more, or contradict `num_steps` (their number) or
    `total_steps` (the first one plus 1).
    """
    if nodes is None:
        return trajectory_nodes(num_steps, total_steps)
    nodes = [int(node) for node in nodes]
    if not nodes or nodes[-1] < 0 or any(high <= low for high, low in pairwise(nodes)):
        raise ValueError(f"nodes are {nodes}; they must descend strictly and not go below 0, such as 999 856 665 399")
    if len(nodes) != num_steps:
        raise ValueError(f"num_steps is {num_steps}, but nodes are {nodes}; num_steps must be {len(nodes)}")
    if nodes[0] + 1 != total_steps:
        raise ValueError(f"total_steps is {total_steps}, but nodes start at {nodes[0]}; it must be {nodes[0] + 1}")
    return nodes


def check_intervals(
    num_steps: int,
    total_steps: int,
    *,
    separate: bool = True,
    randmid: bool = False,
    nodes: Sequence[int] | None = None,
    min_timestep: int = 20,
    margin: int = 10,
    mid_gap: int = 20,
    schedule: Schedule | None = None,
) -> list[int]:
    """Check at start-up that every range that is drawn from has a value in it; returns the trajectory's timesteps.

    Given a `schedule`, also check that its tables reach the trajectory and that the signal-to-noise ratio, and with it
    the weight of the fake-score loss, is above 0 at the noisiest timestep that can be drawn (this one reads a value
    from the device). Raises ValueError, naming the step whose range is empty.
    """
    for name, value in (("min_timestep", min_timestep), ("margin", margin), ("mid_gap", mid_gap)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    trajectory = resolve_nodes(num_steps, total_steps, nodes)
    highest = 0
    for index, t_gen in enumerate(trajectory):
        lowest_mid = trajectory[index + 1] + 1 if index + 1 < num_steps else 0
        highest_mid = t_gen - mid_gap - 1 if randmid else lowest_mid
        where = f"(total_steps, num_steps) = ({total_steps}, {num_steps}): the step at timestep {t_gen}"
        if highest_mid < lowest_mid:
            raise ValueError(
                f"{where} has no room for a random t_mid in [{lowest_mid}, {t_gen - mid_gap}); use fewer steps, a"
                f" larger total_steps, a mid_gap below {t_gen - lowest_mid}, or no randmid"
            )
        low, high = max(min_timestep, highest_mid), (t_gen if separate else total_steps) - margin
        if high <= low:
            raise ValueError(
                f"{where} has no timestep left in [{low}, {high}); use fewer steps, a larger total_steps, a smaller"
                f" margin (now {margin}) or min_timestep (now {min_timestep})"
            )
        highest = max(highest, high - 1)
    if schedule is not None:
        _check_schedule(schedule, total_steps, highest, margin)
    return trajectory


def _check_schedule(schedule: Schedule, total_steps: int, highest: int, margin: int) -> None:
    length = schedule.num_train_timesteps
    if total_steps > length:
        raise ValueError(f"total_steps is {total_steps}, but the schedule has {length} timesteps; use at most {length}")
    if not float(schedule.snr[highest]) > 0:
        raise ValueError(
            f"timestep {highest} can be drawn, where the schedule has no signal and the fake-score loss no weight; use"
            f" a margin of at least {margin + 1} (now {margin}) or a smaller total_steps"
        )


class Settings(NamedTuple):
    """What stays the same from draw to draw, checked, and once more as the kernels read it."""

    nodes: list[int]
    total_steps: int
    stream: int
    separate: bool
    randmid: bool
    min_timestep: int
    margin: int
    mid_gap: int
    packed: Tensor
    """int64 on the CPU, whatever the device: one argument in place of eight that each have to be unpacked."""


def _settings(num_steps: int, total_steps: int, nodes: tuple[int, ...] | None, stream: int, *options: Any) -> Settings:
    trajectory = _checked(num_steps, total_steps, nodes, stream, *options)
    separate, randmid, min_timestep, margin, mid_gap = options
    numbers = [stream, total_steps, int(separate), int(randmid), min_timestep, margin, mid_gap, *trajectory]
    packed = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return Settings(trajectory, total_steps, stream, separate, randmid, min_timestep, margin, mid_gap, packed)


def _checked(num_steps: int, total_steps: int, nodes: tuple[int, ...] | None, stream: int, *options: Any) -> list[int]:
    names = ("separate", "randmid", "min_timestep", "margin", "mid_gap")
    trajectory = check_intervals(num_steps, total_steps, nodes=nodes, **dict(zip(names, options, strict=True)))
    check_stream(stream)
    return trajectory


# A training run asks the same thing twice per iteration. Typed, because 4.0 is equal to 4 and no number of steps.
_settings_of = functools.lru_cache(maxsize=64, typed=True)(_settings)
_HALF = 1 << 63
_CPU = torch.device("cpu")
_ON_CPU = torch.empty(0, dtype=torch.int64, device=_CPU)


def sample_intervals(
    batch_size: int,
    *,
    num_steps: int,
    total_steps: int,
    seed: int | Tensor,
    iteration: int | Tensor,
    stream: int = 0,
    sample_offset: int = 0,
    separate: bool = True,
    randmid: bool = False,
    nodes: Sequence[int] | None = None,
    min_timestep: int = 20,
    margin: int = 10,
    mid_gap: int = 20,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw `(k, t_gen, t_mid, t)`, int64 `[B]` each, on `device`, without host synchronisation.

        k ~ U{1..K}              t_gen = t_k              t_mid = t_{k-1} + 1 (0 for k = 1)
        t_mid ~ U[t_mid, t_gen - mid_gap)                 with `randmid`
        t ~ U[max(min_timestep, t_mid), hi)               hi = t_gen - margin if `separate`, else T - margin

    `nodes` are explicit timesteps, descending, in place of t_k = k*T//K - 1. `seed` and `iteration` are ints or 0-d
    int64 tensors on `device`; `sample_offset` is the global index of the first sample. Of the sample's first Philox
    block (purpose INTERVALS) word 0 gives k, word 1 t_mid and word 2 t. `backend` forces one of "cpp", "cuda",
    "triton", "torch". Raises ValueError as `check_intervals` does, for a negative `batch_size`, and for a backend that
    cannot run here.
    """
    if batch_size < 0:
        raise ValueError(f"batch_size is {batch_size}; it must be 0 or more")
    if nodes is not None:
        nodes = tuple(nodes)
    backend = _dispatch.check_backend(backend)
    device = _CPU if device == "cpu" else torch.device(device)
    seed_tensor = iteration_tensor = None
    # Nearly always a plain int, whose check is not worth a call.
    if type(seed) is not int or not -_HALF <= seed < _HALF:
        seed_tensor, seed = counter("seed", seed, device)
    if type(iteration) is not int or not -_HALF <= iteration < _HALF:
        iteration_tensor, iteration = counter("iteration", iteration, device)
    options = (num_steps, total_steps, nodes, stream, separate, randmid, min_timestep, margin, mid_gap)
    draw = (seed_tensor, iteration_tensor, seed, iteration, batch_size, sample_offset)
    # A tracer needs the custom op; it alone costs as much as everything else here, and nothing is differentiable.
    if _dispatch.is_traced():
        trajectory = _checked(*options)
        out = _sample_intervals(*draw, num_steps, total_steps, trajectory, *options[3:], device, backend)
        k, t_gen, t_mid, t = out.unbind(0)
        return k, t_gen, t_mid, t
    return _draw(device, backend, options, *draw)


def _draw(device: torch.device, backend: str, options: tuple[Any, ...], *draw: Any) -> Intervals:
    settings = _settings_of(*options)
    if device is _CPU:
        kind, like = "cpu", _ON_CPU
    else:
        kind, like = device.type, torch.empty(0, dtype=torch.int64, device=device)
    chosen = _dispatch.choose("sample_intervals", kind, backend) if len(settings.nodes) <= MAX_NODES else "torch"
    return _dispatch.implementation("sample_intervals", chosen)(like, settings, *draw)


def _definition(
    like: Tensor,
    settings: Settings,
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    batch_size: int,
    sample_offset: int,
) -> Intervals:
    words = random_integers(
        (4,),
        batch_size,
        seed=seed if seed_tensor is None else seed_tensor,
        iteration=iteration if iteration_tensor is None else iteration_tensor,
        stream=settings.stream,
        purpose=Purpose.INTERVALS,
        sample_offset=sample_offset,
        device=like.device,
    )
    k = 1 + bounded(words[:, 0], len(settings.nodes))
    return k, *_at_steps(k, words, settings)


def _at_steps(k: Tensor, words: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    nodes = settings.nodes
    # Selecting among constants instead of indexing a table: a table would have to be copied to the device first.
    t_gen, t_mid = torch.zeros_like(k), torch.zeros_like(k)
    for step, node in zip(range(len(nodes), 0, -1), nodes, strict=True):
        t_gen = torch.where(k == step, node, t_gen)
        t_mid = torch.where(k == step + 1, node + 1, t_mid)
    if settings.randmid:
        t_mid = t_mid + bounded(words[:, 1], t_gen - settings.mid_gap - t_mid)
    low = t_mid.clamp(min=settings.min_timestep)
    high = (t_gen if settings.separate else torch.full_like(t_gen, settings.total_steps)) - settings.margin
    return t_gen, t_mid, low + bounded(words[:, 2], high - low)


def intervals_at(
    k: Tensor,
    *,
    num_steps: int,
    total_steps: int,
    seed: int,
    iteration: int,
    stream: int = 0,
    sample_offset: int = 0,
    separate: bool = True,
    randmid: bool = False,
    nodes: Sequence[int] | None = None,
    min_timestep: int = 20,
    margin: int = 10,
    mid_gap: int = 20,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(t_gen, t_mid, t)` of `sample_intervals` for steps `k` (int64 `[B]`, each in 1..K) that were chosen elsewhere.

    t_mid and t come from the same words as there, so a k that `sample_intervals` drew gives its other three results.
    Plain torch on k's device. Raises ValueError as `check_intervals` does, and for a k of another shape or dtype.
    """
    if k.ndim != 1 or k.dtype != torch.int64:
        raise ValueError(f"k is {k.dtype} of shape {tuple(k.shape)}; it must be int64 [B], one step per sample")
    given = None if nodes is None else tuple(nodes)
    settings = _settings_of(num_steps, total_steps, given, stream, separate, randmid, min_timestep, margin, mid_gap)
    words = random_integers(
        (4,),
        len(k),
        seed=seed,
        iteration=iteration,
        stream=stream,
        purpose=Purpose.INTERVALS,
        sample_offset=sample_offset,
        device=k.device,
    )
    return _at_steps(k, words, settings)


def _cpp(like: Tensor, settings: Settings, *draw: Any) -> Intervals:
    drawn: Intervals = torch.ops.tdm_fast_cpu.sample_intervals(like, settings.packed, *draw)
    return drawn


def _cuda(like: Tensor, settings: Settings, *draw: Any) -> Intervals:
    drawn: Intervals = torch.ops.tdm_fast_cuda.sample_intervals(like, settings.packed, *draw)
    return drawn


def _triton(like: Tensor, settings: Settings, *draw: Any) -> Intervals:
    module = importlib.import_module("tdm_fast.kernels.sample_intervals")
    drawn: Intervals = module.sample_intervals(like, *settings[:-1], *draw)
    return drawn


_dispatch.register("sample_intervals", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})


@torch.library.custom_op("tdm_fast::sample_intervals", mutates_args=())
def _sample_intervals(
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    batch_size: int,
    sample_offset: int,
    num_steps: int,
    total_steps: int,
    nodes: list[int],
    stream: int,
    separate: bool,
    randmid: bool,
    min_timestep: int,
    margin: int,
    mid_gap: int,
    device: torch.device,
    backend: str,
) -> Tensor:
    options = (num_steps, total_steps, tuple(nodes), stream, separate, randmid, min_timestep, margin, mid_gap)
    draw = (seed_tensor, iteration_tensor, seed, iteration, batch_size, sample_offset)
    return torch.stack(_draw(device, backend, options, *draw))


@_sample_intervals.register_fake
def _(
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    batch_size: int,
    *others: Any,
) -> Tensor:
    return torch.empty((4, batch_size), dtype=torch.int64, device=others[-2])
