"""The families of teachers: Open-Sora Plan, and diffusers' pipelines for PixArt, Stable Diffusion, SD3, CogVideoX, Wan.

A family knows what a pipeline's folder of its kind holds: which part is the network and how that is called, in what
sizes it comes, what its text encoders make of prompts, and what its VAE makes of latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tdm_fast.files import read_json
from tdm_fast.models.cogvideox import CogVideoXDenoiser
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.pixart import PixArtDenoiser
from tdm_fast.models.sd3 import SD3Denoiser
from tdm_fast.models.sizes import AXES, STILL, Unit, units
from tdm_fast.models.stable_diffusion import StableDiffusionDenoiser
from tdm_fast.models.vae import VAEWrapper
from tdm_fast.models.wan import WanDenoiser

INDEX_FILE = "model_index.json"


class Family:
    """What differs between teachers; `tdm_fast.models.families.OPENSORA` and `STOCK` are all of them."""

    pipeline: str
    """The class of its pipeline, as `model_index.json` names it."""
    network: Any
    """The class of the network."""
    former_names: tuple[str, ...] = ()
    """What published folders call that class besides."""
    denoiser: type[Denoiser]

    @property
    def part(self) -> str:
        """The folder of the network in a pipeline's."""
        return self.denoiser.part

    def axes(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[Unit, Unit, Unit]:
        """How frames, height and width come for a network of this config and a VAE of these strides."""
        return units(strides, config["patch_size"])

    def own_size(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(T, H, W)` of the latents that a network of this config was trained on, with a VAE of these strides."""
        raise NotImplementedError

    def check_size(
        self, config: Mapping[str, Any], size: Sequence[int], strides: tuple[int, int, int], what: str
    ) -> None:
        """Raise ValueError, which says `what`, for latents of a size `(T, H, W)` that the network cannot place."""

    def latent_shape(self, config: Mapping[str, Any], size: Sequence[int]) -> tuple[int, ...]:
        """`(C, T, H, W)`, or for images `(C, H, W)`, of latents of a size `(T, H, W)`."""
        return (config["in_channels"], *size)

    def time_and_space(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """`(T, H, W)` of latents `(C, T, H, W)` or `(C, H, W)`; T = 1 of an image's."""
        frames, height, width = [1, *shape[1:]][-3:]
        return frames, height, width


class OpenSora(Family):
    """Open-Sora Plan v1.3, this project's own networks."""

    pipeline = "OpenSoraPipeline"
    network = OpenSoraT2V_v1_3
    denoiser = OpenSoraDenoiser

    def own_size(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[int, int, int]:
        frames, height, width = (config[f"sample_size_{axis}"] for axis in AXES)
        return frames, height, width


class StockFamily(Family):
    """A family that diffusers has pipelines for.

    Methods are given such a pipeline, loaded as far as text is concerned, and the network's config.
    """

    vae: Any = diffusers.AutoencoderKL
    """The class of its VAE."""
    encoders: tuple[str, ...] = ("text_encoder",)
    """The parts that are text encoders."""
    optional: tuple[str, ...] = ()
    """Those of them that a pipeline may lack."""
    unpadded = False
    """Whether states are kept without padding, because the network is given a mask, or zeros, for it."""

    def refuse(self, index: Mapping[str, Any], folder: Path) -> None:
        """Raise ValueError for a pipeline of this class that works in another way than the others."""

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The widths of text that a network of this config takes: of tokens, and of a pooled embedding, if any."""
        raise NotImplementedError

    def encoded_widths(self, encoders: Sequence[Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        """The widths that encoders of these configs, None for one that is not there, give the network."""
        return (hidden_size(encoders[0]),)

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        """The most states of a prompt that the network is given."""
        raise NotImplementedError

    def limit(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        """The most tokens of a prompt that `tokenizer` makes."""
        return self.tokens(pipeline, config)

    def tokenizer(self, pipeline: Any) -> Any:
        """The one that decides what of a prompt is cut off."""
        return pipeline.tokenizer

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        """The states `[L, D]` of prompts, and `[1, D2]` of their pooled embedding if the network takes one."""
        raise NotImplementedError

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
        """What the stock pipeline's call takes for encoded prompts and negative prompts."""
        given: dict[str, Any] = {"prompt_embeds": conditioning.tensors["encoder_hidden_states"]}
        if negative is not None:
            given["negative_prompt_embeds"] = negative.tensors["encoder_hidden_states"]
        for prefix, part in (("", conditioning), ("negative_", negative)):
            if part is not None and "encoder_2_hidden_states" in part.tensors:
                given[f"{prefix}pooled_prompt_embeds"] = part.tensors["encoder_2_hidden_states"][:, 0]
        return given

    def wrap(self, vae: Any) -> VAEWrapper:
        """The VAE with what lies between its latents and the network's."""
        return StockVAE(vae)

    def pixels(self, height: int, width: int, frames: int) -> dict[str, Any]:
        """The arguments of the pipeline's call that say the size."""
        return {"height": height, "width": width}

    def stock_layout(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T, H, W]` or `[B, C, H, W]` as the pipeline has them, or back."""
        return latents


class StockVAE(VAEWrapper):
    """A VAE of diffusers, of images or videos; images are decoded to videos of one frame."""

    def __init__(self, vae: Any) -> None:
        config, channels = vae.config, self._channels(vae)
        means, deviations = config.get("latents_mean"), config.get("latents_std")
        factor = 1.0 if isinstance(vae, diffusers.AutoencoderKLWan) else config.scaling_factor
        scale = [factor] * channels if deviations is None else [factor / deviation for deviation in deviations]
        shift = [config.get("shift_factor") or 0.0] * channels if means is None else list(means)
        super().__init__(vae, scale, shift)

    @staticmethod
    def _channels(vae: Any) -> int:
        return vae.config.z_dim if isinstance(vae, diffusers.AutoencoderKLWan) else vae.config.latent_channels

    @property
    def channels(self) -> int:
        return self._channels(self.vae)

    @property
    def strides(self) -> tuple[int, int, int]:
        vae: Any = self.vae
        config = vae.config
        if isinstance(vae, diffusers.AutoencoderKLWan):
            return config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial
        spatial = 2 ** (len(config.block_out_channels) - 1)
        return int(config.get("temporal_compression_ratio", 1)), spatial, spatial

    def decode(self, z: Tensor) -> Tensor:
        dims = (1, -1, *[1] * (z.ndim - 2))
        z = z / self.scale.view(dims).to(z) + self.shift.view(dims).to(z)
        (video,) = self.vae.decode(z, return_dict=False)
        return video.unsqueeze(1) if video.ndim == 4 else video.transpose(1, 2).contiguous()


class Images(StockFamily):
    """Families of images."""

    def axes(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[Unit, Unit, Unit]:
        _, height, width = units(strides, config["patch_size"])
        return STILL, height, width

    def own_size(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[int, int, int]:
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return 1, height, width

    def latent_shape(self, config: Mapping[str, Any], size: Sequence[int]) -> tuple[int, ...]:
        return (config["in_channels"], *size[1:])


class PixArt(Images):
    """PixArt-α: T5, whose padding is masked; a network that predicts variances as well."""

    pipeline = "PixArtAlphaPipeline"
    network = diffusers.PixArtTransformer2DModel
    former_names = ("Transformer2DModel",)
    denoiser = PixArtDenoiser
    unpadded = True
    most_tokens = 120

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (config["caption_channels"],)

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return self.most_tokens

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        # Without clean_caption, which would make of a prompt what packages that may be missing make of it.
        states, mask, *_ = pipeline.encode_prompt(prompts, False, max_sequence_length=self.most_tokens)
        return ([row[:length] for row, length in zip(states, mask.sum(1).tolist(), strict=True)],)

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
        given = super().arguments(conditioning, negative)
        for prefix, part in (("", conditioning), ("negative_", negative)):
            if part is not None:
                states = part.tensors["encoder_hidden_states"]
                mask = part.tensors.get("encoder_attention_mask", states.new_ones(states.shape[:2]))
                given[f"{prefix}prompt_attention_mask"] = mask
        return given if negative is None else {**given, "negative_prompt": None}  # "" if not given

    def pixels(self, height: int, width: int, frames: int) -> dict[str, Any]:
        return {"height": height, "width": width, "use_resolution_binning": False}


class PixArtSigma(PixArt):
    """PixArt-Σ: longer prompts."""

    pipeline = "PixArtSigmaPipeline"
    most_tokens = 300


class StableDiffusion(Images):
    """Stable Diffusion 1.5: CLIP, whose padding the network attends to."""

    pipeline = "StableDiffusionPipeline"
    network = diffusers.UNet2DConditionModel
    denoiser = StableDiffusionDenoiser

    def axes(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[Unit, Unit, Unit]:
        _, height, width = units(strides, 1)
        return STILL, height, width

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (config["cross_attention_dim"],)

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return pipeline.tokenizer.model_max_length

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        states, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
        return (list(states),)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIPs side by side, and the second's pooled embedding; the null prompt may be zeros."""

    pipeline = "StableDiffusionXLPipeline"
    encoders = ("text_encoder", "text_encoder_2")

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        ids = 6 * config["addition_time_embed_dim"]
        return config["cross_attention_dim"], config["projection_class_embeddings_input_dim"] - ids

    def encoded_widths(self, encoders: Sequence[Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        return sum(map(hidden_size, encoders)), encoders[-1].projection_dim

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            counts = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states, pooled = states * counts[:, None, None], pooled * counts[:, None]
        return list(states), list(pooled[:, None])


class SD3(Images):
    """Stable Diffusion 3 and 3.5: two CLIPs and a T5, one after the other, and the CLIPs' pooled embeddings."""

    pipeline = "StableDiffusion3Pipeline"
    network = diffusers.SD3Transformer2DModel
    denoiser = SD3Denoiser
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    most_tokens = 256
    """Of the T5's; the CLIPs' 77 come before them."""

    def check_size(
        self, config: Mapping[str, Any], size: Sequence[int], strides: tuple[int, int, int], what: str
    ) -> None:
        most = config["pos_embed_max_size"] * config["patch_size"]
        if max(size[1:]) > most:
            raise ValueError(
                f"{what}; the network has positions for {most * strides[1]} pixels of height and width, so at most that"
                " would do"
            )

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return config["joint_attention_dim"], config["pooled_projection_dim"]

    def encoded_widths(self, encoders: Sequence[Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        first, second, third = encoders
        pooled = first.projection_dim + second.projection_dim
        return config["joint_attention_dim"] if third is None else hidden_size(third), pooled

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return pipeline.tokenizer.model_max_length + self.most_tokens

    def limit(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return pipeline.tokenizer.model_max_length if pipeline.tokenizer_3 is None else self.most_tokens

    def tokenizer(self, pipeline: Any) -> Any:
        return pipeline.tokenizer if pipeline.tokenizer_3 is None else pipeline.tokenizer_3

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        if pipeline.transformer is None:  # whose config says how wide the zeros in a missing T5's place are
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.most_tokens
        )
        return list(states), list(pooled[:, None])


class CogVideoX(StockFamily):
    """CogVideoX 2B and 5B: T5, whose padding the network attends to; frames before channels in the pipeline."""

    pipeline = "CogVideoXPipeline"
    network = diffusers.CogVideoXTransformer3DModel
    denoiser = CogVideoXDenoiser
    vae = diffusers.AutoencoderKLCogVideoX

    def refuse(self, index: Mapping[str, Any], folder: Path) -> None:
        path = folder / self.part / "config.json"
        if path.is_file() and read_json(path).get("patch_size_t") is not None:
            raise ValueError(
                f"{folder} is a CogVideoX 1.5, whose patches span two frames and which needs padding that is not there"
                " yet; 2B and 5B of 1.0 would do"
            )

    def axes(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[Unit, Unit, Unit]:
        (first, step, stride), height, width = units(strides, config["patch_size"])
        return Unit(first, 2 * step, stride), height, width  # the VAE decodes latents in pairs after the first

    def own_size(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[int, int, int]:
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        return frames, config["sample_height"], config["sample_width"]

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (config["text_embed_dim"],)

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return config["max_text_seq_length"]

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        states, _ = pipeline.encode_prompt(
            prompts, None, do_classifier_free_guidance=False, max_sequence_length=self.tokens(pipeline, config)
        )
        return (list(states),)

    def pixels(self, height: int, width: int, frames: int) -> dict[str, Any]:
        return {"height": height, "width": width, "num_frames": frames}

    def stock_layout(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)


class Wan(StockFamily):
    """Wan 2.x with one transformer: UMT5, whose padding is zeros."""

    pipeline = "WanPipeline"
    network = diffusers.WanTransformer3DModel
    denoiser = WanDenoiser
    vae = diffusers.AutoencoderKLWan
    unpadded = True
    most_tokens = 512

    def refuse(self, index: Mapping[str, Any], folder: Path) -> None:
        if class_name(index, "transformer_2") or index.get("boundary_ratio") is not None:
            raise ValueError(
                f"{folder} has two transformers, one for each half of the noise levels; a student has one network, so"
                " it takes a Wan with a single one: 2.1, or 2.2's TI2V-5B"
            )

    def axes(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[Unit, Unit, Unit]:
        return units(strides, config["patch_size"][1])

    def own_size(self, config: Mapping[str, Any], strides: tuple[int, int, int]) -> tuple[int, int, int]:
        frames, height, width = strides  # 81 x 480 x 832, the pipeline's; no config says it
        return 80 // frames + 1, 480 // height, 832 // width

    def widths(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (config["text_dim"],)

    def tokens(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        return self.most_tokens

    def states(self, pipeline: Any, config: Mapping[str, Any], prompts: list[str]) -> tuple[list[Tensor], ...]:
        states, _ = pipeline.encode_prompt(
            prompts, None, do_classifier_free_guidance=False, max_sequence_length=self.most_tokens
        )
        return ([row[: int(row.any(-1).sum())] for row in states],)

    def pixels(self, height: int, width: int, frames: int) -> dict[str, Any]:
        return {"height": height, "width": width, "num_frames": frames}

    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
        given = super().arguments(conditioning, negative)
        missing = {name: self.most_tokens - states.shape[1] for name, states in given.items()}
        return {name: nn.functional.pad(states, (0, 0, 0, missing[name])) for name, states in given.items()}


def hidden_size(config: Any) -> int:
    """The width of a text encoder's states."""
    return config.d_model if hasattr(config, "d_model") else config.hidden_size


OPENSORA = OpenSora()
STOCK: dict[str, StockFamily] = {
    family.pipeline: family()
    for family in (PixArt, PixArtSigma, StableDiffusion, StableDiffusionXL, SD3, CogVideoX, Wan)
}
"""Families of diffusers by the class of their pipelines."""


def class_name(index: Mapping[str, Any], part: str) -> str | None:
    """The class that a pipeline's index names for a part, or None."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def family_of(folder: Path) -> Family:
    """The family of a pipeline's folder. Raises ValueError, with the known ones, for a pipeline of another class."""
    path = folder / INDEX_FILE
    name = read_json(path).get("_class_name") if path.is_file() else None
    if name in (None, OPENSORA.pipeline):
        return OPENSORA
    if name not in STOCK:
        raise ValueError(f"{folder} holds a {name}; it takes one of {', '.join([OPENSORA.pipeline, *STOCK])}")
    return STOCK[name]
