"""What stands between pixels and a denoiser's latents: a video autoencoder with its scale and shift."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from tdm_fast.models.autoencoder import VideoAutoencoder
from tdm_fast.models.causalvae import CausalVAEModel
from tdm_fast.models.wfvae import WFVAEModel

CAUSAL_VAE_SCALE = 0.18215


class VAEWrapper(nn.Module):
    """Scaled latents: `encode` is (sample - shift) * scale, `decode` undoes it; one number per channel of each."""

    model_class: type[VideoAutoencoder]
    scale: Tensor
    shift: Tensor

    def __init__(self, vae: VideoAutoencoder, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        self.vae = vae
        for name, values in (("scale", scale), ("shift", shift)):
            # Not persistent: they are the config's or a constant, and the VAE's own weights stay loadable as they are.
            tensor = torch.tensor(list(values), dtype=torch.float32).view(1, -1, 1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """The wrapper of the VAE in a diffusers folder; `kwargs` (`subfolder`, `torch_dtype`) go to the VAE."""
        return cls(cls.model_class.from_pretrained(path, **kwargs))  # type: ignore[call-arg]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent."""
        return (self.vae.temporal_stride, self.vae.spatial_stride, self.vae.spatial_stride)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.vae.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def encode(self, x: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True) -> Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] to scaled latents `[B, C, T', H', W']`, fewer by `strides`.

        They are drawn from the posterior with `generator`, or its mean if not `sample_posterior`.
        """
        (latent_dist,) = self.vae.encode(x, return_dict=False)
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return (z - self.shift.to(z)) * self.scale.to(z)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `[B, C, T', H', W']` to video `[B, T, 3, H, W]`: frames before channels, contiguous."""
        (video,) = self.vae.decode(z / self.scale.to(z) + self.shift.to(z), return_dict=False)
        return video.transpose(1, 2).contiguous()


class WFVAEWrapper(VAEWrapper):
    """A WF-VAE; scale and shift are those of its config.

    Raises:
        ValueError: if config.scale or config.shift does not have one number per latent channel, or a scale is 0.
    """

    model_class = WFVAEModel

    def __init__(self, vae: WFVAEModel) -> None:
        config: Any = vae.config
        for name in ("scale", "shift"):
            values = list(config[name])
            if len(values) != vae.latent_channels:
                raise ValueError(
                    f"config.{name} has {len(values)} numbers, the VAE {vae.latent_channels} latent channels"
                )
            if name == "scale" and 0 in values:
                raise ValueError(f"config.scale must not hold a 0, got {values}")
        super().__init__(vae, config.scale, config.shift)


class CausalVAEWrapper(VAEWrapper):
    """A CausalVAE; its latents are multiplied by 0.18215, whatever it was trained on."""

    model_class = CausalVAEModel

    def __init__(self, vae: CausalVAEModel) -> None:
        channels = vae.latent_channels
        super().__init__(vae, [CAUSAL_VAE_SCALE] * channels, [0.0] * channels)
