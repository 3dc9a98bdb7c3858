"""How the distillation calls an Open-Sora Plan transformer."""

from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser


class OpenSoraDenoiser(Denoiser):
    """Denoiser around :class:`tdm_fast.models.OpenSoraT2V_v1_3` (or anything with its call).

    Conditioning tensors: ``encoder_hidden_states [B, L, D]`` and, optionally, ``encoder_attention_mask [B, L]`` (1 = keep;
    leave it out when every position counts, attention is faster without a mask).
    """

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output of the model, with the shape of the latents ``x_t [B, C, T, H, W]``.

        ``t`` (int64 ``[B]``) is an index into the schedule's tables; the model is told ``schedule.timesteps[t]``.
        """
        tensors = conditioning.tensors
        mask = tensors.get("encoder_attention_mask")
        return self.model(
            x_t,
            self.schedule.timesteps.to(t.device)[t],
            tensors["encoder_hidden_states"].unsqueeze(1),
            attention_mask=None,
            encoder_attention_mask=None if mask is None else mask.unsqueeze(1),
            return_dict=False,
        )[0]
