"""How the blocks of a transformer run: with activation checkpointing, then compiled, one block at a time.

Both change what a block's `forward` does and nothing else: modules, parameters, their names and state dicts stay. The
order is checkpointing, then compile: a compiled block then decides within its own graphs what backward recomputes.
Sharding over ranks comes after both.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from tdm_fast.models.adapters import role_context
from tdm_fast.models.blocks import blocks_of, named_blocks
from tdm_fast.models.denoiser import Conditioning, Roles

CheckpointingKind = Literal["none", "block", "selective"]

KEPT_OPS = (
    *("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "convolution"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention_quantized", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable"),
    *("_scaled_dot_product_attention_math_for_mps", "_flash_attention_forward", "_efficient_attention_forward"),
    *("_cudnn_attention_forward", "_flash_attention_forward_no_dropout_inplace"),
)
"""Ops of aten whose outputs selective checkpointing keeps: matmuls, and what torch's attention calls underneath."""
KEPT_LIBRARIES = ("tdm_fast", "torch_attn", "flash_attn", "flash_attn_3", "xformers", "xformers_flash")
"""Libraries whose ops' outputs it keeps: this project's, torch's varlen attention, flash attention's own packages."""
TEXT_LENGTH = {"text": 1, "encoder_hidden_states": 1, "encoder_attention_mask": -1}
"""Arguments of a block that carry the text, and the dimension that is its length."""


# ---- activation checkpointing


def apply_checkpointing(model: nn.Module, kind: CheckpointingKind) -> None:
    """Make the blocks of `model` keep less for backward, in place; may be called again with another kind.

    none: everything is kept. block: a block's inputs are kept, backward runs it once more. selective: the outputs of
    KEPT_OPS and KEPT_LIBRARIES are kept too, and only what is cheap to compute is computed again: an adapter's product
    that widens its rank to the layer's width is. Where gradients are
    off nothing is different, and the random state is saved and restored only for blocks that have dropout. A network
    with adapters runs a block again with the adapter of its forward. diffusers' own checkpointing is turned off.

    Raises ValueError for an unknown kind, a network without known blocks (unless none is asked for), and for blocks
    that are compiled already or whose forward was replaced.
    """
    if kind not in get_args(CheckpointingKind):
        raise ValueError(f"activation_checkpointing is {kind!r}; it must be none, block or selective")
    if getattr(model, "is_gradient_checkpointing", False):
        model.disable_gradient_checkpointing()  # type: ignore[operator]
    blocks = [] if kind == "none" and not _has_blocks(model) else blocks_of(model)
    plain = [_plain_forward(block) for block in blocks]
    make = functools.cache(_checkpointed)  # blocks of a class share one function, and so its compiled code
    for block, forward in zip(blocks, plain, strict=True):
        if kind == "none":
            vars(block).pop("forward", None)
        else:
            _set_forward(block, make(model, forward, kind == "selective", _has_dropout(block)))


def _plain_forward(block: nn.Module) -> Callable[..., Any]:
    """The function behind `block.forward` as its class defines it."""
    if "forward" not in vars(block):
        return type(block).forward
    function = getattr(block.forward, "__func__", None)
    if getattr(function, "compiled", False):
        raise ValueError("the blocks are compiled already; the order is checkpointing, then compile_blocks")
    if not hasattr(function, "plain"):
        raise ValueError(
            f"{type(block).__name__}.forward was replaced by something else (accelerate's hooks do that); checkpointing"
            " and compile need the class's own"
        )
    return function.plain  # type: ignore[union-attr]


def _set_forward(block: nn.Module, function: Callable[..., Any]) -> None:
    # As a bound method, so that copy.deepcopy binds it to the copy.
    block.forward = types.MethodType(function, block)  # type: ignore[method-assign]


def _has_blocks(model: nn.Module) -> bool:
    try:
        return bool(blocks_of(model))
    except ValueError:
        return False


