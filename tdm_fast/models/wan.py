"""How the distillation calls a Wan 2.x text-to-video transformer (arXiv 2503.20314)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser

TEXT_TOKENS = 512
"""The text's length in every call: shorter ones are followed by zeros, which the network has learnt to see."""


class WanDenoiser(Denoiser):
    """Denoiser around diffusers' `WanTransformer3DModel`, of the kind that takes one timestep per sample.

    Conditioning: `encoder_hidden_states` `[B, L, D]` of at most TEXT_TOKENS tokens, filled up with zeros; what an
    `encoder_attention_mask` `[B, L]` (1 = keep) hides becomes zeros as well. It cannot be told its number of steps
    (unify).
    """

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output, shaped like the latents `x_t` `[B, C, T, H, W]`. Raises ValueError for a text that is longer."""
        dtype = self.input_dtype(x_t)
        states, mask = (conditioning.tensors.get(f"encoder_{name}") for name in ("hidden_states", "attention_mask"))
        assert states is not None
        if states.shape[1] > TEXT_TOKENS:
            raise ValueError(f"encoder_hidden_states have {states.shape[1]} tokens; Wan takes at most {TEXT_TOKENS}")
        if mask is not None:
            states = states.where(mask[:, :, None].bool(), 0)
        return self.model(
            hidden_states=x_t.to(dtype),
            timestep=timestep,
            encoder_hidden_states=F.pad(states.to(dtype), (0, 0, 0, TEXT_TOKENS - states.shape[1])),
            return_dict=False,
        )[0]
