"""How a network's blocks run on one device: activation checkpointing first, then torch.compile, block by block.

Compiled are the blocks and not the network: all blocks of one kind share a program, so a network of thirty compiles as
fast as one of three, and what differs from call to call stays outside. A program is made once for each

    kind of block (dense or sparse attention, with a text mask or without)
    × role (the dtype, the adapter, whether weights train)
    × gradient mode
    × batch: of one sample, or of any larger number (torch.compile treats the size 1 as a constant)

and the length of the text is a variable like the batch. `bound` is that product; `Compilations` counts what was made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from tdm_fast.models.adapters import role_context

CheckpointingKind = Literal["none", "block", "selective"]

_aten = torch.ops.aten
KEPT = frozenset(
    getattr(_aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward",
    )
    if hasattr(_aten, name)
)  # fmt: skip
"""What `selective` checkpointing keeps: what is dear to compute and small to keep."""
KEPT_NAMESPACES = ("tdm_fast", "tdm_fast_cpu", "tdm_fast_cuda", "flash_attn", "flash_attn_3")
"""And all of these libraries' operators."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A network's repeated blocks: the modules that diffusers says must stay whole (`_no_split_modules`).

    Raises ValueError for a network that names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"{type(model).__name__} names no blocks in _no_split_modules; checkpointing and compilation work on those,"
            " so only activation_checkpointing=none and compile=off work with it"
        )
    return found


def apply_checkpointing(model: nn.Module, kind: CheckpointingKind) -> None:
    """Have the network's blocks keep less for the backward, in place; copies must have been made before.

    block: a block's inputs only; all else is computed again. selective: also what matrix products, attention and this
    project's operators gave (`KEPT`). Where gradients are off nothing changes. A network with adapters computes a
    block again with the adapter of its forward. Raises ValueError for another kind and a network without known blocks.
    """
    if kind not in ("none", "block", "selective"):
        raise ValueError(f"activation_checkpointing is {kind!r}; it must be none, block or selective")
    if kind == "none":
        return
    for block in blocks_of(model):
        vars(block)[_KIND] = kind
        block.forward = functools.partial(_in_eager_mode, model, block)


_KIND = "_activation_checkpointing"


def _in_eager_mode(model: nn.Module, block: nn.Module, *args: Any) -> Any:
    return _checkpointed(block, *args, context=functools.partial(role_context, model))


def _checkpointed(block: nn.Module, *args: Any, context: Callable[[Any], Any] | None = None) -> Any:
    """The block's own forward, as far as gradients are on with its kind of checkpointing.

    A compiled block computes again in its own program, whose adapter is fixed; in eager mode `context` sees to that.
    """
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args)
    selective = functools.partial(create_selective_checkpoint_contexts, _keep)
    contexts: Any = selective if vars(block)[_KIND] == "selective" else noop_context_fn
    # Random numbers have to be drawn again alike only where there are any.
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=contexts if context is None else context(contexts),
        preserve_rng_state=random,
    )


def _keep(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or getattr(op, "namespace", "") in KEPT_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Compilations:
    """Programs that blocks have been compiled to, of all networks given to `compile_blocks` with it."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.count = 0
        self._backend = backend
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled form of a function of a block and its inputs, the same one for all blocks."""
        if function not in self._functions:
            self._functions[function] = torch.compile(function, fullgraph=True, backend=self)
        return self._functions[function]

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        """What torch.compile calls for every program."""
        self.count += 1
        if self._backend == "inductor" and all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor)):
            _write_gelu_with_sigmoid(graph)
        return torch._dynamo.lookup_backend(self._backend)(graph, inputs, **options)


def _write_gelu_with_sigmoid(graph: torch.fx.GraphModule) -> None:
    """Give every tanh-GELU a form that inductor's C++ computes in a third of the time: exp is cheap there, tanh is not.

    The same function: (1 + tanh z) / 2 = sigmoid(2 z), with fewer roundings where it is small.
    """
    for module in graph.modules():  # what is checkpointed is a graph of its own
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if node.target is F.gelu and node.kwargs.get("approximate") == "tanh":
                    node.target = _gelu_with_sigmoid
            module.recompile()


def _gelu_with_sigmoid(x: Tensor, approximate: str) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    two_z = wide * (_GELU_LINEAR + _GELU_CUBIC * wide**2)
    return (wide * two_z.sigmoid()).to(x.dtype)


_GELU_LINEAR = 2 * (2 / torch.pi) ** 0.5
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def bound(kinds: int, roles: int, *, gradient_modes: int = 2, batches: int = 2, masks: int = 2) -> int:
    """The most programs that are compiled: each kind of block once per role, gradient mode, batch and mask kind."""
    return kinds * roles * gradient_modes * batches * masks


def compile_blocks(model: nn.Module, compilations: Compilations | None = None) -> Compilations:
    """torch.compile of the network's blocks, in place, after checkpointing. Returns what counts the programs.

    Names of parameters and the state dict stay as they were. Compiled in full: a block that torch.compile would have
    to leave in the middle is an error. Raises ValueError for a network without known blocks.
    """
    compilations = Compilations() if compilations is None else compilations
    for block in blocks_of(model):
        program = _checkpointed if _KIND in vars(block) else type(block).forward
        block.forward = functools.partial(_call_compiled, compilations.of(program), block)
    # All blocks' programs are kept under one piece of code, of which torch allows a handful by default.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_PROGRAMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * MOST_PROGRAMS)
    return compilations


MOST_PROGRAMS = bound(kinds=3, roles=3)


def _call_compiled(compiled: Callable[..., Any], block: nn.Module, *args: Any) -> Any:
    """Call a compiled block with the batch and the text's length marked as variables from the first call on.

    Left to itself torch.compile takes every size for a constant until it has seen another one, and compiles twice.
    """
    _, text, text_mask, *_ = args
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.shape[0] > 1:  # a size of 1 is a constant in any case
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    torch._dynamo.maybe_mark_dynamic(text, 1)
    if text_mask is not None:
        torch._dynamo.maybe_mark_dynamic(text_mask, 3)
    return compiled(block, *args)