def _has_dropout(block: nn.Module) -> bool:
    rates = (getattr(module, name, 0) for module in block.modules() for name in ("p", "dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _checkpointed(model: nn.Module, plain: Callable[..., Any], selective: bool, dropout: bool) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(self, *args, **kwargs)
        context_fn = role_context(model, _selective_contexts if selective else noop_context_fn)
        options: dict[str, Any] = {"preserve_rng_state": dropout, "context_fn": context_fn}
        return checkpoint(plain, self, *args, use_reentrant=False, **options, **kwargs)

    forward.plain = plain  # type: ignore[attr-defined]
    forward.to_compile = _checkpointed_when_compiled(plain, selective)  # type: ignore[attr-defined]
    return forward


@functools.cache  # so that networks share it, and its compiled code
def _checkpointed_when_compiled(plain: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    """A compiled block's role is fixed, torch sees to its random state, and takes no contexts but selective ones."""
    options: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(self, *args, **kwargs)
        return checkpoint(plain, self, *args, use_reentrant=False, **options, **kwargs)

    forward.plain = plain  # type: ignore[attr-defined]
    return forward


@functools.cache
def _kept_ops() -> frozenset[Any]:
    aten = {getattr(torch.ops.aten, name) for name in KEPT_OPS if hasattr(torch.ops.aten, name)}
    return frozenset(aten | {torch.ops.higher_order.flex_attention})


def _policy(_context: object, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "overloadpacket", op) in _kept_ops() or op.namespace in KEPT_LIBRARIES
    kept = kept and not (op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and _is_cheap(*args[-2:]))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_cheap(left: Tensor, right: Tensor) -> bool:
    """Whether a product, `[M, K]` by `[K, N]`, is large for its work, as the second of an adapter's two is."""
    return 8 * left.shape[1] <= right.shape[1]


_selective_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)


# ---- torch.compile


class ShapeKind(NamedTuple):
    """Calls of a block whose shapes one graph serves: batches from two on, and text from two tokens on, are symbols.

    A batch of one, a text of one token, and having a mask or not are other graphs; so is every size of video, because
    graphs with a known number of tokens are faster.
    """

    single: bool = False
    """A batch of one sample."""
    masked: bool = False
    """The text has a mask."""
    one_token: bool = False
    """The text is one token long."""


SHAPE_KINDS = tuple(ShapeKind(single, masked) for single in (False, True) for masked in (False, True))
"""What training meets: sub-batches of any size, texts of equal and of different lengths."""


def shape_kinds(roles: Roles) -> tuple[ShapeKind, ...]:
    """The SHAPE_KINDS that these networks can be called with: some take no mask."""
    return tuple(kind for kind in SHAPE_KINDS if roles.teacher.takes_mask or not kind.masked)


@dataclass(frozen=True)
class CompileBound:
    """How often torch.compile may compile: once for each block kind, role, gradient mode and kind of shape."""

    blocks: Mapping[str, int]
    """Block kinds of each role and gradient mode, such as `{"student with gradient": 3}`."""
    shapes: int = len(SHAPE_KINDS)
    video_sizes: int = 1

    @property
    def total(self) -> int:
        """The greatest number of compilations."""
        return sum(self.blocks.values()) * self.shapes * self.video_sizes

    def __str__(self) -> str:
        blocks = ", ".join(f"{role} {count}" for role, count in self.blocks.items())
        sizes = f"{self.video_sizes} video size{'s' * (self.video_sizes != 1)}"
        return f"at most {self.total} compilations: block kinds ({blocks}) x {self.shapes} kinds of shape x {sizes}"


def compile_bound(roles: Roles, *, shapes: Sequence[ShapeKind] | None = None, video_sizes: int = 1) -> CompileBound:
    """The bound for three roles, whose networks may be one and the same, and `shape_kinds(roles)` or other `shapes`.

    A network's block kinds are its `block_kinds` if it says so (blocks of one class whose arguments differ in kind), or
    else blocks differ in kind by class, parameters, and the level of a UNet that they are in. With gradient there is
    one more of each class where what comes before the blocks is frozen: only the first one's input then carries none.
    """
    blocks = {}
    for role, denoiser in zip(Roles._fields, roles, strict=True):
        network = denoiser.model
        inside = blocks_of(network)
        kinds = int(getattr(network, "block_kinds", 0)) or len(set(map(_kind, named_blocks(network))))
        of_blocks = {id(parameter) for block in inside for parameter in block.parameters()}
        frozen = any(not p.requires_grad for p in network.parameters() if id(p) not in of_blocks)
        blocks[f"{role} without gradient"] = kinds
        if role != "teacher":
            blocks[f"{role} with gradient"] = kinds + frozen * len({type(block) for block in inside})
    return CompileBound(blocks, len(shape_kinds(roles) if shapes is None else shapes), video_sizes)


def _kind(named: tuple[str, nn.Module]) -> tuple[Any, ...]:
    """What decides a block's graph, as far as the block itself can tell: levels of a UNet differ in their sizes."""
    name, block = named
    parameters = tuple((path, parameter.shape) for path, parameter in block.named_parameters())
    return type(block), parameters, tuple(name.split(".")[:-2][:2])


class Compilations:
    """A backend of torch.compile that counts the graphs it is given, each compiled with its backward.

    `options` are the backend's. One for all networks of a run, so that blocks can share code. Raises AssertionError,
    which torch reports, when there are more than the bound.
    """

    def __init__(
        self, bound: CompileBound, backend: str = "inductor", options: Mapping[str, Any] | None = None
    ) -> None:
        self.bound, self.backend, self.options = bound, backend, dict(options or {})
        self.count = 0
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.at_warm_up: int | None = None
        """How many there had been when `warm_up` was done."""

    @property
    def after_warm_up(self) -> int:
        """Compilations since `warm_up`, which should have met everything: 0, or something is worth looking into."""
        return 0 if self.at_warm_up is None else self.count - self.at_warm_up

    def __str__(self) -> str:
        return f"{self.count} compilations; {self.bound}"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile `graph`; called by torch."""
        self.count += 1
        assert self.count <= self.bound.total, f"torch.compile was to make {self.bound}, and is asked for one more"
        if self.backend == "inductor":
            if all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor)):
                _write_gelu_with_sigmoid(graph)
            return torch._inductor.compile(graph, inputs, options=self.options)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs, **self.options)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled form of a block's forward, the same one for all blocks that have it."""
        if function not in self._functions:
            # One more than the bound, which is to be what stops a run: torch's own message names no bound. What another
            # torch.compile of the same function made is not to count here.
            most = self.bound.total + 1
            options: dict[str, Any] = {"recompile_limit": most, "isolate_recompiles": True}
            known = inspect.signature(torch.compile).parameters
            config: Any = torch._dynamo.config
            config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
            if "recompile_limit" not in known:
                config.recompile_limit = max(config.recompile_limit, most)
            options = {name: value for name, value in options.items() if name in known}
            # dynamic=False: nothing varies but what is marked.
            run = torch.compile(function, fullgraph=True, dynamic=False, backend=self, **options)
            self._functions[function] = _with_marks(function, run)
        return self._functions[function]


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


def compile_blocks(model: nn.Module, compilations: Compilations) -> None:
    """Have torch compile the blocks of `model`, in place, when they are first called; a graph break is an error.

    Blocks of one class share their code, whichever layer or network they belong to, as far as torch's guards allow. A
    batch of more than one and a text of more than one token are marked as varying before each call; all other sizes are
    constants of a graph (ShapeKind). torch's limit on recompilations, 8 by default, beyond which it gives up, is the
    bound for these blocks: `recompile_limit` of torch.compile, or, in a torch that lacks it, the whole process's. Its
    second limit, 256 for a whole process, is raised if the bound is above. After `warm_up`,
    torch.compiler.set_stance("fail_on_recompile") makes an error of a compilation that should not be.

    Raises ValueError for a network without known blocks, and for blocks that are compiled already or were replaced.
    """
    blocks = blocks_of(model)
    for block in blocks:
        _plain_forward(block)
    for block in blocks:
        checkpointed = getattr(vars(block).get("forward"), "to_compile", None)
        _set_forward(block, compilations.compiled(checkpointed or type(block).forward))


def _with_marks(function: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(getattr(function, "plain", function)).parameters)[1:]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        args, kwargs = tuple(map(_in_order, args)), {name: _in_order(value) for name, value in kwargs.items()}
        _mark_what_varies({**dict(zip(names, args, strict=False)), **kwargs})
        return run(self, *args, **kwargs)

    forward.compiled = True  # type: ignore[attr-defined]
    return forward


def _in_order(value: Any) -> Any:
    """A tensor with its elements in memory as its dimensions have them: other strides would be another graph.

    In some networks what the first block gets is a view, and what the others get is not. What is expanded stays so.
    """
    if not isinstance(value, Tensor) or 0 in value.stride():
        return value
    return value.contiguous().view(value.shape)


def _mark_what_varies(arguments: Mapping[str, Any]) -> None:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.ndim}
    batch = len(next(iter(tensors.values()), ()))
    for name, tensor in tensors.items():
        if len(tensor) == batch > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
        dim = TEXT_LENGTH.get(name)
        if dim is not None and tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim % tensor.ndim)


