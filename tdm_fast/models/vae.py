"""What stands between pixels and a denoiser's latents: a WF-VAE with its per-channel scale and shift."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tdm_fast.models.wfvae import SPATIAL_STRIDE, WFVAEModel


class WFVAEWrapper(nn.Module):
    """Scaled latents: `encode` is (sample - shift) * scale, `decode` undoes it; scale and shift from the VAE's config.

    Raises:
        ValueError: if config.scale or config.shift does not have one number per latent channel, or a scale is 0.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, vae: WFVAEModel) -> None:
        super().__init__()
        self.vae = vae
        channels = vae.config.latent_dim
        for name in ("scale", "shift"):
            values = list(vae.config[name])
            if len(values) != channels:
                raise ValueError(f"config.{name} has {len(values)} numbers, the VAE {channels} latent channels")
            if name == "scale" and 0 in values:
                raise ValueError(f"config.scale must not hold a 0, got {values}")
            # Not persistent: the config holds them, and the VAE's own weights stay loadable as they are.
            tensor = torch.tensor(values, dtype=torch.float32).view(1, channels, 1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> WFVAEWrapper:
        """The wrapper of the VAE in a diffusers folder; `kwargs` (`subfolder`, `torch_dtype`) go to the VAE."""
        return cls(WFVAEModel.from_pretrained(path, **kwargs))

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent."""
        return (self.vae.temporal_stride, SPATIAL_STRIDE, SPATIAL_STRIDE)

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def encode(self, x: Tensor, generator: torch.Generator | None = None, sample_posterior: bool = True) -> Tensor:
        """Video `[B, 3, T, H, W]` in [-1, 1] to scaled latents `[B, C, T', H / 8, W / 8]`.

        They are drawn from the posterior with `generator`, or its mean if not `sample_posterior`.
        """
        (latent_dist,) = self.vae.encode(x, return_dict=False)
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return (z - self.shift.to(z)) * self.scale.to(z)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `[B, C, T', H', W']` to video `[B, T, 3, H, W]`: frames before channels, contiguous."""
        (video,) = self.vae.decode(z / self.scale.to(z) + self.shift.to(z), return_dict=False)
        return video.transpose(1, 2).contiguous()
