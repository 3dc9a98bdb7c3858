"""How the distillation calls an Open-Sora Plan transformer."""

from typing import Any

from torch import Tensor, nn

from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.notes import say_once

SECOND_ENCODER = "encoder_2"


class OpenSoraDenoiser(Denoiser):
    """Denoiser around :class:`tdm_fast.models.OpenSoraT2V_v1_3` (or anything with its call).

    Conditioning tensors: ``encoder_hidden_states [B, L, D]`` and, optionally, ``encoder_attention_mask [B, L]``
    (1 = keep; leave it out when every position counts: attention is faster without a mask); the same named
    ``encoder_2_…`` for a second text encoder; ``num_steps [B]`` for a network that is told K, which OpenSoraT2V_v1_3
    itself must then be. A network that takes two encoders, as `takes_two` tells, gets a list of two for states and for
    masks (None for a mask that is left out); another gets the first's alone, which is said once.
    """

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output, shaped like the latents ``x_t [B, C, T, H, W]``; ``timestep [B]`` is what the model is told."""
        states, mask = _text(conditioning, "encoder")
        text: tuple[Any, Any] = (states, mask)
        second = f"{SECOND_ENCODER}_hidden_states" in conditioning.tensors
        if takes_two(self.model):
            if not second:
                raise ValueError(
                    f"{type(self.model).__name__} takes the states of two text encoders and was given one's;"
                    " --text_encoder_name_2 names the other"
                )
            states_2, mask_2 = _text(conditioning, SECOND_ENCODER)
            text = ([states, states_2], [mask, mask_2])
        elif second:
            say_unused(type(self.model).__name__)
        added = self.added_time_embedding(conditioning)
        return self.model(
            x_t,
            timestep,
            text[0],
            attention_mask=None,
            encoder_attention_mask=text[1],
            return_dict=False,
            **({} if added is None else {"added_time_embedding": added}),
        )[0]

    def time_embedding(self) -> nn.Linear:
        """The last linear of the network's time embedding, d features."""
        model: Any = self.model
        return model.adaln_single.emb.timestep_embedder.linear_2


def takes_two(model: nn.Module) -> bool:
    """Whether a network takes two text encoders' states: its config's `caption_channels` are then two widths."""
    channels = getattr(getattr(model, "config", None), "caption_channels", None)
    return isinstance(channels, list | tuple) and len(channels) == 2


def say_unused(model: str) -> None:
    """Say, once, that a second text encoder's states go nowhere."""
    say_once(f"{model} takes one text encoder's states; the second encoder is not used")


def _text(conditioning: Conditioning, name: str) -> tuple[Tensor, Tensor | None]:
    """States `[B, 1, L, D]` and mask `[B, 1, L]` of one encoder, as Open-Sora Plan shapes them."""
    mask = conditioning.tensors.get(f"{name}_attention_mask")
    states = conditioning.tensors[f"{name}_hidden_states"].unsqueeze(1)
    return states, None if mask is None else mask.unsqueeze(1)