def warm_up(
    compilations: Compilations,
    roles: Roles,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    shapes: Iterable[ShapeKind] | None = None,
    batch: int = 2,
) -> None:
    """Call every role in every gradient mode and kind of shape, so that all compilation happens now.

    `latents` `[1 or more, C, ...]` and `conditioning` (of as many samples) are examples of one video size; call again
    for each other size. `shapes` are `shape_kinds(roles)` if not given. `batch` stands for all batches above one; one
    above the number of threads lets inductor's C++ share work evenly for every batch. No gradient is left behind, and
    no random number is drawn.
    """
    for kind in shape_kinds(roles) if shapes is None else shapes:
        size = 1 if kind.single else batch
        x = latents[:1].detach().expand(size, *latents.shape[1:]).contiguous()
        t = torch.zeros(size, dtype=torch.int64, device=x.device)
        given = _shaped(conditioning[:1].expand(size), kind)
        for denoiser in roles:
            with torch.no_grad():
                denoiser(x, t, given)
            if denoiser is not roles.teacher:
                with torch.enable_grad():
                    output = denoiser(x, t, given).sum()
                torch.autograd.grad(output, _trained(denoiser), allow_unused=True)
    compilations.at_warm_up = compilations.count


def _trained(denoiser: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def _shaped(conditioning: Conditioning, kind: ShapeKind) -> Conditioning:
    """The same tensors with masks and text length as `kind` says."""
    tensors = {}
    for name, tensor in conditioning.tensors.items():
        if name.endswith("_attention_mask"):
            continue
        if name.endswith("_hidden_states"):
            length = 1 if kind.one_token else max(2, tensor.shape[1])
            rows = torch.arange(length, device=tensor.device) % tensor.shape[1]
            tensor = tensor[:, rows]
            if kind.masked:
                mask = name.removesuffix("_hidden_states") + "_attention_mask"
                tensors[mask] = torch.ones(tensor.shape[:2], dtype=torch.int64, device=tensor.device)
        tensors[name] = tensor
    return Conditioning(tensors)
