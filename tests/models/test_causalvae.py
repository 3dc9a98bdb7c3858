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
from tdm_fast.models.causalvae_layers import halve_time
from tdm_fast.models.tiling import run_in_tiles, spans
from tdm_fast.models.vae import CausalVAEWrapper

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


@torch.no_grad()
def test_the_golden_numbers_need_every_layer() -> None:
    """The first models' attention, which mixes frames, differs from per-frame attention by far more than rounding."""
    config, size = CASES["first"]
    other = make_vae(**config | {"encoder_attention": "AttnBlock3DFix"})
    golden = load_file(GOLDEN_FILE)["first.moments"]
    assert (other.encode(video_of(size)).latent_dist.parameters - golden).abs().max() > 1e-3 * golden.abs().max()


def test_default_keys_are_the_public_ones() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in CausalVAEModel().state_dict().items()}
    assert len(shapes) == 248 and sum(map(math.prod, shapes.values())) == 229_169_895
    expected = {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.conv.weight": (256, 128, 1, 1, 1),
        "encoder.down.2.downsample.conv.conv.weight": (512, 512, 1, 3, 3),
        "encoder.mid.attn_1.proj_out.conv.bias": (512,),
        "decoder.up.0.block.2.norm2.weight": (128,),
        "decoder.up.3.upsample.conv.conv.weight": (512, 512, 1, 3, 3),
        "quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "post_quant_conv.conv.weight": (4, 4, 1, 1, 1),
    }
    assert {name: shapes[name] for name in expected} == expected
    with torch.device("meta"):
        older = set(CausalVAEModel(**V1_1).state_dict())
    assert {
        "encoder.conv_in.weight",
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.time_downsample.conv.weight",
        "encoder.down.1.time_downsample.mix_factor",
        "decoder.up.2.time_upsample.conv.conv.bias",
    } <= older


@pytest.mark.parametrize(
    ("config", "strides", "channels"),
    [(V1_2, (4, 8), 4), (V1_1, (4, 8), 4), (FIRST, (4, 8), 5), (TIME_2, (2, 8), 6)],
)
def test_strides_and_channels(config: dict[str, Any], strides: tuple[int, int], channels: int) -> None:
    with torch.device("meta"):
        vae = CausalVAEModel(**config)
    assert (vae.temporal_stride, vae.spatial_stride) == strides and vae.latent_channels == channels


@torch.no_grad()
def test_frames_do_not_depend_on_later_ones() -> None:
    """With norms per position, that is: groupnorm's statistics span all frames. And without the mixing attention."""
    vae = make_vae(**TIME_2 | {"encoder_attention": "AttnBlock3DFix"})
    # The original's encoder attends behind a groupnorm whatever norm_type says.
    vae.encoder.mid.attn_1 = nn.Identity()
    for level in vae.encoder.down:
        level.attn = nn.ModuleList()
    x = video_of((5, 16, 16))
    whole, start = (vae.encode(video).latent_dist.mode() for video in (x, x[:, :, :3]))
    assert_near(whole[:, :, :2], start, 1e-12)


# Tiling


