"""Which kernel an attention runs: one function for all of them, the choice for a run, and how networks are told.

Names, as `--attention` takes them:

- ``sdpa``: PyTorch's own. Without a mask its scaled_dot_product_attention, which picks flash, cuDNN, efficient or math;
  where keys have lengths, on a GPU, its variable-length attention (`torch.nn.attention.varlen`);
- ``flash4``: FlashAttention 4 in the place of PyTorch's flash kernel, by `torch.nn.attention`'s activation, which holds
  for the whole process; lengths by variable-length attention as above;
- ``flash``: the package flash-attn; ``xformers``: its memory_efficient_attention;
- ``math``: the definition, which the others are tested against;
- ``auto``: the fastest of flash4 and sdpa that can run.

No mask is ever larger than ``[B, heads, 1, keys]``, but what ``math`` computes is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdm_fast.notes import say_once

Name = Literal["auto", "sdpa", "flash", "flash4", "xformers", "math"]
Backend = Literal["sdpa", "varlen", "flash", "flash4", "xformers", "math"]
"""What runs. ``varlen`` is PyTorch's own where it has variable-length attention, ``sdpa`` where it builds masks."""

HALF = (torch.bfloat16, torch.float16)
TAKE_LENGTHS = ("varlen", "flash4", "flash")
PYTORCHS = ("sdpa", "varlen")


def keep_something(keep: Tensor) -> Tensor:
    """Where a row of ``keep [..., keys]`` keeps nothing, keep everything: a softmax over no key is not a number."""
    return keep | ~keep.any(dim=-1, keepdim=True)


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The order int64 ``[..., keys]`` that brings what ``keep`` (bool) keeps to the front, and how many these are.

    The lengths are int32 ``[...]`` and at least 1: where nothing is kept everything is. The host waits for nothing.
    """
    keep = keep_something(keep)
    return keep.int().argsort(dim=-1, descending=True, stable=True), keep.sum(-1, dtype=torch.int32)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | tuple[int, ...] | None = None,
    mask: Tensor | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """softmax(q kᵀ / √head_dim) v over the keys that count, for each head.

    Args:
        query, key, value: ``[B, N, heads, head_dim]`` and twice ``[B, K, heads, head_dim]``, of one dtype.
        lengths: only the first keys count: int32 ``[B]``, so many of each sample's; or numbers that the host knows, one
            for each of as many equal groups of heads (0: all K, for a softmax over no key is not a number).
        mask: bool ``[B or 1, G, 1, K]``, True where a key counts for one of G equal groups of heads. At least one key
            of each row does. Not beside ``lengths``.
        backend: a `Backend`.

    Returns:
        ``[B, N, heads, head_dim]``.
    """
    if isinstance(lengths, tuple):
        return _in_groups(query, key, value, lengths, backend)
    if backend in TAKE_LENGTHS and mask is not None:
        return _by_mask(query, key, value, mask, backend)
    if backend in TAKE_LENGTHS and lengths is not None:
        return _packed(query, key, value, lengths, backend)
    if lengths is not None:
        mask = (torch.arange(key.shape[1], device=key.device) < lengths[:, None])[:, None, None]
    if mask is not None and mask.shape[1] not in (1, key.shape[2]):
        mask = mask.repeat_interleave(key.shape[2] // mask.shape[1], dim=1)
    return DENSE[backend](query, key, value, mask)


# ---- kernels of equal lengths: query, key, value as `attend` takes them, mask bool [B or 1, 1 or heads, 1, K] or None


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def _flash4(query: Tensor, key: Tensor, value: Tensor, mask: None) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # of PyTorch's kernels the one that FlashAttention 4 replaces
        return _sdpa(query, key, value, mask)


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    bias = None
    if mask is not None:
        keys = key.shape[1]
        # Its rows have to begin at multiples of 16 bytes.
        bias = query.new_zeros(*mask.shape[:3], -(-keys // 8) * 8)[..., :keys].masked_fill_(~mask, -torch.inf)
        bias = bias.expand(query.shape[0], query.shape[2], query.shape[1], keys)
    return _xformers_op(query, key, value, bias)[0]


DENSE: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa, "varlen": _sdpa, "flash": _flash, "flash4": _flash4, "xformers": _xformers, "math": _math,
}  # fmt: skip

LSE_ROWS = 128
"""xformers' log-sums have as many rows as there are queries, or up to the next multiple of a tile."""


