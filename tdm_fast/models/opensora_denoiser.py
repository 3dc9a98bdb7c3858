"""How the distillation calls an Open-Sora Plan transformer."""

from typing import Any

from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning, Denoiser


class OpenSoraDenoiser(Denoiser):
    """Denoiser around :class:`tdm_fast.models.OpenSoraT2V_v1_3` (or anything with its call).

    Conditioning tensors: ``encoder_hidden_states [B, L, D]`` and, optionally, ``encoder_attention_mask [B, L]``
    (1 = keep; leave it out when every position counts: attention is faster without a mask); ``num_steps [B]`` for a
    network that is told K, which OpenSoraT2V_v1_3 itself must then be.
    """

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output, shaped like the latents ``x_t [B, C, T, H, W]``; ``timestep [B]`` is what the model is told."""
        mask = conditioning.tensors.get("encoder_attention_mask")
        added = self.added_time_embedding(conditioning)
        return self.model(
            x_t,
            timestep,
            conditioning.tensors["encoder_hidden_states"].unsqueeze(1),
            attention_mask=None,
            encoder_attention_mask=None if mask is None else mask.unsqueeze(1),
            return_dict=False,
            **({} if added is None else {"added_time_embedding": added}),
        )[0]

    def time_embedding(self) -> nn.Linear:
        """The last linear of the network's time embedding, d features."""
        model: Any = self.model
        return model.adaln_single.emb.timestep_embedder.linear_2