@pytest.mark.parametrize(
    ("length", "size", "overlap", "expected"),
    [
        (24, 6, 2, [(0, 6), (4, 10), (8, 14), (12, 18), (16, 22), (20, 24)]),
        (22, 6, 2, [(0, 6), (4, 10), (8, 14), (12, 18), (16, 22)]),
        (5, 6, 2, [(0, 5)]),
        (80, 64, 8, [(0, 64), (56, 80)]),
        (64, 64, 8, [(0, 64)]),
        (1, 6, 2, [(0, 1)]),
        (7, 3, 0, [(0, 3), (3, 6), (6, 7)]),
    ],
)
def test_spans_cover_a_length_once(length: int, size: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert spans(length, size, overlap) == expected


@pytest.mark.parametrize(("height", "width"), [(5, 9), (3, 4), (11, 2), (4, 4)])
def test_tiles_of_a_local_network_are_the_whole(height: int, width: int) -> None:
    """A network that looks at one latent at a time cannot tell tiles from the whole, whatever weights mix them."""
    x = chirp((1, 2, 3, height, width), 0.3)

    def double(piece: Tensor) -> Tensor:
        return piece.repeat_interleave(2, 3).repeat_interleave(2, 4)

    for overlap in (0, 1, 2):
        assert_near(run_in_tiles(double, x, 4, overlap, 1, 2), double(x), 1e-14)
        assert_near(run_in_tiles(lambda piece: piece[..., ::2, ::2], double(x), 4, overlap, 2, 1), x, 1e-14)


@pytest.mark.parametrize("frames", [1, 3, 5, 11, 13])
@torch.no_grad()
def test_tiling_fits_every_stride_and_length(frames: int) -> None:
    """A model that copies frames shows where each frame of a piece goes: strides of 2, pieces of 2 + 2 latents."""
    vae = CausalVAEModel(**TIME_2)
    vae._encode_piece = lambda x: x[:, :1, ::2, ::8, ::8].repeat(1, 12, 1, 1, 1)  # type: ignore[method-assign]
    vae._decode_piece = (
        lambda z: (  # type: ignore[method-assign]
            z[:, :3].repeat_interleave(2, 2)[:, :, 1:].repeat_interleave(8, 3).repeat_interleave(8, 4)
        )
    )
    x = chirp((1, 3, frames, 24, 40), 0.2)
    latents, video = vae.encode_moments(x), vae.decode_latents(vae.encode_moments(x)[:, :6])
    with pytest.warns(UserWarning):
        vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_sample_min_size_t = 16, 5
    vae.tile_latent_min_size, vae.tile_latent_min_size_t = 2, 3
    vae.tile_overlap_factor = 0.5
    assert_near(vae.encode_moments(x), latents, 1e-14)
    assert_near(vae.decode_latents(latents[:, :6]), video, 1e-14)
    vae.disable_tiling()
    assert not vae.use_tiling


@torch.no_grad()
def test_a_tile_is_all_that_the_network_sees() -> None:
    vae, seen = make_vae(**V1_1).float(), []
    vae.decoder.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape[2:])))
    with pytest.warns(UserWarning):
        vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_latent_min_size_t, vae.tile_overlap_factor = 2, 2, 0.5
    assert vae.decode(torch.zeros(1, 4, 5, 3, 2)).sample.shape == (1, 3, 17, 24, 16)
    assert set(seen) == {(3, 2, 2)} and len(seen) == 3 * 2


# Weights on disk, and the wrapper


@pytest.mark.parametrize("form", ["safetensors", "gen_model", "state_dict", "bare"])
@torch.no_grad()
def test_weights_load_in_every_form_they_come_in(form: str, tmp_path: Path) -> None:
    vae = make_vae(**V1_1).float()
    vae.save_pretrained(tmp_path)
    weights = vae.state_dict()
    older = {name: torch.zeros_like(value) for name, value in weights.items()}
    older["decoder.conv_out.conv.bias"] = weights["decoder.conv_out.conv.bias"]
    averages = {f"module.{name}": value for name, value in weights.items() if name != "decoder.conv_out.conv.bias"}
    contents: dict[str, Any] = {
        "gen_model": {"state_dict": {"gen_model": older, "dics_model": {}}, "ema_state_dict": averages, "epoch": 3},
        "state_dict": {"state_dict": weights | {"loss.discriminator.weight": torch.ones(1)}, "ema_state_dict": {}},
        "bare": weights,
    }
    if form != "safetensors":
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(contents[form], tmp_path / "checkpoint.ckpt")
    loaded = CausalVAEModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_a_checkpoint_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    vae = make_vae(**V1_1)
    vae.save_config(tmp_path)
    path = tmp_path / "a.ckpt"
    for content, says in (
        (
            vae.state_dict() | {"encoder.extra": torch.ones(1)},
            "0 weights are missing and 1 too many, encoder.extra first",
        ),
        ({"state_dict": {}}, "weights are missing and 0 too many"),
        ({"epoch": 3}, "holds no weights: it takes a state dict"),
        ({"callback": Path("x")}, "holds more than tensors and plain values"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=says):
            CausalVAEModel.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged"):
        CausalVAEModel.from_pretrained(tmp_path)
    torch.save({}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"has 2 checkpoints, a\.ckpt, b\.ckpt; leave the one"):
        CausalVAEModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_wrapper_scales_latents_and_puts_frames_first() -> None:
    vae = make_vae(**V1_1).float()
    wrapper, x = CausalVAEWrapper(vae), video_of((5, 16, 8)).float()
    posterior = vae.encode(x).latent_dist
    assert_near(wrapper.encode(x, sample_posterior=False), posterior.mode() * 0.18215, 1e-7)
    draw = wrapper.encode(x, torch.Generator().manual_seed(1))
    assert_near(draw, posterior.sample(torch.Generator().manual_seed(1)) * 0.18215, 1e-7)
    z = chirp((1, 4, 2, 2, 1), 0.4).float()
    video = wrapper.decode(z)
    assert video.shape == (1, 5, 3, 16, 8) and video.is_contiguous()
    assert_near(video, vae.decode(z / 0.18215).sample.transpose(1, 2), 1e-6)
    assert (wrapper.strides, wrapper.channels, wrapper.dtype) == ((4, 8, 8), 4, torch.float32)


# Bad input


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"encoder_attention": "LinearAttention"}, "encoder_attention 'LinearAttention' is not a layer here; it takes"),
        ({"q_conv": ""}, "q_conv '' is not a layer here"),
        ({"decoder_temporal_upsample": ["", "", "Up", ""]}, "decoder_temporal_upsample 'Up' is not a layer"),
        ({"encoder_resnet_blocks": ["ResnetBlock3D"]}, "encoder_resnet_blocks has 1 entries for the 4 levels"),
        (
            {"encoder_temporal_downsample": [""] * 4},
            "halves time and space by 1x8x8, the decoder doubles them by 4x8x8",
        ),
        ({"double_z": False}, "double_z must be True"),
        ({"hidden_size": 48}, "32 groups and cannot take 48 channels"),
        ({"norm_type": "batchnorm"}, "norm_type must be"),
    ],
)
def test_bad_configs_are_refused(config: dict[str, Any], says: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=says):
        CausalVAEModel(**V1_1 | config)


