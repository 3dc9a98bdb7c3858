"""What video autoencoders share: their call, its checks, and the distribution of latents."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class VideoGaussian(DiagonalGaussianDistribution):
    """Diagonal Gaussian of latents `[B, C, T, H, W]`; logvar is clamped to [-30, 20]."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence from `other`, or from the unit Gaussian, in nats, `[B]`: summed over all of a video."""
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square()
            terms = (distance + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)


class VideoAutoencoder(ModelMixin, ConfigMixin):
    """A causal autoencoder of videos: T = stride * k + 1 frames become k + 1 latent frames, and the reverse.

    A family sets the attributes below in its constructor and overrides `encode_moments` and `decode_latents`.
    """

    temporal_stride: int
    """Frames per latent frame, but for the first, which is one of each."""
    spatial_stride: int
    """Pixels per latent, along height and width."""
    latent_channels: int
    use_tiling: bool
    """Whether videos are encoded and decoded in pieces."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As every diffusers model's, and from a folder with config.json and one .ckpt of the public trainer.

        Its averaged weights are taken if it has any. Pickled code is never run. Raises ValueError for several .ckpt
        files, and for one that is damaged or of another network.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        checkpoints = sorted(folder.glob("*.ckpt"))
        if not checkpoints or any(folder.glob("*.safetensors")):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if len(checkpoints) > 1:
            names = ", ".join(path.name for path in checkpoints)
            raise ValueError(f"{folder} has {len(checkpoints)} checkpoints, {names}; leave the one to load")
        model = cls.from_config(cls.load_config(folder))
        missing, unexpected = model.load_state_dict(read_checkpoint(checkpoints[0]), strict=False)
        if missing or unexpected:
            raise ValueError(
                f"{checkpoints[0]} is not of the {cls.__name__} that config.json describes: {len(missing)} weights are"
                f" missing and {len(unexpected)} too many, {(missing + unexpected)[0]} first"
            )
        model = model.to(kwargs.get("torch_dtype")).eval()
        info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
        return (model, info) if kwargs.get("output_loading_info") else model

    def encode_moments(self, x: Tensor) -> Tensor:
        """`[B, 3, T, H, W]` to means and log-variances, `[B, 2 * latent_channels, T', H', W']`."""
        raise NotImplementedError

    def decode_latents(self, z: Tensor) -> Tensor:
        """`[B, latent_channels, T', H', W']` to `[B, 3, T, H, W]`."""
        raise NotImplementedError

    @property
    def tiling_is_exact(self) -> bool:
        """Whether results in pieces are those of the whole video, but for rounding."""
        return False

    def disable_tiling(self) -> None:
        """Encodes and decodes whole videos at once again."""
        self.use_tiling = False

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[VideoGaussian]:
        """`[B, 3, T, H, W]` in [-1, 1] to `.latent_dist` (with `.sample(generator)`, `.mode()`, `.kl()`).

        Raises:
            ValueError: if x is no RGB video of floating-point numbers, T is not 1 more than a multiple of the temporal
                stride, or H or W is not a multiple of the spatial one.
        """
        self._check_video(x)
        latent_dist = VideoGaussian(self.encode_moments(x))
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents `[B, C, T', H', W']` to `.sample`, `[B, 3, temporal stride * (T' - 1) + 1, spatial stride * H', …]`.

        Raises:
            ValueError: if z has another number of dimensions or channels, or an empty one.
        """
        if z.ndim != 5 or z.shape[1] != self.latent_channels or 0 in z.shape[2:]:
            raise ValueError(
                f"z must be [B, {self.latent_channels}, T, H, W] with no empty dimension, got {list(z.shape)}"
            )
        video = self.decode_latents(z)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, VideoGaussian]:
        """Reconstruction of `x` from a sample of its latents, or from their mean, and the latents' distribution."""
        (latent_dist,) = self.encode(x, return_dict=False)
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(z, return_dict=False)[0], latent_dist

    def _check_video(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"x must be [B, 3, T, H, W], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must hold floating-point numbers in [-1, 1], got {x.dtype}")
        frames, sizes = x.shape[2], {"height": x.shape[3], "width": x.shape[4]}
        stride, unit = self.temporal_stride, self.spatial_stride
        if frames < 1 or (frames - 1) % stride:
            below = (frames - 1) // stride * stride + 1
            fitting = f"{below} or {below + stride}" if frames > 0 else "1"
            raise ValueError(f"x has {frames} frames; the VAE takes {stride}k + 1 of them: {fitting} would do")
        for name, size in sizes.items():
            if size % unit or not size:
                below = size // unit * unit
                fitting = f"{below} or {below + unit}" if below else f"{unit}"
                raise ValueError(f"x has {name} {size}, not a multiple of {unit}: {fitting} would do")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """An autoencoder's weights in a .ckpt of the public trainers: averaged ones where there are any, no loss's weights.

    Raises ValueError for a file that is damaged, or that could only be read by running code in it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values ({str(error).splitlines()[0]}); weights"
            " saved as *.safetensors would do"
        ) from error
    weights: Any = content
    if isinstance(content, Mapping) and "state_dict" in content:
        weights = content["state_dict"]
        weights = weights.get("gen_model", weights)
        # Averages are kept of what is trained, so not of a wavelet's filters.
        weights = {**_plain_names(weights), **_plain_names(content.get("ema_state_dict") or {})}
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: it takes a state dict, alone or as state_dict and ema_state_dict")
    return {name: tensor for name, tensor in _plain_names(weights).items() if not name.startswith("loss.")}


def _plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names without what distributed data parallel puts in front."""
    return {name.removeprefix("module."): value for name, value in weights.items()}
