"""CausalVAE: the causal video autoencoder of Open-Sora Plan before WF-VAE, built from layers that its config names.

Constructor, state dict and numerics are those of the public ``CausalVAEModel``, so that its weights load as they are,
from safetensors or from a trainer's .ckpt. A video is `[B, 3, T, H, W]` in [-1, 1].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tdm_fast.models.autoencoder import VideoAutoencoder
from tdm_fast.models.causalvae_layers import (
    ATTENTION,
    CONVOLUTIONS,
    DOWNSAMPLING,
    RESNET_BLOCKS,
    UPSAMPLING,
    Resampling,
)
from tdm_fast.models.tiling import run_in_tiles, spans
from tdm_fast.models.wfvae_layers import make_norm


class Level(nn.Module):
    """Residual blocks of one resolution, attention behind each or none, then what changes the resolution."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], resampling: dict[str, nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self._resampling = tuple(resampling)
        for name, layer in resampling.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in self._resampling:
            x = self.get_submodule(name)(x)
        return x


class Mid(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, resnet: str, attention: str, dropout: float, norms: tuple[str, str]) -> None:
        super().__init__()
        norm_type, attention_norm_type = norms
        self.block_1 = RESNET_BLOCKS[resnet](channels, channels, dropout, norm_type)
        self.attn_1 = ATTENTION[attention](channels, attention_norm_type)
        self.block_2 = RESNET_BLOCKS[resnet](channels, channels, dropout, norm_type)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """`[B, 3, T, H, W]` to `[B, 2 * z_channels, T', H', W']`. `config` is the autoencoder's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths = [config.hidden_size * multiple for multiple in config.hidden_size_mult]
        # The original gives its encoder's attention no norm_type, whatever the config says.
        attention_norm_type = "groupnorm"
        self.conv_in = CONVOLUTIONS[config.encoder_conv_in](3, config.hidden_size, 3, padding=1)
        self.down = nn.ModuleList()
        channels, resolution = config.hidden_size, config.resolution
        for index, width in enumerate(widths):
            resampling = {
                "downsample": config.encoder_spatial_downsample[index],
                "time_downsample": config.encoder_temporal_downsample[index],
            }
            self.down.append(
                Level(
                    _blocks(config.encoder_resnet_blocks[index], channels, width, config.num_res_blocks, config),
                    _attention(config.encoder_attention, width, config.num_res_blocks, attention_norm_type)
                    if resolution in config.attn_resolutions
                    else [],
                    {key: DOWNSAMPLING[name].make(width) for key, name in resampling.items() if name},
                )
            )
            channels = width
            resolution //= 2 if resampling["downsample"] else 1
        norms = (config.norm_type, attention_norm_type)
        self.mid = Mid(channels, config.encoder_mid_resnet, config.encoder_attention, config.dropout, norms)
        self.norm_out = make_norm(channels, config.norm_type)
        self.conv_out = CONVOLUTIONS[config.encoder_conv_out](channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """`[B, z_channels, T', H', W']` to `[B, 3, T, H, W]`. `config` is the autoencoder's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths = [config.hidden_size * multiple for multiple in config.hidden_size_mult]
        channels = widths[-1]
        self.conv_in = CONVOLUTIONS[config.decoder_conv_in](config.z_channels, channels, 3, padding=1)
        norms = (config.norm_type, config.norm_type)
        self.mid = Mid(channels, config.decoder_mid_resnet, config.decoder_attention, config.dropout, norms)
        resolution, blocks = config.resolution // 2 ** (len(widths) - 1), config.num_res_blocks + 1
        levels = []
        for index, width in reversed(list(enumerate(widths))):
            resampling = {
                "upsample": config.decoder_spatial_upsample[index],
                "time_upsample": config.decoder_temporal_upsample[index],
            }
            levels.append(
                Level(
                    _blocks(config.decoder_resnet_blocks[index], channels, width, blocks, config),
                    _attention(config.decoder_attention, width, blocks, config.norm_type)
                    if resolution in config.attn_resolutions
                    else [],
                    {key: UPSAMPLING[name].make(width) for key, name in resampling.items() if name},
                )
            )
            channels = width
            resolution *= 2 if resampling["upsample"] else 1
        # Numbered like the encoder's levels, so the coarsest, which comes first, is the last.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = make_norm(channels, config.norm_type)
        self.conv_out = CONVOLUTIONS[config.decoder_conv_out](channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class CausalVAEModel(VideoAutoencoder):
    """The autoencoder. Argument names and defaults are those of public configs.

    Args:
        hidden_size, hidden_size_mult: width of the finest level, and each level's multiple of it, finest first.
        z_channels, embed_dim: channels of the networks' and, behind the 1 x 1 `quant_conv`, of the model's latents.
        attn_resolutions, resolution: levels of these heights, for videos of height `resolution`, have attention.
        double_z: must be True; the encoder gives means and log-variances.
        num_res_blocks: residual blocks per level; the decoder has one more.
        q_conv, encoder_*, decoder_*: names of layers, per level where they are lists, finest first; "" is none.
        use_quant_layer: whether there are `quant_conv` and `post_quant_conv`.
        norm_type: "groupnorm" (32 groups, statistics over all frames) or "layernorm" (over channels).

    Raises:
        ValueError: for layers that do not exist, lists of unequal length, widths that groupnorm cannot divide, an
            encoder and a decoder whose strides differ.
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        z_channels: int = 4,
        hidden_size_mult: Sequence[int] = (1, 2, 4, 4),
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        resolution: int = 256,
        double_z: bool = True,
        embed_dim: int = 4,
        num_res_blocks: int = 2,
        q_conv: str = "CausalConv3d",
        encoder_conv_in: str = "CausalConv3d",
        encoder_conv_out: str = "CausalConv3d",
        encoder_attention: str = "AttnBlock3D",
        encoder_resnet_blocks: Sequence[str] = ("ResnetBlock3D",) * 4,
        encoder_spatial_downsample: Sequence[str] = ("SpatialDownsample2x",) * 3 + ("",),
        encoder_temporal_downsample: Sequence[str] = ("", "TimeDownsample2x", "TimeDownsample2x", ""),
        encoder_mid_resnet: str = "ResnetBlock3D",
        decoder_conv_in: str = "CausalConv3d",
        decoder_conv_out: str = "CausalConv3d",
        decoder_attention: str = "AttnBlock3D",
        decoder_resnet_blocks: Sequence[str] = ("ResnetBlock3D",) * 4,
        decoder_spatial_upsample: Sequence[str] = ("",) + ("SpatialUpsample2x",) * 3,
        decoder_temporal_upsample: Sequence[str] = ("", "", "TimeUpsample2x", "TimeUpsample2x"),
        decoder_mid_resnet: str = "ResnetBlock3D",
        use_quant_layer: bool = True,
        norm_type: str = "groupnorm",
    ) -> None:
        super().__init__()
        _check_config(self.config)
        down, up = _strides(self.config, "encoder", "down"), _strides(self.config, "decoder", "up")
        if down != up:
            raise ValueError(
                f"the encoder halves time and space by {down[0]}x{down[1]}x{down[1]}, the decoder doubles them by"
                f" {up[0]}x{up[1]}x{up[1]}; encoder_*_downsample and decoder_*_upsample must belong together"
            )
        self.temporal_stride, self.spatial_stride = down
        self.latent_channels = embed_dim if use_quant_layer else z_channels
        self.use_tiling = False
        # The original's names. Sizes of whole tiles; a piece of time sees `tile_overlap_t` latents more than its own.
        self.tile_sample_min_size = 512
        self.tile_sample_min_size_t = 33
        self.tile_latent_min_size = 512 // self.spatial_stride
        self.tile_latent_min_size_t = 16 // self.temporal_stride + 1
        self.tile_overlap_factor = 0.125
        self.tile_overlap_t = 2

        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        if use_quant_layer:
            self.quant_conv = CONVOLUTIONS[q_conv](2 * z_channels, 2 * embed_dim, 1)
            self.post_quant_conv = CONVOLUTIONS[q_conv](embed_dim, z_channels, 1)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encodes and decodes in overlapping pieces of time and space from now on, sized as the `tile_*` attributes.

        Memory for activations is then a piece's. Pieces know their surroundings only as far as they overlap, so results
        differ from those of the whole video, as in the original, whose tiles these are; a UserWarning says so. The
        overlap in time is two latents of the past, in space an eighth of a tile, over which neighbours are mixed.
        Unlike in the original, pieces of time fit temporal strides other than 4, tiled encoding of large frames
        loses no latents, and no tile is computed that lies within its neighbour.
        """
        if use_tiling:
            warnings.warn(
                "a CausalVAE's tiles have norms, attention and a past of their own: results differ from those without"
                " tiling, mostly by little; larger tile_sample_min_size, tile_latent_min_size and *_size_t differ less",
                stacklevel=2,
            )
        self.use_tiling = use_tiling

    def encode_moments(self, x: Tensor) -> Tensor:
        if not self.use_tiling:
            return self._encode_piece(x)
        stride, unit = self.temporal_stride, self.spatial_stride
        size, size_t = self.tile_sample_min_size, self.tile_sample_min_size_t
        if size % unit or (size_t - 1) % stride:
            raise ValueError(
                f"tile_sample_min_size must be a multiple of {unit} and tile_sample_min_size_t 1 more than one of"
                f" {stride}, got {size} and {size_t}"
            )
        size, step, overlap = self._tiles(size // unit, (size_t - 1) // stride + 1)
        pieces = []
        for start, end in spans((x.shape[2] - 1) // stride + 1, step + self.tile_overlap_t, self.tile_overlap_t):
            frames = x[:, :, start * stride : (end - 1) * stride + 1]
            moments = run_in_tiles(self._encode_piece, frames, size, overlap, unit, 1)
            pieces.append(moments[:, :, self.tile_overlap_t if start else 0 :])
        return torch.cat(pieces, dim=2)

    def decode_latents(self, z: Tensor) -> Tensor:
        if not self.use_tiling:
            return self._decode_piece(z)
        size, step, overlap = self._tiles(self.tile_latent_min_size, self.tile_latent_min_size_t)
        # The frames of the latents that a piece shares with the one before, its first being one frame only.
        shared = 1 + (self.tile_overlap_t - 1) * self.temporal_stride
        pieces = []
        for start, end in spans(z.shape[2], step + self.tile_overlap_t, self.tile_overlap_t):
            video = run_in_tiles(self._decode_piece, z[:, :, start:end], size, overlap, 1, self.spatial_stride)
            pieces.append(video[:, :, shared if start else 0 :])
        return torch.cat(pieces, dim=2)

    def _encode_piece(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return self.quant_conv(h) if self.config.use_quant_layer else h

    def _decode_piece(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z) if self.config.use_quant_layer else z)

    def _tiles(self, size: int, size_t: int) -> tuple[int, int, int]:
        """Size of a tile, step in time, and overlap in space, in latents; ValueError where they leave nothing."""
        overlap = int(size * self.tile_overlap_factor)
        if size_t < 2 or self.tile_overlap_t < 1 or not 0 <= overlap < size:
            raise ValueError(
                f"tiles of {size_t} x {size} x {size} latents with tile_overlap_t {self.tile_overlap_t} and"
                f" tile_overlap_factor {self.tile_overlap_factor} do not work; they take 2 latents of time or more, an"
                " overlap of 1 or more, and a factor from 0 to less than 1"
            )
        return size, size_t - 1, overlap


def _blocks(name: str, channels: int, width: int, number: int, config: Any) -> list[nn.Module]:
    widths = [channels] + [width] * number
    return [RESNET_BLOCKS[name](*pair, config.dropout, config.norm_type) for pair in pairwise(widths)]


def _attention(name: str, width: int, number: int, norm_type: str) -> list[nn.Module]:
    return [ATTENTION[name](width, norm_type) for _ in range(number)]


def _strides(config: Any, side: str, direction: str) -> tuple[int, int]:
    """Strides in time and space of the encoder's downsampling or the decoder's upsampling."""
    table: dict[str, Resampling] = DOWNSAMPLING if direction == "down" else UPSAMPLING
    axes = ("spatial", "temporal")
    layers = [table[name] for axis in axes for name in config[f"{side}_{axis}_{direction}sample"] if name]
    return math.prod(layer.time for layer in layers), math.prod(layer.space for layer in layers)


def _check_config(config: Any) -> None:
    """Refuse a config whose names mean no layer here or whose lists differ in length."""
    if not config.double_z:
        raise ValueError("double_z must be True: the encoder gives means and log-variances")
    tables: dict[str, Mapping[str, object]] = {
        "q_conv": CONVOLUTIONS,
        "encoder_conv_in": CONVOLUTIONS,
        "encoder_conv_out": CONVOLUTIONS,
        "encoder_attention": ATTENTION,
        "encoder_mid_resnet": RESNET_BLOCKS,
        "decoder_conv_in": CONVOLUTIONS,
        "decoder_conv_out": CONVOLUTIONS,
        "decoder_attention": ATTENTION,
        "decoder_mid_resnet": RESNET_BLOCKS,
    }
    lists: dict[str, Mapping[str, object]] = {
        "encoder_resnet_blocks": RESNET_BLOCKS,
        "encoder_spatial_downsample": DOWNSAMPLING,
        "encoder_temporal_downsample": DOWNSAMPLING,
        "decoder_resnet_blocks": RESNET_BLOCKS,
        "decoder_spatial_upsample": UPSAMPLING,
        "decoder_temporal_upsample": UPSAMPLING,
    }
    levels = len(config.hidden_size_mult)
    for argument, table in (tables | lists).items():
        names = list(config[argument]) if argument in lists else [config[argument]]
        if argument in lists and len(names) != levels:
            raise ValueError(f"{argument} has {len(names)} entries for the {levels} levels of hidden_size_mult")
        for name in names:
            if name not in table and not (name == "" and "sample" in argument):
                raise ValueError(f"{argument} {name!r} is not a layer here; it takes {', '.join(table)}")
