"""Layers of the Open-Sora Plan v1.3 transformer: rotary positions, skiparse attention, the transformer block.

Tokens are batch first, ``[B, N, d]``, in (frame, row, column) order.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from tdm_fast.attention import attend, keep_something
from tdm_fast.models.context import Context, heads_to_tokens, tokens_to_heads

ROPE_BASE = 10_000.0


def rotary_tables(
    size: tuple[int, int, int], head_dim: int, interpolation_scale: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the three-axis rotary embedding, each float32 ``[T * H * W, 1, head_dim]``.

    ``size`` is the token grid (T, H, W). A head's features fall into three equal parts, one per axis; within a part of
    width D, feature i of the first half is turned with feature i of the second half by
    ``position / interpolation_scale * 10000 ** (-2 i / D)``. The sine of the first half is negated, so that
    :func:`apply_rotary` is two products. The angles are computed in float64: in the fp32 or bf16 of the activations the
    phase of far positions would be visibly off.
    """
    part = head_dim // 3
    frequencies = ROPE_BASE ** (-torch.arange(0, part, 2, dtype=torch.float64) / part)
    axes = []
    for axis, (length, scale) in enumerate(zip(size, interpolation_scale, strict=True)):
        angles = torch.outer(torch.arange(length, dtype=torch.float64) / scale, frequencies)
        shape = [1, 1, 1, part // 2]
        shape[axis] = length
        axes.append(angles.view(shape).expand(*size, part // 2))
    angles = torch.stack(axes, dim=3).flatten(0, 2)  # [N, 3, part / 2]
    cos, sin = angles.cos(), angles.sin()
    cos = torch.stack((cos, cos), dim=2).flatten(1)
    sin = torch.stack((-sin, sin), dim=2).flatten(1)
    return cos.float().to(device).unsqueeze(1), sin.float().to(device).unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x [B, N, heads, head_dim]`` by the tables of :func:`rotary_tables`: in fp32, returned in x's dtype."""
    pairs = (3, 2, x.shape[-1] // 6)
    first, second = x.unflatten(-1, pairs).unbind(-2)
    if torch.compiler.is_compiling():
        # Half by half nothing is copied and no index is a quotient: a third of the time of the products below.
        cos, sin = (table.unflatten(-1, pairs).select(-2, 1) for table in (cos, sin))
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
        return turned.flatten(-3).to(x.dtype)
    partner = torch.stack((second, first), dim=-2).flatten(-3)  # on a CPU twice as fast as flip
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How one kind of layer arranges its tokens for self-attention, with the tables that follow that arrangement.

    Skiparse splits N tokens into n = ``subsequences`` interleaved subsequences that attend within themselves. After
    padding to a multiple of n², token j belongs to subsequence ``j mod n``, or, if ``swapped``, to ``(j // n) mod n``.
    With j = (a·n + b)·n + c these are c and b: exchanging b and c turns the second rule into the first. The first needs
    no reordering at all, because a tensor ``[B, N, heads, head_dim]`` read as ``[B, N / n, n · heads, head_dim]`` is
    attention with n · heads heads over N / n tokens. n = 1 is dense attention.

    Everything else in a block treats its tokens one by one, so whole blocks run in their layout's order: tokens move
    between blocks whose layouts differ, and without padding blocks of both sparse orders are one program.

    cos, sin: ``[N', 1, head_dim]`` in the arranged order, N' tokens with padding.
    lengths: of each subsequence how many keys count, the first ones, the rest being padding; None without padding.
    mask: bool ``[B, n, 1, N' / n]``, True where a key counts, instead of lengths for a video that has a mask.

    With a ``context`` (:meth:`shared`) tokens are those of this rank, with ``padding`` of its own, and so are the rows
    of cos and sin. Self-attention has the ``attended`` tokens of all ranks, which lengths and mask are for, and
    heads / R heads.
    """

    cos: Tensor
    sin: Tensor
    lengths: tuple[int, ...] | None = None
    mask: Tensor | None = None
    subsequences: int = 1
    swapped: bool = False
    padding: int = 0
    context: Context | None = None
    attended: int | None = None

    @classmethod
    def build(cls, cos: Tensor, sin: Tensor, subsequences: int, swapped: bool) -> "TokenLayout":
        """Layout for all tokens of the tables ``cos``, ``sin`` ``[N, 1, head_dim]`` in natural order, none masked."""
        tokens = cos.shape[0]
        padding = -tokens % subsequences**2
        layout = cls(cos, sin, None, None, subsequences, swapped, padding)
        # Not transpose: an axis of length 1 would keep a stride that differs from layout to layout.
        cos, sin = (layout.arrange(table.squeeze(1).unsqueeze(0)).squeeze(0).unsqueeze(1) for table in (cos, sin))
        lengths = None
        if padding:
            square, rest = subsequences**2, tokens % subsequences**2
            lengths = tuple(
                tokens // square * subsequences + min(max(rest - i * subsequences, 0), subsequences)
                if swapped
                else len(range(i, tokens, subsequences))
                for i in range(subsequences)
            )
        return dataclasses.replace(layout, cos=cos, sin=sin, lengths=lengths)

    def with_mask(self, keep: Tensor) -> "TokenLayout":
        """The same layout with only the keys where ``keep`` (bool ``[B, N]``) is True; padding never counts."""
        keep = self.arrange(keep.unsqueeze(-1)).squeeze(-1)
        keep = keep.unflatten(1, (-1, self.subsequences)).transpose(1, 2)  # [B, n, N' / n]
        return dataclasses.replace(self, lengths=None, mask=keep_something(keep).unsqueeze(2))

    def shared(self, context: Context, rows: int) -> "TokenLayout":
        """This layout of all tokens for the ``rows`` of this rank, a multiple of n².

        Exchanging b and c moves no token to another rank, so arranging needs no communication. What the ranks have
        beyond N' tokens takes no part in attention.
        """
        attended = self.cos.shape[0]
        start = context.rank * rows
        cos, sin = (
            F.pad(table, (0, 0, 0, 0, 0, context.size * rows - attended))[start : start + rows]
            for table in (self.cos, self.sin)
        )
        own = context.own(attended - self.padding, rows)
        padding = rows - (own.stop - own.start)
        return dataclasses.replace(self, cos=cos, sin=sin, padding=padding, context=context, attended=attended)

    def arrange(self, x: Tensor) -> Tensor:
        """Bring ``x [B, N, c]`` into this layout: ``[B, N', c]``."""
        if self.padding:
            x = F.pad(x, (0, 0, 0, self.padding))
        return self._exchange(x)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`arrange`."""
        x = self._exchange(x)
        return x[:, : x.shape[1] - self.padding].contiguous() if self.padding else x

    def _exchange(self, x: Tensor) -> Tensor:
        if not self.swapped:
            return x
        n = self.subsequences
        return x.unflatten(1, (-1, n, n)).transpose(2, 3).flatten(1, 3)


class Attention(nn.Module):
    """Projections of a multi-head attention, named as in diffusers, and the attention that is to run between them."""

    def __init__(self, dim: int, heads: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.attention_backend = "sdpa"  # see tdm_fast.attention.set_attention

    def _project_out(self, x: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](x))


class SelfAttention(Attention):
    """Dense or skiparse self-attention with rotary positions."""

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """``x [B, N', d]`` in the order of ``layout``, which says which tokens see each other, to ``[B, N', d]``."""
        per_head = (self.heads, x.shape[-1] // self.heads)
        query = apply_rotary(self.to_q(x).unflatten(-1, per_head), layout.cos, layout.sin)
        key = apply_rotary(self.to_k(x).unflatten(-1, per_head), layout.cos, layout.sin)
        value = self.to_v(x).unflatten(-1, per_head)
        if layout.context is not None:
            return self._project_out(self._attend_over_ranks(query, key, value, layout).reshape(x.shape))
        if layout.subsequences > 1:
            folded = (x.shape[0], -1, layout.subsequences * self.heads, per_head[1])
            query, key, value = query.view(folded), key.view(folded), value.view(folded)
        return self._project_out(self._attend(query, key, value, layout).reshape(x.shape))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        return attend(query, key, value, lengths=layout.lengths, mask=layout.mask, backend=self.attention_backend)

    def _attend_over_ranks(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        """``query, key, value [B, n, heads, head_dim]`` of this rank's tokens to the like of them."""
        assert layout.context is not None and layout.attended is not None
        together = tokens_to_heads(query, key, value, layout.context, layout.subsequences)
        padding = together.shape[1] - layout.attended // layout.subsequences
        if padding:
            together = together[:, :-padding]
        query, key, value = together.unbind(2)
        out = self._attend(query, key, value, layout)
        if padding:
            out = F.pad(out, (0, 0, 0, 0, 0, padding))
        return heads_to_tokens(out, layout.context, layout.subsequences)


class CrossAttention(Attention):
    """Attention of all video tokens to the text; in sparse layers too, where the original only repeats K and V."""

    def forward(self, x: Tensor, text: Tensor, lengths: Tensor | None) -> Tensor:
        """``x [B, N, d]``, ``text [B, L, d]``, of which ``lengths [B]`` tokens count (None: all), to ``[B, N, d]``."""
        per_head = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            project(source).unflatten(-1, per_head)
            for project, source in ((self.to_q, x), (self.to_k, text), (self.to_v, text))
        )
        out = attend(query, key, value, lengths=lengths, backend=self.attention_backend)
        return self._project_out(out.flatten(2))


class OpenSoraBlock(nn.Module):
    """Modulated self-attention, plain cross-attention (no norm, no gate), modulated feed-forward."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn1 = SelfAttention(dim, heads, attention_bias, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn2 = CrossAttention(dim, heads, attention_bias, dropout)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, text: Tensor, text_lengths: Tensor | None, modulation: Tensor, layout: TokenLayout
    ) -> Tensor:
        """``x [B, N', d]``, ``text [B, L, d]``, ``text_lengths`` int32 ``[B]`` or None, ``modulation [B, 6, d]``.

        x comes and returns in the order of ``layout``.
        A modulation's six parts are shift, scale, gate of the self-attention, then of the feed-forward.
        """
        # In x's dtype, because under autocast an fp32 table would make x fp32, which it is not where weights are bf16.
        table = (self.scale_shift_table.to(x.dtype) + modulation).unsqueeze(2)  # [B, 6, 1, d]
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.unbind(1)
        modulated = torch.addcmul(shift_attn, self.norm1(x), 1 + scale_attn)
        x = torch.addcmul(x, gate_attn, self.attn1(modulated, layout))
        x = x + self.attn2(x, text, text_lengths)
        modulated = torch.addcmul(shift_ff, self.norm2(x), 1 + scale_ff)
        return torch.addcmul(x, gate_ff, self.ff(modulated))
