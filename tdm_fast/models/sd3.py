"""How the distillation calls a Stable Diffusion 3 or 3.5 transformer (arXiv 2403.03206)."""

from __future__ import annotations

from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser


class SD3Denoiser(Denoiser):
    """Denoiser around diffusers' `SD3Transformer2DModel`.

    Conditioning: `encoder_hidden_states` `[B, L, D]`, every token of which counts, padding included: there is no mask;
    and `encoder_2_hidden_states` `[B, 1, D2]`, the pooled embeddings of its CLIP encoders behind one another. It cannot
    be told its number of steps (unify).
    """

    takes_mask = False

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output `[B, C, H, W]` for latents `x_t` of that shape."""
        dtype = self.input_dtype(x_t)
        return self.model(
            x_t.to(dtype),
            encoder_hidden_states=self.unmasked_states(conditioning).to(dtype),
            pooled_projections=self.pooled_states(conditioning).to(dtype),
            timestep=timestep,
            return_dict=False,
        )[0]
