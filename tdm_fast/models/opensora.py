"""Open-Sora Plan v1.3's video transformer as a diffusers model.

Constructor, state dict and call are those of the public ``OpenSoraT2V_v1_3``, so that its published weights load as
they are. What differs on purpose: masks may be None (and then cost nothing), rotary angles are exact in half precision,
every axis has its own interpolation scale, ``sparse1d=False`` works with any ``sparse_n``, the time embedding can be
added to, LoRA adapters load as they do in diffusers' own transformers, and the tokens of one video can be split over
ranks.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tdm_fast.attention import kept_first
from tdm_fast.models.context import Context, gather_tokens
from tdm_fast.models.opensora_layers import OpenSoraBlock, TokenLayout, rotary_tables

# Blocks outside this range attend densely, whatever sparse1d says.
FIRST_SPARSE_LAYER, LAST_SPARSE_LAYER = 2, 29
ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
# Token grids whose tables are kept; training on many resolutions must not fill the memory with them.
MAX_CACHED_LAYOUTS = 16

LayoutKind = tuple[int, bool]  # (number of subsequences, swapped), see TokenLayout
NATURAL_ORDER: LayoutKind = (1, False)


class PatchEmbed(nn.Module):
    """Per-frame patches: ``[B, C, T, H, W]`` to tokens ``[B, T * (H // p) * (W // p), d]``."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """Rows and columns beyond the last whole patch are dropped."""
        patches = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [B * T, d, H / p, W / p]
        return patches.flatten(2).transpose(1, 2).reshape(latents.shape[0], -1, patches.shape[1])


class OpenSoraT2V_v1_3(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text-to-video diffusion transformer of Open-Sora Plan v1.3.

    The constructor's names and defaults are the public ones. The hidden size d is
    ``num_attention_heads * attention_head_dim``. ``sample_size_*`` are only recorded; ``only_cross_attention``,
    ``double_self_attention`` and ``upcast_attention`` change nothing in the original and nothing here.

    Raises:
        ValueError: for sizes that are missing or cannot work (see the message).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("OpenSoraBlock",)

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        attention_bias: bool = True,
        sample_size_h: int | None = None,
        sample_size_w: int | None = None,
        sample_size_t: int | None = None,
        patch_size: int | None = None,
        patch_size_t: int | None = None,
        activation_fn: str = "geglu",
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int | None = None,
        interpolation_scale_h: float = 1.0,
        interpolation_scale_w: float = 1.0,
        interpolation_scale_t: float = 1.0,
        sparse1d: bool = False,
        sparse_n: int = 2,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        _check_config(self.config, dim)
        assert in_channels is not None and patch_size is not None and caption_channels is not None
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(patch_size, in_channels, dim)
        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=dim)
        self.adaln_single = AdaLayerNormSingle(dim)
        self.transformer_blocks = nn.ModuleList(
            OpenSoraBlock(
                dim,
                num_attention_heads,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        self._layout_kinds = [self._layout_kind(index) for index in range(num_layers)]
        self._layout_cache: dict[tuple[object, ...], dict[LayoutKind, TokenLayout]] = {}
        self._context: Context | None = None
        self._initialise_weights()

    @property
    def block_kinds(self) -> int:
        """How many programs the blocks are at most: one for each layout; without padding both sparse orders are one."""
        return len(set(self._layout_kinds))

    def _layout_kind(self, layer: int) -> LayoutKind:
        sparse = self.config.sparse1d and FIRST_SPARSE_LAYER <= layer <= LAST_SPARSE_LAYER
        return (self.config.sparse_n, layer % 2 == 1) if sparse and self.config.sparse_n > 1 else NATURAL_ORDER

    def set_context_group(self, group: ProcessGroup | None) -> None:
        """Split the tokens of every video over the ranks of ``group``; with None, or a group of one rank, over none.

        All ranks of the group give the same inputs and get the same, whole output. Between the patch embedding and the
        last linear each has its own tokens (the last ranks have padding where tokens do not divide), in self-attention
        its own heads; tdm_fast/models/context.py says what is exchanged. Gradients of parameters, and of inputs, are
        this rank's part: their sum over the group is the gradient, provided that every rank computes the same loss.
        Dropout is drawn by each rank for its own tokens. A copy of the model has the same group.

        Raises ValueError where the heads do not divide by the ranks, and where this process is not in the group.
        """
        context = None if group is None else Context.of(group)
        heads = self.config.num_attention_heads
        if context is not None and heads % context.size:
            sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ValueError(
                f"a context group of {context.size} ranks cannot share {heads} attention heads evenly; sizes that do: "
                f"{sizes}"
            )
        self._context = None if context is None or context.size == 1 else context

    @torch.no_grad()
    def _initialise_weights(self) -> None:
        """Weights to train from: PixArt-alpha's recipe (arXiv 2310.00426).

        Xavier for every linear (the patch projection counts as one), zero biases; the time embedding and its modulation
        normal with deviation 0.02; modulation tables normal / sqrt(d) as constructed. The last linear and the
        cross-attention's output start at zero: the first prediction is 0 and text enters as it is learnt.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        embedder = self.adaln_single.emb.timestep_embedder
        for linear in (embedder.linear_1, embedder.linear_2, self.adaln_single.linear):
            nn.init.normal_(linear.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("attn2.to_out.0.weight"):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        pooled_projections: Tensor | None = None,
        added_time_embedding: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            hidden_states: latents ``[B, C, T, H, W]``. An odd last row or column (in general: what is beyond the last
                whole patch) is dropped, as in the original.
            timestep: ``[B]``, integer or fractional.
            encoder_hidden_states: text features ``[B, 1, L, caption_channels]``.
            attention_mask: ``[B, T, H, W]``, nonzero = keep; a patch counts if any of its elements does. None: all do.
            encoder_attention_mask: ``[B, 1, L]``, nonzero = keep. None: all count.
            return_dict: return an object with ``.sample`` instead of a tuple.
            pooled_projections: the public pipeline and trainer pass it; v1.3 does not use it.
            added_time_embedding: ``[B, d]``, added to the time embedding before anything uses it. None: nothing is.

        Returns:
            ``[B, out_channels, T, H', W']``, with H' and W' the sizes in whole patches.

        Raises:
            ValueError: for a tensor whose shape does not fit, naming it.
        """
        self._check_inputs(hidden_states, timestep, encoder_hidden_states, attention_mask, encoder_attention_mask)
        dtype = self.pos_embed.proj.weight.dtype
        patch = self.config.patch_size
        size = (hidden_states.shape[2], hidden_states.shape[3] // patch, hidden_states.shape[4] // patch)

        x = self.pos_embed(hidden_states.to(dtype))
        text, text_lengths = encoder_hidden_states.squeeze(1), None
        if encoder_attention_mask is not None:  # attention does not see the order of its keys
            first, text_lengths = kept_first(encoder_attention_mask.squeeze(1).bool())
            text = text.take_along_dim(first.unsqueeze(-1), dim=1)
        text = self.caption_projection(text.to(dtype))
        embedded_timestep = self.adaln_single.emb(
            timestep, resolution=None, aspect_ratio=None, batch_size=x.shape[0], hidden_dtype=dtype
        )
        if added_time_embedding is not None:
            embedded_timestep = embedded_timestep + added_time_embedding.to(embedded_timestep.dtype)
        modulation = self.adaln_single.linear(self.adaln_single.silu(embedded_timestep)).unflatten(1, (6, -1))

        layouts = self._layouts(size, x.device)
        if attention_mask is not None:
            keep = _pool_mask(attention_mask, size, patch)
            layouts = {kind: layout.with_mask(keep) for kind, layout in layouts.items()}
        tokens, rows, context = x.shape[1], x.shape[1], self._context
        if context is not None:
            rows = context.rows(tokens, max(subsequences for subsequences, _ in layouts) ** 2)
            layouts = {kind: layout.shared(context, rows) for kind, layout in layouts.items()}
            own = x[:, context.own(tokens, rows)].clone(memory_format=torch.contiguous_format)  # the rest is not kept
            x = layouts[NATURAL_ORDER].arrange(own)

        order = NATURAL_ORDER
        x = x.contiguous()  # as between blocks, so that the first one is no other program to torch.compile
        for block, kind in zip(self.transformer_blocks, self._layout_kinds, strict=True):
            if kind != order:
                x, order = layouts[kind].arrange(layouts[order].restore(x)), kind
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, text, text_lengths, modulation, layouts[kind])
            else:
                x = block(x, text, text_lengths, modulation, layouts[kind])
        x = layouts[order].restore(x)

        table = self.scale_shift_table.to(x.dtype) + embedded_timestep.unsqueeze(1)
        shift, scale = table.chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        if context is not None:
            x = gather_tokens(x, context, tokens, rows)
        sample = self._unpatchify(x, size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        """``[B, T * h * w, p * p * C]`` to ``[B, C, T, h * p, w * p]``."""
        patch = self.config.patch_size
        x = x.view(x.shape[0], *size, patch, patch, self.out_channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _layouts(self, size: tuple[int, int, int], device: torch.device) -> dict[LayoutKind, TokenLayout]:
        """The unmasked layouts of this model's layers for a token grid, made once per grid and device."""
        key = (size, device)
        if key in self._layout_cache:
            return self._layout_cache[key]
        config = self.config
        scales = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
        # Tensors made in inference mode could never be used in training again.
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = rotary_tables(size, config.attention_head_dim, scales, device)
            layouts = {kind: TokenLayout.build(cos, sin, *kind) for kind in set(self._layout_kinds)}
        if type(cos) is Tensor:  # a fake tensor of torch.compile or of a dry run must not stay behind
            while len(self._layout_cache) >= MAX_CACHED_LAYOUTS:
                self._layout_cache.pop(next(iter(self._layout_cache)))
            self._layout_cache[key] = layouts
        return layouts

    def _check_inputs(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_attention_mask: Tensor | None,
    ) -> None:
        config = self.config
        shape = tuple(hidden_states.shape)
        if (
            len(shape) != 5
            or shape[1] != config.in_channels
            or min(shape[:3]) < 1
            or min(shape[3:]) < config.patch_size
        ):
            raise ValueError(
                f"hidden_states has shape {shape}; expected [B, {config.in_channels}, T, H, W] with H and W at least "
                f"the patch size {config.patch_size}"
            )
        batch = shape[0]
        if tuple(timestep.shape) != (batch,):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; expected [{batch}], one per sample")
        text = tuple(encoder_hidden_states.shape)
        if len(text) != 4 or text[:2] != (batch, 1) or text[2] < 1 or text[3] != config.caption_channels:
            raise ValueError(
                f"encoder_hidden_states has shape {text}; expected [{batch}, 1, L, {config.caption_channels}] "
                f"(the model's caption_channels is {config.caption_channels})"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, *shape[2:]):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected {[batch, *shape[2:]]} or None"
            )
        if encoder_attention_mask is not None and tuple(encoder_attention_mask.shape) != (batch, 1, text[2]):
            raise ValueError(
                f"encoder_attention_mask has shape {tuple(encoder_attention_mask.shape)}; "
                f"expected {[batch, 1, text[2]]} or None"
            )


def _pool_mask(mask: Tensor, size: tuple[int, int, int], patch: int) -> Tensor:
    """Which tokens count: ``[B, T, H, W]`` to bool ``[B, T * h * w]``, True where any element of the patch does."""
    _, height, width = size
    keep = mask[..., : height * patch, : width * patch].bool()
    keep = keep.unflatten(3, (width, patch)).unflatten(2, (height, patch))
    return keep.any(dim=5).any(dim=3).flatten(1)


def _check_config(config: Any, dim: int) -> None:
    """Refuse a configuration that cannot work."""
    for name in ("in_channels", "patch_size", "caption_channels"):
        if config[name] is None:
            raise ValueError(f"{name} is None; it must be given")
    if config.attention_head_dim % 6:
        raise ValueError(
            f"attention_head_dim is {config.attention_head_dim}; it must be a multiple of 6 "
            "(rotary pairs on three axes), for example 24 or 96"
        )
    if config.patch_size_t not in (None, 1):
        raise ValueError(f"patch_size_t is {config.patch_size_t}; only 1 works (patches are made per frame)")
    if config.cross_attention_dim not in (None, dim):
        raise ValueError(
            f"cross_attention_dim is {config.cross_attention_dim}; captions are projected to the hidden size, so it "
            f"must be {dim} (num_attention_heads * attention_head_dim) or None"
        )
    for name in ("num_layers", "sparse_n"):
        if config[name] < 1:
            raise ValueError(f"{name} is {config[name]}; it must be at least 1")
    for name in ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w"):
        if not config[name] > 0:
            raise ValueError(f"{name} is {config[name]}; positions are divided by it, it must be above 0")
    if config.activation_fn not in ACTIVATIONS:
        raise ValueError(f"activation_fn is {config.activation_fn!r}; it must be one of {', '.join(ACTIVATIONS)}")