@torch.library.custom_op("tdm_fast::xformers_attention", mutates_args=())
def _xformers_op(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the log-sums with rows up to a multiple of LSE_ROWS, and how many of these count, on the CPU.

    An op of this project, because xformers chooses among its kernels in code that torch.compile does not follow.
    """
    ops = importlib.import_module("xformers.ops")
    out, lse = ops.memory_efficient_attention_forward_requires_grad(query, key, value, bias)
    return out.contiguous(), F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS)), torch.tensor([lse.shape[-1]])


@_xformers_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = -(-query.shape[1] // LSE_ROWS) * LSE_ROWS
    lse = query.new_empty(query.shape[0], query.shape[2], rows, dtype=torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, lse, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("tdm_fast::xformers_attention_backward", mutates_args=())
def _xformers_backward_op(
    gradient: Tensor, out: Tensor, lse: Tensor, rows: Tensor, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ops = importlib.import_module("xformers.ops")
    lse = lse[..., : int(rows)].contiguous()
    found = ops.memory_efficient_attention_backward(gradient.contiguous(), out, lse, query, key, value, bias)
    return tuple(each.contiguous() for each in found)  # type: ignore[return-value]


@_xformers_backward_op.register_fake
def _(
    gradient: Tensor, out: Tensor, lse: Tensor, rows: Tensor, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(  # type: ignore[return-value]
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)
    )


def _save_for_xformers(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)


def _xformers_gradients(ctx: Any, gradient: Tensor, _lse: Any, _rows: Any) -> tuple[Tensor | None, ...]:
    return *_xformers_backward_op(gradient, *ctx.saved_tensors), None


_xformers_op.register_autograd(_xformers_gradients, setup_context=_save_for_xformers)


# ---- lengths


def _in_groups(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], backend: str) -> Tensor:
    """Of heads that follow one another with the same length one call, which has no mask."""
    per_group, keys = query.shape[2] // len(lengths), key.shape[1]
    parts: list[list[int]] = []  # length, heads
    for length in lengths:
        if parts and parts[-1][0] == length:
            parts[-1][1] += per_group
        else:
            parts.append([length, per_group])
    heads = [count for _, count in parts]
    outs = [
        DENSE[backend](q, k[:, : length or keys], v[:, : length or keys], None)
        for (length, _), q, k, v in zip(parts, *(x.split(heads, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outs, dim=2)


def _by_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, backend: str) -> Tensor:
    """Keys sorted, those that count first; attention does not see their order."""
    groups, batch = mask.shape[1], query.shape[0]
    order, lengths = kept_first(mask[:, :, 0].expand(batch, -1, -1).flatten(0, 1))  # [B · G, K], [B · G]
    query, key, value = (x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    key, value = (x.take_along_dim(order[:, :, None, None], dim=1) for x in (key, value))
    out = _packed(query, key, value, lengths, backend)
    return out.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)


def _packed(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, backend: str) -> Tensor:
    """By a kernel of variable length: keys that count one after another, without the host knowing how many they are."""
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    ends = lengths.cumsum(0)
    row = torch.arange(batch * keys, device=key.device)
    sample = torch.searchsorted(ends, row, right=True).clamp(max=batch - 1)
    source = (row + sample * keys - (ends - lengths)[sample]).clamp(max=batch * keys - 1)
    # Rows behind the last are read by no kernel, but what kernels leave in their gradients may be anything.
    counts = (row < ends[-1])[:, None, None]
    key, value = (torch.where(counts, x.flatten(0, 1).index_select(0, source), 0) for x in (key, value))
    ends_q = queries * torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    ends_k = F.pad(ends, (1, 0)).int()
    kernel = _flash_varlen if backend == "flash" else _torch_varlen
    return kernel(query.flatten(0, 1), key, value, ends_q, ends_k, queries, keys).unflatten(0, (batch, queries))


def _torch_varlen(*arguments: Any) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*arguments)  # type: ignore[return-value]


def _flash_varlen(*arguments: Any) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*arguments)


# ---- the choice


class Needs(NamedTuple):
    """What a backend needs of machine and network."""

    package: str | None = None
    version: str = "0"
    majors: tuple[int, ...] = ()
    """GPUs, by the first number of their compute capability."""
    dtypes: tuple[torch.dtype, ...] = HALF
    multiple: int = 8
    """Head sizes are multiples of it, up to `largest`."""
    largest: int = 256


NEEDS = {
    "varlen": Needs(majors=tuple(range(8, 13))),
    "flash": Needs("flash-attn", "2.7", tuple(range(8, 13)), multiple=1),  # older ones cannot be compiled
    "flash4": Needs("flash-attn-4", "0", (9, 10), largest=128),
    "xformers": Needs("xformers", "0.0.29", (7, 8, 9), (*HALF, torch.float32)),  # its kernel with masks
}


PACKAGES = {"flash": "flash_attn", "xformers": "xformers.ops"}
"""The modules that the packages' kernels are in."""


class Choice(NamedTuple):
    """What attention runs, and why."""

    backend: str
    says: str


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lacks(backend: str, device: torch.device, dtype: torch.dtype, head_sizes: tuple[int, ...] = ()) -> list[str]:
    """What a backend needs and does not have, in words; nothing if it can run."""
    if backend not in NEEDS:
        return []
    needs, missing = NEEDS[backend], []
    if device.type != "cuda":
        missing.append(f"a CUDA device (the run is on {device.type})")
    elif (major := torch.cuda.get_device_capability(device)[0]) not in needs.majors:
        missing.append(f"compute capability {needs.majors[0]} to {needs.majors[-1]} (the device's is {major})")
    if needs.package is not None:
        version = installed(needs.package)
        if version is None or Version(version) < Version(needs.version):
            least = "" if needs.version == "0" else f" {needs.version} or newer"
            missing.append(f"the package {needs.package}{least} ({version or 'not installed'})")
    if backend == "flash4" and "FA4" not in getattr(torch.nn.attention, "list_flash_attention_impls", list)():
        missing.append(f"a PyTorch that can activate it (this is {torch.__version__})")
    if dtype not in needs.dtypes:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in needs.dtypes)
        missing.append(f"{wanted} (the networks compute in {str(dtype).removeprefix('torch.')})")
    if wrong := [size for size in head_sizes if size % needs.multiple or size > needs.largest]:
        multiples = f"multiples of {needs.multiple} " if needs.multiple > 1 else ""
        missing.append(f"head sizes that are {multiples}up to {needs.largest} (here {', '.join(map(str, wrong))})")
    return missing


