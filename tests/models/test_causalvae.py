"""CausalVAE: golden values of the public model, keys, strides, tiling, checkpoints of its trainer, bad input.

data/causalvae_golden.safetensors holds what the public code computed; make_causalvae_golden.py regenerates it.
Weights and inputs follow a formula, so that only outputs are stored.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tdm_fast.models.causalvae import CausalVAEModel

GOLDEN_FILE = Path(__file__).parent / "data" / "causalvae_golden.safetensors"
# The layers of two published generations, narrow, and two more configs with what these do not have.
V1_2: dict[str, Any] = {
    "hidden_size": 32,
    "hidden_size_mult": [1, 2, 1, 2],
    "num_res_blocks": 1,
    "encoder_conv_in": "Conv2d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_spatial_downsample": ["Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""],
    "encoder_temporal_downsample": ["", "", "", ""],
    "decoder_attention": "AttnBlock3DFix",
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"],
    "decoder_temporal_upsample": ["", "", "", ""],
}
V1_1 = V1_2 | {
    "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
    "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", "SpatialUpsample2x", "SpatialUpsample2x"],
    "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
}
# The constructor's defaults but for the decoder's attention, which the public code cannot make by default.
FIRST: dict[str, Any] = {
    "hidden_size": 32,
    "hidden_size_mult": [1, 1, 2, 1],
    "num_res_blocks": 2,
    "norm_type": "layernorm",
    "decoder_attention": "AttnBlock3DFix",
    "resolution": 32,
    "attn_resolutions": [8],
    "z_channels": 6,
    "embed_dim": 5,
    "q_conv": "Conv2d",
}
TIME_2: dict[str, Any] = FIRST | {
    "num_res_blocks": 1,
    "use_quant_layer": False,
    "encoder_spatial_downsample": ["Spatial2x3DDownsample", "Spatial2xTime2x3DDownsample", "SpatialDownsample2x", ""],
    "encoder_temporal_downsample": ["", "", "", ""],
    "decoder_spatial_upsample": ["", "Spatial2x3DUpsample", "Spatial2xTime2x3DUpsample", "Upsample"],
    "decoder_temporal_upsample": ["", "", "", ""],
}
# name: (constructor arguments, frames x height x width)
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "v1_2": (V1_2, (9, 16, 24)),
    "v1_1": (V1_1, (9, 24, 16)),
    "image": (V1_1, (1, 16, 16)),
    "first": (FIRST, (5, 16, 24)),
    "time_2": (TIME_2, (5, 24, 16)),
}
# Two pieces of time, 2 x 2 tiles each.
TILED: tuple[dict[str, Any], tuple[int, int, int]] = (V1_2, (13, 40, 40))
TILES = {
    "tile_sample_min_size": 32,
    "tile_sample_min_size_t": 5,
    "tile_latent_min_size": 4,
    "tile_latent_min_size_t": 2,
    "tile_overlap_factor": 0.25,
}


def chirp(shape: tuple[int, ...], phase: float) -> Tensor:
    """Numbers of mean square 1 without visible structure, the same on every machine; float64."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2.0) * torch.sin(0.618 * index * index + phase)).view(shape)


@torch.no_grad()
def set_weights(model: nn.Module) -> None:
    """Kernels with gain 1.5, biases and mixing factors of size 0.4, norm weights around 1."""
    for number, (name, weight) in enumerate(sorted(model.named_parameters())):
        is_norm = "norm" in name and name.endswith("weight")
        size = 1.5 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.4
        weight.copy_(chirp(tuple(weight.shape), float(number)) * size + is_norm)


def video_of(size: tuple[int, int, int]) -> Tensor:
    """`[1, 3, T, H, W]` in [-1, 1]."""
    return chirp((1, 3, *size), 0.1) / math.sqrt(2.0)


def sample_of(video: Tensor) -> Tensor:
    """What is stored of a decoded video: rows and columns of all kinds, whatever a tile's size."""
    return video[..., ::3, ::2]


def make_vae(**config: Any) -> CausalVAEModel:
    model = CausalVAEModel(**config).double().eval()
    set_weights(model)
    return model


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_the_original_ones(name: str) -> None:
    config, size = CASES[name]
    golden = load_file(GOLDEN_FILE)
    vae, x = make_vae(**config), video_of(size)
    latents = vae.encode(x).latent_dist
    assert_near(latents.parameters, golden[f"{name}.moments"], 1e-6)
    decoded = vae.decode(latents.mode()).sample
    assert decoded.shape == x.shape
    assert_near(sample_of(decoded), golden[f"{name}.decoded"], 1e-6)


@torch.no_grad()
def test_tiled_outputs_are_the_original_ones() -> None:
    """In float32, which is faster; the whole video's outputs are a hundred times further away."""
    config, size = TILED
    golden = load_file(GOLDEN_FILE)
    vae, x = make_vae(**config).float(), video_of(size).float()
    whole = vae.encode(x).latent_dist.mode()
    with pytest.warns(UserWarning, match="results differ from those without tiling"):
        vae.enable_tiling()
    for attribute, value in TILES.items():
        assert hasattr(vae, attribute)
        setattr(vae, attribute, value)
    latents = vae.encode(x).latent_dist
    assert_near(latents.parameters, golden["tiled.moments"], 2e-5)
    assert (latents.mode() - whole).abs().max() > 2e-3 * whole.abs().max()
    assert_near(sample_of(vae.decode(latents.mode()).sample), golden["tiled.decoded"], 2e-5)