def test_bad_input_is_refused() -> None:
    vae = CausalVAEModel(**TIME_2)
    for shape, says in (
        ((1, 3, 4, 8, 8), "x has 4 frames; the VAE takes 2k \\+ 1 of them: 3 or 5 would do"),
        ((1, 3, 3, 12, 8), "x has height 12, not a multiple of 8: 8 or 16 would do"),
    ):
        with pytest.raises(ValueError, match=says):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"z must be \[B, 6, T, H, W\]"):
        vae.decode(torch.zeros(1, 4, 1, 1, 1))
    vae.use_tiling = True
    for attribute, value, says in (
        ("tile_sample_min_size", 20, "tile_sample_min_size must be a multiple of 8"),
        ("tile_sample_min_size_t", 8, "tile_sample_min_size_t 1 more than one of 2, got 512 and 8"),
        ("tile_overlap_factor", 1.0, "a factor from 0 to less than 1"),
        ("tile_overlap_t", 0, "an overlap of 1 or more"),
    ):
        before = getattr(vae, attribute)
        setattr(vae, attribute, value)
        with pytest.raises(ValueError, match=says):
            vae.encode(torch.zeros(1, 3, 3, 8, 8))
        setattr(vae, attribute, before)


@pytest.mark.parametrize("name", ["v1_1", "v1_2", "first"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bfloat16_by_autocast_or_by_weights_is_nearly_float32(name: str, weights: torch.dtype) -> None:
    config, (frames, height, width) = CASES[name]
    torch.manual_seed(0)
    vae = CausalVAEModel(**config).eval()
    x = torch.randn(1, 3, frames, height, width)
    exact = vae.encode_moments(x), vae.decode_latents(torch.ones(1, vae.latent_channels, 3, 2, 2))
    vae.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        ours = (
            vae.encode_moments(x.to(weights)),
            vae.decode_latents(torch.ones(1, vae.latent_channels, 3, 2, 2, dtype=weights)),
        )
    for rounded, whole in zip(ours, exact, strict=True):
        assert float((rounded - whole).norm() / whole.norm()) < 0.05


def test_time_is_halved_by_means_of_three_frames() -> None:
    padded = torch.randn(2, 3, 11, 4, 5, dtype=torch.float64)
    means = torch.stack([padded[:, :, i : i + 3].mean(2) for i in range(0, 9, 2)], dim=2)
    torch.testing.assert_close(halve_time(padded), means)
