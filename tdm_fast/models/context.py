"""Context parallelism: the tokens of a video over the ranks of a process group (Ulysses, arXiv 2309.14509).

Every rank has its own tokens everywhere but in self-attention. There it exchanges them for its own heads, all tokens of
these, and back. Both exchanges are an all-to-all of equal parts: one for query, key and value together, one for what
attention returns. Text is on every rank, so cross-attention exchanges nothing.

Bytes that a rank sends, and receives, with R ranks, n tokens on each (padding included), a batch of B and width d:

- a block's forward: ``4 · B · n · d · (R - 1) / R · bytes per element``, three quarters of it for q, k and v;
- its backward: as much. Checkpointing by block adds its forward once more. Selective checkpointing adds nothing,
  because it keeps what the ops here return, as it does with all of ``tdm_fast::``;
- once in a forward of the model, for its output: ``(R - 1) · B · n · (features of a token's patch) · bytes per
  element``; in its backward nothing.

The ops are opaque to torch.compile and cause no graph break. They run on any backend that has an all-to-all and an
all-gather (NCCL, gloo), and every rank of the group must call the model alike: same shapes, same gradient mode.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """A process group by its name, and this process in it; unlike a group it can be copied, hashed and compiled in."""

    group: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Context":
        """Raises ValueError where this process is not in the group."""
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not in the context group; give each process the group that it is in")
        return cls(group.group_name, rank, dist.get_world_size(group))

    def rows(self, tokens: int, unit: int) -> int:
        """How many tokens each rank has, padding included: the fewest in which ``tokens`` fit, a multiple of unit."""
        return unit * -(-tokens // (unit * self.size))

    def own(self, tokens: int, rows: int) -> slice:
        """Which of the ``tokens`` are this rank's: at most ``rows``, on the last ranks fewer or none."""
        return slice(min(self.rank * rows, tokens), min((self.rank + 1) * rows, tokens))


def tokens_to_heads(query: Tensor, key: Tensor, value: Tensor, context: Context, subsequences: int) -> Tensor:
    """Own tokens of all heads to all tokens of own heads.

    Three times ``[B, n, heads, head_dim]`` to one ``[B, R * n / s, 3, s * heads / R, head_dim]``, where s tokens that
    follow one another, one of each of the ``subsequences``, count as s times as many heads. n divides by s, heads by R.
    """
    parts = (
        x.unflatten(2, (context.size, -1)).unflatten(1, (-1, subsequences)).permute(3, 0, 1, 2, 4, 5)
        for x in (query, key, value)
    )
    # In this order what arrives is, for a batch of one, in place already, whatever s is.
    received = _all_to_all(torch.stack(list(parts), dim=3), context.group)  # [R, B, n / s, 3, s, heads / R, head_dim]
    return received.flatten(4, 5).transpose(0, 1).flatten(1, 2)


def heads_to_tokens(x: Tensor, context: Context, subsequences: int) -> Tensor:
    """The way back: ``[B, R * n / s, s * heads / R, head_dim]`` to ``[B, n, heads, head_dim]``."""
    received = _all_to_all(x.unflatten(1, (context.size, -1)).transpose(0, 1), context.group)
    received = received.unflatten(3, (subsequences, -1)).permute(1, 2, 3, 0, 4, 5)  # [B, n / s, s, R, heads / R, ...]
    return received.flatten(3, 4).flatten(1, 2)


def gather_tokens(x: Tensor, context: Context, tokens: int, rows: int) -> Tensor:
    """Own tokens ``[B, up to rows, c]`` to all of them ``[B, tokens, c]``, on every rank.

    Backward takes the own part and communicates nothing: what follows is taken to be the same on every rank. Gradients
    of what came before are then parts, whose sum over the group is the gradient.
    """
    x = F.pad(x, (0, 0, 0, rows - x.shape[1]))
    gathered = _all_gather(x, context.rank, context.size, context.group)
    return gathered.transpose(0, 1).flatten(1, 2)[:, :tokens]


@torch.library.custom_op("tdm_fast::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, group: str) -> Tensor:
    """Part r of ``x [R, ...]`` goes to rank r of the group; part r of the result came from rank r."""
    ones = [1] * x.shape[0]
    received = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), ones, ones, group)
    return torch.ops._c10d_functional.wait_tensor(received)


@_all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[-1]


def _all_to_all_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _all_to_all(gradient, ctx.group), None


_all_to_all.register_autograd(_all_to_all_backward, setup_context=_keep_group)


@torch.library.custom_op("tdm_fast::all_gather", mutates_args=())
def _all_gather(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    """``x`` of every rank: ``[R, *x.shape]``. This process is ``rank`` of ``size``."""
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(gathered).unflatten(0, (size, -1))


@_all_gather.register_fake
def _(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    return x.new_empty(size, *x.shape)


def _keep_rank(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rank = inputs[1]


def _all_gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return gradient[ctx.rank], None, None, None


_all_gather.register_autograd(_all_gather_backward, setup_context=_keep_rank)
