"""The deterministic sub-step: from latents at t and the network's output there to latents at an earlier timestep."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch
from tdm_fast.ops._checks import in_tables, one_per_sample, same_latents, schedule_on, wants_gradient
from tdm_fast.ops._rows import as_rows
from tdm_fast.schedule import Schedule, compute_dtype, per_sample


def ode_step(
    sample: Tensor, model_output: Tensor, *, schedule: Schedule, t: Tensor, t_next: Tensor, backend: str | None = None
) -> Tensor:
    """Latents at `t_next` from `sample` at `t` and the network's raw output there (arXiv 2503.06674).

        x0 = a * sample + b * model_output        eps = c * sample + d * model_output       (tables at t)
        next = alpha * x0 + sigma * eps                                                     (tables at t_next)

    `sample` and `model_output` are latents `[B, ...]` of any rank, strided or not, float32, bfloat16 or float16, also
    mixed (float64 runs the definition); `t` and `t_next` int64 `[B]` on the same device; `t_next = -1` gives x0.
    Returns sample's shape and dtype, contiguous, computed in float32. Differentiable in both latents, any number of
    times. A schedule on another device is copied once. `backend` forces one of "cpp", "cuda", "triton", "torch".

    Raises ValueError for shapes or dtypes other than these, a backend that cannot run here, and, on the CPU,
    timesteps outside the schedule. On a GPU, where looking at them would stall it, those give NaN (in "torch" a
    device assertion).
    """
    same_latents("sample", sample, model_output=model_output)
    one_per_sample("t", t, sample, integer=True)
    one_per_sample("t_next", t_next, sample, integer=True)
    here = schedule_on(schedule, sample)
    tables = (here.a, here.b, here.c, here.d, here.alpha, here.sigma)
    inputs = (sample, model_output, *tables, t, t_next, _dispatch.check_backend(backend))
    # A tracer needs the custom op, whose layers of Python cost more than the kernel does at the latents of images.
    if not (_dispatch.is_plain_eager(sample) and _dispatch.is_plain_eager(model_output)):
        return _ode_step(*inputs)
    if wants_gradient(sample, model_output):
        return _Step.apply(sample, model_output, inputs)
    return _run_ode_step(*inputs)


def _scales(
    tables: tuple[Tensor, ...], t: Tensor, t_next: Tensor, ndim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What sample and model_output are multiplied with, `[B, 1, ...]`."""
    a, b, c, d = (table[t].to(dtype) for table in tables[:4])
    only_x0, index = t_next < 0, t_next.clamp(min=0)
    alpha, sigma = (table[index].to(dtype) for table in tables[4:])
    sample_scale = torch.where(only_x0, a, alpha * a + sigma * c)
    output_scale = torch.where(only_x0, b, alpha * b + sigma * d)
    return per_sample(sample_scale, ndim), per_sample(output_scale, ndim)


def _definition(sample: Tensor, model_output: Tensor, *tables_and_timesteps: Tensor) -> Tensor:
    *tables, t, t_next = tables_and_timesteps
    dtype = compute_dtype(sample, model_output)
    sample_scale, output_scale = _scales(tuple(tables), t, t_next, sample.ndim, dtype)
    result = sample_scale * sample.to(dtype) + output_scale * model_output.to(dtype)
    return result.to(sample.dtype).contiguous()


def _rows(sample: Tensor, model_output: Tensor, *tables_and_timesteps: Tensor) -> tuple[Tensor, ...]:
    return as_rows(sample), as_rows(model_output), *(values.contiguous() for values in tables_and_timesteps)


def _cpp(*tensors: Tensor) -> Tensor:
    return torch.ops.tdm_fast_cpu.ode_step(*_rows(*tensors))


def _cuda(*tensors: Tensor) -> Tensor:
    return torch.ops.tdm_fast_cuda.ode_step(*_rows(*tensors))


def _triton(*tensors: Tensor) -> Tensor:
    # Imported when used: triton is optional, and reads TRITON_INTERPRET when its kernels are defined.
    return importlib.import_module("tdm_fast.kernels.ode_step").ode_step(*_rows(*tensors))


_dispatch.register("ode_step", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})


def _run_ode_step(
    sample: Tensor,
    model_output: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    t_next: Tensor,
    backend: str,
) -> Tensor:
    in_tables(a.shape[0], t=t)
    in_tables(a.shape[0], -1, t_next=t_next)
    run = _dispatch.select("ode_step", backend, sample, model_output)
    return run(sample, model_output, a, b, c, d, alpha, sigma, t, t_next)


_ode_step = torch.library.custom_op("tdm_fast::ode_step", _run_ode_step, mutates_args=())


@_ode_step.register_fake
def _(sample: Tensor, model_output: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(sample, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sample, model_output = inputs[:2]
    ctx.save_for_backward(*inputs[2:10])
    ctx.dtypes, ctx.backend = (sample.dtype, model_output.dtype), inputs[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Linear in both latents: each gradient is a per-sample factor times grad.
    *tables, t, t_next = ctx.saved_tensors
    dtype = torch.float64 if torch.float64 in ctx.dtypes else torch.float32
    scales = _scales(tuple(tables), t, t_next, grad.ndim, dtype)
    gradients = [
        (scale * grad).to(wanted) if needed else None
        for scale, wanted, needed in zip(scales, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*gradients, *[None] * 9)


_ode_step.register_autograd(_backward, setup_context=_save_for_backward)


class _Step(torch.autograd.Function):
    """`ode_step` outside tracing."""

    @staticmethod
    def forward(ctx: Any, sample: Tensor, model_output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        _save_for_backward(ctx, inputs, sample)
        return _run_ode_step(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        traced = torch.is_grad_enabled() or not _dispatch.is_plain_eager(grad)
        if traced or _dispatch.choose("ode_step", grad.device.type, ctx.backend) != "cpp":
            return *_backward(ctx, grad)[:2], None
        return *_native_backward(ctx, grad), None


def _native_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """One pass that reads grad once and writes both gradients; not differentiable."""
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
    if torch.float64 in ctx.dtypes:
        return _backward(ctx, grad)[:2]  # type: ignore[return-value]
    values = (value.contiguous() for value in tensors)
    both = torch.ops.tdm_fast_cpu.ode_step_backward(as_rows(grad), *values, *ctx.dtypes, *needed[:2])
    return both[0] if needed[0] else None, both[1] if needed[1] else None
