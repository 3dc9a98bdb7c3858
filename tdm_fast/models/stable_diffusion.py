"""How the distillation calls the UNet of Stable Diffusion 1.5 or SDXL (arXiv 2112.10752, 2307.01952)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.pixart import PIXELS_PER_LATENT, constants


class StableDiffusionDenoiser(Denoiser):
    """Denoiser around diffusers' `UNet2DConditionModel`.

    Conditioning: `encoder_hidden_states` `[B, L, D]`, every token of which counts, padding included: there is no mask.
    SDXL also takes `encoder_2_hidden_states` `[B, 1, D2]`, the pooled embedding of its second text encoder, and is told
    an original and a target size, both the latents' own, and no crop. It cannot be told its number of steps (unify).
    """

    part = "unet"
    takes_mask = False

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output `[B, C, H, W]` for latents `x_t` of that shape. Raises ValueError for a UNet of another kind."""
        dtype, model = self.input_dtype(x_t), cast(Any, self.model)
        added: dict[str, Any] | None = None
        if model.config.addition_embed_type == "text_time":
            size = tuple(PIXELS_PER_LATENT * length for length in x_t.shape[-2:])
            pooled = self.pooled_states(conditioning).to(dtype)
            added = {"text_embeds": pooled, "time_ids": constants(x_t, (*size, 0, 0, *size), dtype)}
        elif model.config.addition_embed_type is not None:
            raise ValueError(
                f"the UNet's addition_embed_type is {model.config.addition_embed_type!r}; known are null (SD 1.5) and"
                " 'text_time' (SDXL)"
            )
        states = self.unmasked_states(conditioning).to(dtype)
        return model(x_t.to(dtype), timestep, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[
            0
        ]
