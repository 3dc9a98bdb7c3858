"""How the distillation calls a PixArt-α or PixArt-Σ transformer (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser

PIXELS_PER_LATENT = 8
"""Pixels along an edge that one latent stands for, in the VAEs of PixArt and SDXL."""


class PixArtDenoiser(Denoiser):
    """Denoiser around diffusers' `PixArtTransformer2DModel`, which also predicts a variance (2C channels).

    Conditioning: `encoder_hidden_states` `[B, L, D]` and, optionally, `encoder_attention_mask` `[B, L]` (1 = keep).
    A network with `use_additional_conditions` (α at 1024 pixels) is told height, width and their ratio, which are those
    of the latents. It cannot be told its number of steps (unify).
    """

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output `[B, 2C, H, W]` for latents `x_t` `[B, C, H, W]`."""
        dtype, model = self.input_dtype(x_t), cast(Any, self.model)
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            height, width = (PIXELS_PER_LATENT * size for size in x_t.shape[-2:])
            sizes = {
                "resolution": constants(x_t, (height, width), dtype),
                "aspect_ratio": constants(x_t, (height / width,), dtype),
            }
        return model(
            x_t.to(dtype),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=conditioning.tensors.get("encoder_attention_mask"),
            timestep=timestep,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]


def constants(x_t: Tensor, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """`[B, len(values)]`, the same for every sample; written on the device, so that nothing waits for a copy."""
    return torch.stack([x_t.new_full((len(x_t),), value, dtype=dtype) for value in values], dim=1)
