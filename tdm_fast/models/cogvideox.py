"""How the distillation calls a CogVideoX transformer (arXiv 2408.06072)."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser


class CogVideoXDenoiser(Denoiser):
    """Denoiser around diffusers' `CogVideoXTransformer3DModel`, whose own latents are `[B, T, C, H, W]`.

    Conditioning: `encoder_hidden_states` `[B, L, D]`, every token of which counts, padding included: there is no mask.
    Networks with positions in a table (2B) have them for text of `max_text_seq_length` tokens and no other; those with
    rotary positions (5B, 1.5) are trained with as many. It cannot be told its number of steps (unify).
    """

    takes_mask = False

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output, shaped like the latents `x_t` `[B, C, T, H, W]`. Raises ValueError for text of another length."""
        dtype, config = self.input_dtype(x_t), cast(Any, self.model).config
        states = self.unmasked_states(conditioning)
        tabled = not config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings
        if tabled and states.shape[1] != config.max_text_seq_length:
            raise ValueError(
                f"encoder_hidden_states have {states.shape[1]} tokens; this network's table of positions is for"
                f" {config.max_text_seq_length}, to which its tokenizer pads"
            )
        rotary = None
        if config.use_rotary_positional_embeddings:
            frames, height, width = x_t.shape[2:]
            rotary = rotary_tables(config, frames, height, width, x_t.device)
        output = self.model(
            x_t.to(dtype).transpose(1, 2),
            encoder_hidden_states=states.to(dtype),
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return output.transpose(1, 2)


def rotary_tables(
    config: Any, frames: int, height: int, width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, head size]`, float32, for latents of this size, as CogVideoX's pipeline makes them.

    CogVideoX 1.0 fits the grid of tokens into that of its training size; 1.5, whose patches span frames, numbers them.
    """
    patch, patch_t = config.patch_size, config.patch_size_t
    grid, base = (height // patch, width // patch), (config.sample_height // patch, config.sample_width // patch)
    options: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": device}
    if patch_t is None:
        return get_3d_rotary_pos_embed(crops_coords=_fitted(grid, base), temporal_size=frames, **options)
    frames = -(-frames // patch_t)
    return get_3d_rotary_pos_embed(crops_coords=None, temporal_size=frames, grid_type="slice", max_size=base, **options)


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last corner of the largest region of `base` with `grid`'s aspect ratio, in its middle."""
    ratio = grid[0] / grid[1]
    height, width = base
    if ratio > height / width:
        width = round(height / grid[0] * grid[1])
    else:
        height = round(width / grid[1] * grid[0])
    top, left = round((base[0] - height) / 2), round((base[1] - width) / 2)
    return (top, left), (top + height, left + width)
