"""WF-VAE (arXiv 2411.17459): a causal video autoencoder whose main road for energy is a Haar wavelet pyramid.

Written for weights of Open-Sora Plan v1.3: same constructor, state dict and numerics. A video is `[B, 3, T, H, W]` in
[-1, 1], its latents `[B, latent_dim, (T - 1) / 4 + 1, H / 8, W / 8]` (or / 8 in time, by the names of the blocks).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tdm_fast.models.autoencoder import VideoAutoencoder
from tdm_fast.models.causal_conv import CausalConv3d, FrameConv2d, TemporalStream
from tdm_fast.models.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)
from tdm_fast.models.wfvae_layers import (
    Chain,
    Downsample,
    FrameAttention,
    ResnetBlock2D,
    ResnetBlock3D,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
    make_norm,
)

SPATIAL_STRIDE = 8
# (block, wavelet) that a level can have -> whether the level also halves or doubles time.
DOWN_LEVELS = {
    ("Downsample", "HaarWaveletTransform2D"): False,
    ("Spatial2xTime2x3DDownsample", "HaarWaveletTransform3D"): True,
}
UP_LEVELS = {
    ("Upsample", "InverseHaarWaveletTransform2D"): False,
    ("Spatial2xTime2x3DUpsample", "InverseHaarWaveletTransform3D"): True,
}


class Encoder(nn.Module):
    """`[B, 3, T, H, W]` to mean and log-variance, `[B, 2 * latent_dim, T', H / 8, W / 8]`."""

    def __init__(
        self,
        latent_dim: int,
        base_channels: int,
        num_resblocks: int,
        energy_flow: int,
        dropout: float,
        use_attention: bool,
        norm_type: str,
        l1_in_time: bool,
    ) -> None:
        super().__init__()
        base = base_channels
        blocks_2d = [ResnetBlock2D(base, base, dropout, norm_type) for _ in range(num_resblocks)]
        blocks_3d = [ResnetBlock3D(2 * base, 2 * base, dropout, norm_type) for _ in range(num_resblocks)]
        attention = [FrameAttention(4 * base, norm_type)] if use_attention else []
        down: type[nn.Module] = Spatial2xTime2x3DDownsample if l1_in_time else Downsample
        self.down1 = Chain([FrameConv2d(24, base, 3, padding=1), *blocks_2d, down(base)])
        self.down2 = Chain(
            [
                FrameConv2d(base + energy_flow, 2 * base, 3, padding=1),
                *blocks_3d,
                Spatial2xTime2x3DDownsample(2 * base),
            ]
        )
        self.connect_l1 = FrameConv2d(24 if l1_in_time else 12, energy_flow, 3, padding=1)
        self.connect_l2 = FrameConv2d(24, energy_flow, 3, padding=1)
        self.mid = Chain(
            [
                ResnetBlock3D(2 * base + energy_flow, 4 * base, dropout, norm_type),
                *attention,
                ResnetBlock3D(4 * base, 4 * base, dropout, norm_type),
            ]
        )
        self.norm_out = make_norm(4 * base, norm_type)
        self.conv_out = CausalConv3d(4 * base, 2 * latent_dim, padding=1)
        self.wavelet_transform_in = HaarWaveletTransform3D()
        self.wavelet_transform_l1 = HaarWaveletTransform3D() if l1_in_time else HaarWaveletTransform2D()
        self.wavelet_transform_l2 = HaarWaveletTransform3D()

    def forward(self, x: Tensor, stream: TemporalStream | None = None) -> Tensor:
        coefficients = self.wavelet_transform_in(x, stream)
        l1 = self.wavelet_transform_l1(coefficients[:, :3], stream)
        l2 = self.wavelet_transform_l2(l1[:, :3], stream)
        h = self.down1(coefficients, stream)
        h = self.down2(torch.cat([h, self.connect_l1(l1)], dim=1), stream)
        h = self.mid(torch.cat([h, self.connect_l2(l2)], dim=1), stream)
        return self.conv_out(F.silu(self.norm_out(h)), stream)


class Decoder(nn.Module):
    """Latents `[B, latent_dim, T', H', W']` to `[B, 3, T, 8 H', 8 W']`."""

    def __init__(
        self,
        latent_dim: int,
        base_channels: int,
        num_resblocks: int,
        energy_flow: int,
        dropout: float,
        use_attention: bool,
        norm_type: str,
        t_interpolation: str,
        connect_res_layer_num: int,
        l1_in_time: bool,
    ) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int) -> nn.Module:
            return ResnetBlock3D(in_channels, out_channels, dropout, norm_type)

        def connection(out_channels: int) -> Chain:
            blocks = [block(energy_flow, energy_flow) for _ in range(connect_res_layer_num)]
            return Chain([*blocks, FrameConv2d(energy_flow, out_channels, 3, padding=1)])

        self.energy_flow = energy_flow
        base = base_channels
        attention = [FrameAttention(4 * base, norm_type)] if use_attention else []
        self.conv_in = CausalConv3d(latent_dim, 4 * base, padding=1)
        self.mid = Chain([block(4 * base, 4 * base), *attention, block(4 * base, 4 * base + energy_flow)])
        self.up2 = Chain(
            [
                *[block(4 * base, 4 * base) for _ in range(num_resblocks)],
                Spatial2xTime2x3DUpsample(4 * base, t_interpolation),
                block(4 * base, 4 * base + energy_flow),
            ]
        )
        # The published code gives `t_interpolation` to the second level only; the first is always trilinear.
        up: type[nn.Module] = Spatial2xTime2x3DUpsample if l1_in_time else Upsample
        self.up1 = Chain(
            [
                *[block((4 if i == 0 else 2) * base, 2 * base) for i in range(num_resblocks)],
                up(2 * base),
                block(2 * base, 2 * base),
            ]
        )
        self.layer = Chain([block(2 * base, base), block(base, base)])
        self.connect_l1 = connection(24 if l1_in_time else 12)
        self.connect_l2 = connection(24)
        self.norm_out = make_norm(base, norm_type)
        self.conv_out = FrameConv2d(base, 24, 3, padding=1)
        self.inverse_wavelet_transform_out = InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = (
            InverseHaarWaveletTransform3D() if l1_in_time else InverseHaarWaveletTransform2D()
        )
        self.inverse_wavelet_transform_l2 = InverseHaarWaveletTransform3D()

    def forward(self, z: Tensor, stream: TemporalStream | None = None) -> Tensor:
        h = self.mid(self.conv_in(z, stream), stream)
        h, flow = h[:, : -self.energy_flow], h[:, -self.energy_flow :]
        l2 = self.inverse_wavelet_transform_l2(self.connect_l2(flow, stream), stream)
        h = self.up2(h, stream)
        h, flow = h[:, : -self.energy_flow], h[:, -self.energy_flow :]
        l1 = add_to_lowest_band(self.connect_l1(flow, stream), l2)
        l1 = self.inverse_wavelet_transform_l1(l1, stream)
        h = self.layer(self.up1(h, stream), stream)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return self.inverse_wavelet_transform_out(add_to_lowest_band(h, l1), stream)


def add_to_lowest_band(coefficients: Tensor, video: Tensor) -> Tensor:
    """Adds `[B, 3, T, H, W]` to the first three channels of predicted wavelet coefficients."""
    return torch.cat([coefficients[:, :3] + video, coefficients[:, 3:]], dim=1)


class WFVAEModel(VideoAutoencoder):
    """The autoencoder. Argument names, spelling included, and defaults are those of published configs.

    Args:
        latent_dim: latent channels (8 for the 2B model of v1.3).
        base_channels: width at the finest level; the coarsest has 4 times as many.
        encoder_num_resblocks, decoder_num_resblocks: residual blocks per level.
        encoder_energy_flow_hidden_size, decoder_energy_flow_hidden_size: channels of the wavelet side roads.
        attention_type, use_attention: per-frame attention in the middle; "AttnBlock3DFix" is the only type.
        dropout: in the residual blocks.
        norm_type: "groupnorm" (32 groups, statistics over all frames) or "layernorm" (over channels).
        t_interpolation: "nearest" or "trilinear", how the decoder doubles time.
        connect_res_layer_num: residual blocks on each of the decoder's side roads.
        scale, shift: per latent channel, used by `tdm_fast.models.vae` and not here.
        l1_*, l2_*: the blocks of both levels. Level 1 may halve and double time as well
            ("Spatial2xTime2x3DDownsample" with "HaarWaveletTransform3D" and their counterparts): temporal stride 8.

    Raises:
        ValueError: for a block, norm or interpolation that does not exist, widths that groupnorm cannot divide, an
            encoder and a decoder whose temporal strides differ.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        base_channels: int = 128,
        encoder_num_resblocks: int = 2,
        encoder_energy_flow_hidden_size: int = 64,
        decoder_num_resblocks: int = 2,
        decoder_energy_flow_hidden_size: int = 128,
        attention_type: str = "AttnBlock3DFix",
        use_attention: bool = True,
        dropout: float = 0.0,
        norm_type: str = "groupnorm",
        t_interpolation: str = "nearest",
        connect_res_layer_num: int = 1,
        scale: Sequence[float] = (0.18215,) * 8,
        shift: Sequence[float] = (0,) * 8,
        l1_dowmsample_block: str = "Downsample",
        l1_downsample_wavelet: str = "HaarWaveletTransform2D",
        l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample",
        l2_downsample_wavelet: str = "HaarWaveletTransform3D",
        l1_upsample_block: str = "Upsample",
        l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D",
        l2_upsample_block: str = "Spatial2xTime2x3DUpsample",
        l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D",
    ) -> None:
        super().__init__()
        if use_attention and attention_type != "AttnBlock3DFix":
            raise ValueError(f"attention_type must be 'AttnBlock3DFix', got {attention_type!r}")
        down_in_time = _level_in_time("l1_dowmsample_block", l1_dowmsample_block, l1_downsample_wavelet, DOWN_LEVELS)
        up_in_time = _level_in_time("l1_upsample_block", l1_upsample_block, l1_upsample_wavelet, UP_LEVELS)
        if down_in_time != up_in_time:
            raise ValueError(
                f"l1_dowmsample_block {l1_dowmsample_block!r} and l1_upsample_block {l1_upsample_block!r} do not "
                "belong together: one halves time and the other does not double it, or the reverse"
            )
        # The second level's side road has 24 channels, a 3-D transform's: nothing else fits there.
        in_time_only = [
            {pair: True for pair, in_time in levels.items() if in_time} for levels in (DOWN_LEVELS, UP_LEVELS)
        ]
        _level_in_time("l2_dowmsample_block", l2_dowmsample_block, l2_downsample_wavelet, in_time_only[0])
        _level_in_time("l2_upsample_block", l2_upsample_block, l2_upsample_wavelet, in_time_only[1])

        self.temporal_stride = 8 if down_in_time else 4
        self.spatial_stride = SPATIAL_STRIDE
        self.latent_channels = latent_dim
        self.use_tiling = False
        self.tile_frames = 8  # frames per chunk when encoding, a multiple of the temporal stride
        self.tile_latents = 2  # latent frames per chunk when decoding
        self.encoder = Encoder(
            latent_dim,
            base_channels,
            encoder_num_resblocks,
            encoder_energy_flow_hidden_size,
            dropout,
            use_attention,
            norm_type,
            down_in_time,
        )
        self.decoder = Decoder(
            latent_dim,
            base_channels,
            decoder_num_resblocks,
            decoder_energy_flow_hidden_size,
            dropout,
            use_attention,
            norm_type,
            t_interpolation,
            connect_res_layer_num,
            up_in_time,
        )

    @property
    def tiling_is_exact(self) -> bool:
        """Whether results in pieces are those of the whole video, but for rounding: with "layernorm" only."""
        return self.config.norm_type == "layernorm"

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encodes and decodes in chunks of time from now on: memory no longer grows with a video's length.

        With "layernorm" the results are those of the whole video, to rounding. With "groupnorm" they differ by
        nature, because its statistics span whatever frames it is given: a UserWarning says so.
        """
        if use_tiling and not self.tiling_is_exact:
            warnings.warn(
                "norm_type 'groupnorm' takes its statistics over all frames it sees: with temporal tiling these are a "
                "chunk's, and the results differ from those without tiling ('layernorm' has no such difference)",
                stacklevel=2,
            )
        self.use_tiling = use_tiling

    def encode_moments(self, x: Tensor) -> Tensor:
        return self._encode_tiled(x) if self.use_tiling else self.encoder(x)

    def decode_latents(self, z: Tensor) -> Tensor:
        return self._decode_tiled(z) if self.use_tiling else self.decoder(z)

    def _encode_tiled(self, x: Tensor) -> Tensor:
        """Frame 0, then chunks of `tile_frames`; causal convolutions see the end of the chunk before."""
        if self.tile_frames < 1 or self.tile_frames % self.temporal_stride:
            raise ValueError(f"tile_frames must be a multiple of {self.temporal_stride}, got {self.tile_frames}")
        stream = TemporalStream()
        moments = []
        for start, end in _chunks(x.shape[2], self.tile_frames):
            stream.start_chunk(first=start == 0)
            moments.append(self.encoder(x[:, :, start:end], stream))
        return torch.cat(moments, dim=2)

    def _decode_tiled(self, z: Tensor) -> Tensor:
        """Latent 0, then chunks of `tile_latents`, each with the next latent if there is one.

        Interpolation in time looks that one latent ahead; what it decodes to is dropped.
        """
        if self.tile_latents < 1:
            raise ValueError(f"tile_latents must be 1 or more, got {self.tile_latents}")
        stream = TemporalStream()
        pieces = []
        for start, end in _chunks(z.shape[2], self.tile_latents):
            lookahead = min(1, z.shape[2] - end)
            stream.start_chunk(first=start == 0, lookahead=lookahead)
            piece = self.decoder(z[:, :, start : end + lookahead], stream)
            pieces.append(piece[:, :, : piece.shape[2] - lookahead * self.temporal_stride])
        return torch.cat(pieces, dim=2)


def _chunks(length: int, size: int) -> list[tuple[int, int]]:
    """(0, 1), then (start, end) of consecutive chunks of `size`, the last one perhaps shorter."""
    return [(0, 1)] + [(start, min(start + size, length)) for start in range(1, length, size)]


def _level_in_time(argument: str, block: str, wavelet: str, levels: dict[tuple[str, str], bool]) -> bool:
    """Whether the level made of `block` and `wavelet` changes the frame rate; ValueError if there is no such level."""
    if (block, wavelet) not in levels:
        known = " or ".join(f"{b!r} with {w!r}" for b, w in levels)
        raise ValueError(f"{argument} {block!r} with wavelet {wavelet!r} is not supported: {known} would be")
    return levels[block, wavelet]