def choose(name: str, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Choice:
    """What attention `--attention name` is for a network that computes in `dtype` on `device`.

    Under ``auto`` what is installed but cannot run is passed over, which is said once. Raises ValueError for a name
    that cannot run, with what it lacks and what would do.
    """
    sizes = head_sizes(model)
    says = f"head size {', '.join(map(str, sizes))}, {str(dtype).removeprefix('torch.')} on {device.type}"
    pytorchs = "sdpa" if lacks("varlen", device, dtype, sizes) else "varlen"
    if name == "auto" and device.type == "cuda" and installed("flash-attn-4"):
        missing = lacks("flash4", device, dtype, sizes) or _activation_fails()
        if not missing:
            return Choice("flash4", f"flash4, the fastest here: {says}")
        say_once(f"--attention auto: flash4 needs {', '.join(missing)}; PyTorch's own runs")
    if name in ("auto", "sdpa"):
        only = "; the others need CUDA" if device.type == "cpu" else ""
        masks = "with masks of keys" if pytorchs == "sdpa" else "lengths by its variable-length attention"
        return Choice(pytorchs, f"sdpa, PyTorch's own, {masks}: {says}{only}")
    missing = lacks(name, device, dtype, sizes)
    if not missing and name == "flash4":
        missing = _activation_fails()
    elif not missing and name in PACKAGES:
        missing = _import_fails(PACKAGES[name])
    if not missing and (strange := _not_patchable(model)):
        missing = [f"an attention of PyTorch's to take the place of ({strange} has none)"]
    if missing:
        others = [other for other in ("flash", "flash4", "xformers") if not lacks(other, device, dtype, sizes)]
        fitting = ", ".join(other for other in ("auto", "sdpa", *others, "math") if other != name)
        raise ValueError(f"--attention {name}: it needs {'; '.join(missing)}; what would do: {fitting}")
    return Choice(name, f"{name}, as asked for: {says}")


def _import_fails(module: str) -> list[str]:
    """What lacks for a package that is installed, but may be built for another PyTorch."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return [f"a package {module.split('.')[0]} that imports ({error})"]
    return []


def _activation_fails() -> list[str]:
    """Put FlashAttention 4 in the place of PyTorch's flash kernel, for the whole process; what it lacks for that."""
    try:
        if torch.nn.attention.current_flash_attention_impl() != "FA4":
            torch.nn.attention.activate_flash_attention_impl("FA4")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return [f"a package flash-attn-4 that imports ({error})"]
    return []


def head_sizes(model: nn.Module) -> tuple[int, ...]:
    """The sizes of a network's attention heads, ascending."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "to_q") and hasattr(module, "heads")]
    return tuple(sorted({layer.to_q.out_features // layer.heads for layer in layers}))


# ---- networks


DIFFUSERS = {"math": "_native_math", "flash": "flash", "flash4": "_native_flash", "xformers": "xformers"}
"""Its names; of PyTorch's own it needs to be told nothing."""


def set_attention(model: nn.Module, backend: str) -> None:
    """Have a network's attention run `backend`, in place; a copy of the network keeps it.

    Layers of this project have an ``attention_backend``. diffusers' networks have processors: those that dispatch are
    told by diffusers' own `set_attention_backend`; those that call PyTorch's scaled_dot_product_attention, and those of
    the package opensora, call `attend` instead, their code staying as it is. Under PyTorch's own, diffusers' are left
    alone. The package's are not even then, because they always have masks, which the variable-length kernels take as
    lengths.
    """
    dispatching = []
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(module, "attention_backend"):
            module.attention_backend = backend  # type: ignore[assignment]
        elif hasattr(processor, "_attention_backend"):
            dispatching.append(processor)
        elif processor is not None:
            plain = _plain_class(processor)
            alone = backend == "sdpa" or (backend in PYTORCHS and plain.__module__.startswith("diffusers."))
            if alone or _patchable(plain):
                processor.__class__ = plain if alone else _attending(plain, backend)
    _tell_diffusers(model, dispatching, backend)


def _tell_diffusers(model: Any, processors: list[Any], backend: str) -> None:
    told = [processor for processor in processors if processor._attention_backend is not None]
    if not processors or (backend in PYTORCHS and not told):
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that this is experimental
    try:
        with attention_backend(AttentionBackendName.NATIVE):  # it sets what all other networks run, too; this undoes it
            model.set_attention_backend(DIFFUSERS.get(backend, "native"))
    finally:
        logger.setLevel(level)
    for processor in processors:
        plain = _plain_class(processor)
        processor.__class__ = _dispatching(plain) if backend in ("flash", "xformers") else plain


def _plain_class(processor: object) -> Any:
    return getattr(processor, "plain_class", type(processor))


def _patchable(processor: type) -> bool:
    names = getattr(getattr(processor.__call__, "__code__", None), "co_names", ())
    return "F" in names and "scaled_dot_product_attention" in names


def _not_patchable(model: nn.Module) -> str | None:
    """The class of a processor that neither dispatches nor calls PyTorch's attention."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        plain = _plain_class(processor)
        if processor is not None and not hasattr(processor, "_attention_backend") and not _patchable(plain):
            return plain.__name__
    return None


@functools.cache
def _attending(processor: type, backend: str) -> type:
    """A processor's class whose call has `attend` where its code says F.scaled_dot_product_attention."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        per_query = attn_mask is not None and (attn_mask.ndim < 4 or attn_mask.shape[2] > 1)
        if (dropout_p or is_causal or per_query) and backend in PYTORCHS:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
        if dropout_p or is_causal or per_query:
            raise ValueError(
                f"--attention {backend}: {processor.__name__} has dropout, is causal or has a mask for each query; sdpa"
                " would do"
            )
        # Under autocast norms leave queries and keys in float32, which PyTorch's own would cast.
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        if attn_mask is not None:
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0  # biases are 0 or about -10000
            attn_mask = keep_something(keep[:, :1])  # such a mask is of keys, the same for all heads
        return attend(query, key, value, mask=attn_mask, backend=backend).transpose(1, 2)

    functional = types.SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": scaled_dot_product_attention})
    return _rebound(processor, F=functional)


@functools.cache
def _dispatching(processor: type) -> type:
    """A processor's class that dispatches queries and keys in the values' dtype, as autocast does for PyTorch's own."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return dispatch_attention_fn(query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    return _rebound(processor, dispatch_attention_fn=dispatch)


def _rebound(processor: type, **names: Any) -> type:
    """A subclass whose call is the class's own code with other values of some global names.

    Not a TorchFunctionMode around the call: torch.compile allows none inside activation checkpointing.
    """
    call: Any = processor.__call__
    scope = {**call.__globals__, **names}
    del scope["__name__"]  # torch.compile would look names up in the module of that name
    function = types.FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    return type(processor.__name__, (processor,), {"__call__": function, "plain_class": processor})
