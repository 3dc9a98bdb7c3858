"""What the losses share: the gradient that the forward pass leaves behind, and the one backward that scales it.

The gradient of each loss is a number per element, known in the pass that sums the loss, times a factor per sample,
known when that sum is. The first (the residual) is written in the forward, the second multiplied in by the backward:

    gradient[b, i] = residual[b, i] * (scale[b] * grad_output)

Keeping the residual, which is of the size of the errors or at most 1, and not the gradient, which is smaller by the
number of elements, keeps half precision with loss scaling from underflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdm_fast.ops import _dispatch
from tdm_fast.ops._rows import as_rows
from tdm_fast.schedule import per_sample

LossOutputs = tuple[Tensor, Tensor, Tensor]
"""What a loss op returns: the loss, the residual and the scale."""


def residual_dtype(compute: torch.dtype, differentiated: torch.dtype, *, bounded: bool) -> torch.dtype:
    """The residual's dtype: the differentiated input's, but float32 for an unbounded one, which overflows float16."""
    if compute == torch.float64:
        return compute
    return torch.float32 if differentiated == torch.float16 and not bounded else differentiated


def kept(residual: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
    """The residual as a loss's definition returns it: detached, contiguous, in `dtype`; empty unless `wanted`."""
    if not wanted:
        return residual.new_empty(0, dtype=torch.float32)
    return residual.detach().to(dtype).contiguous()


def fake_outputs(latents: Tensor, compute: torch.dtype, dtype: torch.dtype, wanted: bool) -> tuple[Tensor, ...]:
    """`(loss, residual, scale)` of a loss op without values, for tracing."""
    residual = latents.new_empty(latents.shape, dtype=dtype) if wanted else latents.new_empty(0, dtype=torch.float32)
    return latents.new_empty((), dtype=compute), residual, latents.new_empty(latents.shape[:1], dtype=compute)


def _definition(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    if grad_output.shape == residual.shape:
        factor = per_sample(scale, residual.ndim) * grad_output
    else:
        factor = per_sample(scale * grad_output, residual.ndim)
    # The factor may be float64 or float32; residuals of half precision are widened by it.
    return (residual.to(factor.dtype) * factor).to(dtype).contiguous()


def _cpp(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.tdm_fast_cpu.scale_gradient(residual, scale, as_grad(grad_output), dtype)


def _cuda(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.tdm_fast_cuda.scale_gradient(residual, scale, as_grad(grad_output), dtype)


def _triton(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    kernel = importlib.import_module("tdm_fast.kernels.scale_gradient").scale_gradient
    return kernel(residual, scale, as_grad(grad_output), dtype)


def as_grad(grad_output: Tensor) -> Tensor:
    """A loss's upstream gradient as the kernels read it: float32, a scalar or rows."""
    if grad_output.dtype != torch.float32:
        grad_output = grad_output.to(torch.float32)
    return grad_output if grad_output.ndim == 0 else as_rows(grad_output)


_dispatch.register("scale_gradient", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})


def _run_scale_gradient(
    residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """`residual * (scale * grad_output)` in `dtype`: residual `[B, ...]`, scale `[B]`, grad_output a scalar or either.

    Not differentiable: the losses are, once.
    """
    run = _dispatch.implementation("scale_gradient", _chosen(scale, backend))
    return run(residual, scale, grad_output, dtype)


def _chosen(scale: Tensor, backend: str) -> str:
    return "torch" if scale.dtype == torch.float64 else _dispatch.choose("scale_gradient", scale.device.type, backend)


scale_gradient = torch.library.custom_op("tdm_fast::scale_gradient", _run_scale_gradient, mutates_args=())


@scale_gradient.register_fake
def _(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return residual.new_empty(residual.shape, dtype=dtype)


def loss(op: Callable[..., LossOutputs], run: Callable[..., LossOutputs], with_gradient: bool, *inputs: Any) -> Tensor:
    """The loss of a custom op `(latents, ..., backend) -> (loss, residual, scale)` whose function is `run`.

    The op itself runs where something traces or transforms. Elsewhere its layers of Python would cost more than the
    kernels do at the latents of images, and `run` is called directly.
    """
    if not _dispatch.is_plain_eager(inputs[0]):
        value, _, _ = op(*inputs)
        return value
    if with_gradient:
        return _Loss.apply(inputs[0], None, run, inputs)
    value, _, _ = run(*inputs)
    return value


def loss_of_difference(
    op: Callable[..., LossOutputs], run: Callable[..., LossOutputs], with_gradient: bool, *inputs: Any
) -> Tensor:
    """As `loss`, of an op whose second latents get the first's gradient with the other sign."""
    if not (_dispatch.is_plain_eager(inputs[0]) and _dispatch.is_plain_eager(inputs[1])):
        value, _, _ = op(*inputs)
        return value
    if with_gradient:
        return _Loss.apply(inputs[0], inputs[1], run, inputs)
    value, _, _ = run(*inputs)
    return value


class _Loss(torch.autograd.Function):
    """`loss` outside tracing; the op's own gradient is the pair of functions below.

    The tensors that get a gradient stand alone: each further argument of a Function costs time.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor | None, run: Callable[..., LossOutputs], inputs: tuple[Any, ...]
    ) -> Tensor:
        value, residual, scale = run(*inputs)
        ctx.save_for_backward(residual, scale)
        ctx.dtypes = first.dtype, None if second is None else second.dtype
        ctx.backend = inputs[-1]
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            return _backward_once(ctx, grad_loss)
        return _both_gradients(ctx, grad_loss)


def _both_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    residual, scale = ctx.saved_tensors
    to_first, to_second, *_ = ctx.needs_input_grad
    first = second = None
    if to_second:
        second = _gradient(residual, -scale, grad_loss, ctx.dtypes[1], ctx.backend, is_last=not to_first)
    if to_first:
        first = _gradient(residual, scale, grad_loss, ctx.dtypes[0], ctx.backend, is_last=True)
    return first, second, None, None


# What makes a second differentiation an error, and is not free.
_backward_once = once_differentiable(_both_gradients)


def _gradient(
    residual: Tensor, scale: Tensor, grad_loss: Tensor, dtype: torch.dtype, backend: str, is_last: bool
) -> Tensor:
    """The gradient in a backward that nothing traces; in the residual's own memory if nobody needs that afterwards."""
    if not _dispatch.is_plain_eager(residual):
        return scale_gradient(residual, scale, grad_loss, dtype, backend)
    # The graph is kept exactly where a second backward may come (as torch's own compiled backwards ask).
    is_last = is_last and residual.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
    if is_last and _chosen(scale, backend) == "cpp":
        torch.ops.tdm_fast_cpu.scale_gradient_(residual, scale, as_grad(grad_loss))
        return residual
    return _run_scale_gradient(residual, scale, grad_loss, dtype, backend)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: LossOutputs) -> None:
    """Set up a loss op `(latents, ..., backend) -> (loss, residual, scale)`, differentiable in its first argument."""
    _, residual, scale = output
    ctx.mark_non_differentiable(residual, scale)
    # Otherwise every backward would be handed zeros of the residual's size.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, scale)
    ctx.dtype, ctx.backend, ctx.others = inputs[0].dtype, inputs[-1], len(inputs) - 1


def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The backward of such an op."""
    residual, scale = ctx.saved_tensors
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None, *[None] * ctx.others
    return scale_gradient(residual, scale, grad_loss, ctx.dtype, ctx.backend), *[None] * ctx.others
