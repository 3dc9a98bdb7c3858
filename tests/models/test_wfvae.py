"""WF-VAE: keys, golden values of the public model, tiling, independence, checkpointing, bad input."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tdm_fast.models.autoencoder import VideoGaussian
from tdm_fast.models.vae import WFVAEWrapper
from tdm_fast.models.wfvae import WFVAEModel

DATA = Path(__file__).parent / "data"
# The constant of the state dict: 0.3536 in single precision.
HAAR = float(torch.tensor(0.3536))
NARROW = {
    "latent_dim": 4,
    "base_channels": 4,
    "encoder_num_resblocks": 1,
    "decoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 6,
    "decoder_energy_flow_hidden_size": 5,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
    "scale": [0.5, 1.0, 2.0, 4.0],
    "shift": [0.0, 0.25, -0.5, 1.0],
}
GROUPNORM = NARROW | {
    "base_channels": 32,
    "encoder_energy_flow_hidden_size": 32,
    "decoder_energy_flow_hidden_size": 32,
    "norm_type": "groupnorm",
}
TIME_8 = {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}


def make_vae(seed: int = 0, **config: object) -> WFVAEModel:
    torch.manual_seed(seed)
    return WFVAEModel(**(NARROW | config)).double().eval()


def make_video(frames: int, height: int = 16, width: int = 8, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def make_latents(frames: int, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 4, frames, height, width, generator=generator, dtype=torch.float64)


def encode(vae: WFVAEModel, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.parameters


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# State dict


def test_default_keys_are_the_public_ones() -> None:
    facts = json.loads((DATA / "wfvae_default_keys.json").read_text())
    with torch.device("meta"):
        vae = WFVAEModel()
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == facts["shapes"]
    assert sum(parameter.numel() for parameter in vae.parameters()) == facts["parameters"]


def test_layernorm_keys_have_one_more_level() -> None:
    with torch.device("meta"):
        keys = set(WFVAEModel(norm_type="layernorm").state_dict())
    assert {"encoder.norm_out.norm.weight", "decoder.mid.1.norm.norm.bias"} <= keys
    assert "encoder.norm_out.weight" not in keys


def test_filters_are_constant_and_not_trained() -> None:
    vae = make_vae().float()
    filters = {key: value for key, value in vae.state_dict().items() if "wavelet_transform" in key}
    assert len(filters) == 8 + 4 + 8 + 8 + 4 + 8
    for key, value in filters.items():
        assert value.abs().unique().tolist() == pytest.approx([0.5 if value.ndim == 4 else HAAR], abs=1e-9), key
    assert not any(p.requires_grad for name, p in vae.named_parameters() if "wavelet" in name)


# Golden values: inputs and outputs of the public implementation, run in float64 with the weights of `fill`.


def fill(vae: WFVAEModel) -> None:
    """Weights that anybody can make again: sines of the flat index, scaled by the fan-in; wavelets stay as they are."""
    for i, (key, value) in enumerate(vae.state_dict().items()):
        if "wavelet_transform" in key:
            continue
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 12.9898 + i).view(value.shape)
        if value.ndim > 1:
            wave = wave * math.sqrt(2 * value.shape[0] / value.numel())
        else:
            wave = 0.1 * wave + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
        value.copy_(wave)


@pytest.mark.parametrize("case", ["layernorm_trilinear", "layernorm_nearest", "groupnorm_trilinear", "time_8"])
def test_outputs_are_those_of_the_public_model(case: str) -> None:
    golden = load_file(DATA / "wfvae_golden.safetensors")
    with safe_open(DATA / "wfvae_golden.safetensors", "pt") as file:
        config = json.loads(file.metadata()[case])
    vae = WFVAEModel(**config).double().eval()
    fill(vae)
    with torch.no_grad():
        x = golden[f"{case}.video"].double()
        assert_close(encode(vae, x), golden[f"{case}.moments"], 1e-11)
        z = golden[f"{case}.moments"].chunk(2, dim=1)[0]
        assert_close(vae.decode(z).sample, golden[f"{case}.decoded"], 1e-11)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vae.enable_tiling()
        assert_close(encode(vae, x), golden[f"{case}.moments_tiled"], 1e-11)
        if f"{case}.decoded_tiled" in golden:
            assert_close(vae.decode(z).sample, golden[f"{case}.decoded_tiled"].double(), 1e-6)


# Temporal tiling


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 33])
def test_tiled_equals_untiled(mode: str, frames: int) -> None:
    vae, x = make_vae(t_interpolation=mode, connect_res_layer_num=2), make_video(frames)
    with torch.no_grad():
        moments = encode(vae, x)
        decoded = vae.decode(moments[:, :4]).sample
        vae.enable_tiling()
        assert_close(encode(vae, x), moments)
        assert_close(vae.decode(moments[:, :4]).sample, decoded)
    assert decoded.shape == x.shape


@pytest.mark.parametrize("latents", [2, 3, 8, 24])
@pytest.mark.parametrize("tile", [1, 2, 3])
def test_tiled_decode_equals_untiled_for_any_count(latents: int, tile: int) -> None:
    vae, z = make_vae(), make_latents(latents, 1, 1)
    with torch.no_grad():
        decoded = vae.decode(z).sample
        vae.enable_tiling()
        vae.tile_latents = tile
        assert_close(vae.decode(z).sample, decoded)
    assert decoded.shape[2] == 4 * (latents - 1) + 1


@pytest.mark.parametrize("frames", [1, 9, 17, 25])
def test_temporal_stride_8(frames: int) -> None:
    vae, x = make_vae(**TIME_8), make_video(frames)
    with torch.no_grad():
        moments = encode(vae, x)
        decoded = vae.decode(moments[:, :4]).sample
        vae.enable_tiling()
        assert_close(encode(vae, x), moments)
        assert_close(vae.decode(moments[:, :4]).sample, decoded)
    assert moments.shape[2] == (frames - 1) // 8 + 1
    assert decoded.shape == x.shape


def test_tiling_can_be_switched_off_and_videos_do_not_mix() -> None:
    vae, first, second = make_vae(), make_video(9, seed=1), make_video(9, seed=2)
    calls = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = encode(vae, second)
        assert len(calls) == 1
        vae.enable_tiling()
        encode(vae, first)  # leaves nothing behind for the next video
        assert_close(encode(vae, second), expected)
        assert len(calls) == 1 + 2 + 2
        vae.disable_tiling()
        assert torch.equal(encode(vae, second), expected)
    assert len(calls) == 6


def test_gradients_flow_through_tiles() -> None:
    vae, z = make_vae(), make_latents(4)
    grads = []
    for tiling in (False, True):
        vae.enable_tiling(tiling)
        leaf = z.clone().requires_grad_()
        vae.decode(leaf).sample.square().sum().backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], 1e-10)


def test_tiling_warns_with_groupnorm_only() -> None:
    with torch.device("meta"):
        groupnorm, layernorm = WFVAEModel(**GROUPNORM), WFVAEModel(**NARROW)
    with pytest.warns(UserWarning, match="groupnorm.*differ"):
        groupnorm.enable_tiling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layernorm.enable_tiling()
        groupnorm.enable_tiling(False)


# Independence


@pytest.mark.parametrize("config", [NARROW, GROUPNORM], ids=["layernorm", "groupnorm"])
def test_output_does_not_depend_on_the_batch(config: dict[str, object]) -> None:
    vae, x = make_vae(**config), make_video(5, 8, 8, batch=3)
    with torch.no_grad():
        moments = encode(vae, x)
        decoded = vae.decode(moments[:, :4]).sample
        for i in (0, 2):
            assert_close(encode(vae, x[i : i + 1]), moments[i : i + 1])
            assert_close(vae.decode(moments[i : i + 1, :4]).sample, decoded[i : i + 1])


def test_latents_do_not_see_the_future() -> None:
    vae, x = make_vae(), make_video(13)
    poisoned = x.clone()
    poisoned[:, :, 6:] = math.nan
    with torch.no_grad():
        moments, partly = encode(vae, x), encode(vae, poisoned)
    # Latent k holds frames 4k - 3 to 4k.
    assert_close(partly[:, :, :2], moments[:, :, :2])
    assert partly[:, :, 2:].isnan().any()


# Saving, checkpointing, the posterior


@pytest.mark.parametrize("low_memory", [True, False])
def test_save_and_load(tmp_path: Path, low_memory: bool) -> None:
    vae, x = make_vae().float(), make_video(5).float()
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = WFVAEModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    assert again.config.base_channels == 4
    assert list(again.config.scale) == NARROW["scale"]
    with torch.no_grad():
        assert torch.equal(encode(again, x), encode(vae, x))
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in vae.named_parameters() if parameter.requires_grad}


def test_checkpointing_gives_the_same_gradients() -> None:
    x, grads, recomputed = make_video(5), [], []

    def recompute(layer: Callable[..., Tensor], *args: object) -> Tensor:
        recomputed.append(layer)
        return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)

    for checkpointing in (False, True):
        vae = make_vae().train()
        if checkpointing:
            vae.enable_gradient_checkpointing(recompute)
        decoded, posterior = vae(x, sample_posterior=False)
        (decoded.square().mean() + posterior.kl().mean()).backward()
        grads.append({name: p.grad for name, p in vae.named_parameters() if p.requires_grad})
    assert len(recomputed) == sum(len(chain) for chain in vae.modules() if isinstance(chain, torch.nn.ModuleList))
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert_close(grads[1][name], grad)


def test_default_checkpointing_function_works() -> None:
    vae = make_vae()
    vae.enable_gradient_checkpointing()
    leaf = make_latents(2).requires_grad_()
    vae.decode(leaf).sample.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_posterior() -> None:
    vae, x = make_vae(), make_video(5)
    output = vae.encode(x)
    assert isinstance(output, AutoencoderKLOutput)
    posterior = output.latent_dist
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), posterior.mode())
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert VideoGaussian(torch.full((1, 2, 1, 1, 1), 99.0)).logvar.item() == 20
    assert VideoGaussian(torch.full((1, 2, 1, 1, 1), -99.0)).logvar.item() == -30


def test_kl_sums_over_a_video() -> None:
    p, q = (VideoGaussian(make_video(3, 4, 5, batch=4, seed=seed).repeat(1, 2, 1, 1, 1)) for seed in (1, 2))
    normal = [torch.distributions.Normal(d.mean, d.std) for d in (p, q)]
    unit = torch.distributions.Normal(torch.zeros_like(p.mean), 1.0)
    divergence = torch.distributions.kl_divergence
    assert_close(p.kl(), divergence(normal[0], unit).flatten(1).sum(1))
    assert_close(p.kl(q), divergence(*normal).flatten(1).sum(1))


# The wrapper


def test_wrapper_scales_per_channel() -> None:
    wrapper, x = WFVAEWrapper(make_vae()), make_video(5, batch=2)
    with torch.no_grad():
        mean = wrapper.vae.encode(x).latent_dist.mode()
        z = wrapper.encode(x, sample_posterior=False)
        for channel in range(4):
            expected = (mean[:, channel] - NARROW["shift"][channel]) * NARROW["scale"][channel]
            assert_close(z[:, channel], expected)
        video = wrapper.decode(z)
        assert video.shape == (2, 5, 3, 16, 8)
        assert video.is_contiguous()
        assert_close(video, wrapper.vae.decode(mean).sample.transpose(1, 2))
        drawn = [wrapper.encode(x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert set(wrapper.state_dict()) == {f"vae.{key}" for key in wrapper.vae.state_dict()}


def test_wrapper_loads_a_folder(tmp_path: Path) -> None:
    vae = make_vae().float()
    vae.save_pretrained(tmp_path / "vae")
    wrapper = WFVAEWrapper.from_pretrained(tmp_path, subfolder="vae")
    x = make_video(1).float()
    with torch.no_grad():
        assert torch.equal(wrapper.encode(x, sample_posterior=False), WFVAEWrapper(vae).encode(x, None, False))
    assert wrapper.dtype == torch.float32
    assert wrapper.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0] * 8}, "config.scale has 8 numbers, the VAE 4"),
        ({"shift": [1.0] * 3}, "config.shift has 3 numbers, the VAE 4"),
        ({"scale": [1.0, 0.0, 1.0, 1.0]}, "must not hold a 0"),
    ],
)
def test_wrapper_refuses_wrong_scales(change: dict[str, object], message: str) -> None:
    with torch.device("meta"):
        vae = WFVAEModel(**(NARROW | change))
    with pytest.raises(ValueError, match=message):
        WFVAEWrapper(vae)


# Bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), r"16 frames.*4k \+ 1.*13 or 17"),
        ((1, 3, 3, 16, 16), "3 frames.*1 or 5"),
        ((1, 3, 0, 16, 16), "0 frames.*1 would do"),
        ((1, 3, 5, 20, 16), "height 20.*16 or 24"),
        ((1, 3, 5, 16, 4), "width 4.*: 8 would do"),
        ((1, 4, 5, 16, 16), r"\[B, 3, T, H, W\], got \[1, 4, 5, 16, 16\]"),
        ((3, 5, 16, 16), r"\[B, 3, T, H, W\]"),
    ],
)
def test_encode_refuses_sizes(shape: tuple[int, ...], message: str) -> None:
    with torch.device("meta"):
        vae = WFVAEModel(**NARROW)
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_other_bad_inputs() -> None:
    with torch.device("meta"):
        vae = WFVAEModel(**NARROW)
        slow = WFVAEModel(**NARROW, **TIME_8)
    with pytest.raises(ValueError, match=r"13 frames.*8k \+ 1.*9 or 17"):
        slow.encode(torch.zeros(1, 3, 13, 8, 8))
    with pytest.raises(ValueError, match=r"floating-point.*uint8"):
        vae.encode(torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8))
    for shape in ((1, 8, 2, 1, 1), (4, 2, 1, 1), (1, 4, 0, 1, 1)):
        with pytest.raises(ValueError, match=r"z must be \[B, 4, T, H, W\]"):
            vae.decode(torch.zeros(shape))
    vae.enable_tiling()
    vae.tile_frames, vae.tile_latents = 6, 0
    with pytest.raises(ValueError, match="tile_frames must be a multiple of 4, got 6"):
        vae.encode(torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="tile_latents must be 1 or more, got 0"):
        vae.decode(torch.zeros(1, 4, 2, 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "batchnorm"}, "'groupnorm' or 'layernorm', got 'batchnorm'"),
        ({"norm_type": "groupnorm"}, "32 groups and cannot take 4 channels"),
        ({"t_interpolation": "linear"}, "'nearest' or 'trilinear', got 'linear'"),
        ({"attention_type": "AttnBlock3D"}, "attention_type must be 'AttnBlock3DFix'"),
        ({"l1_dowmsample_block": "AvgPool"}, "l1_dowmsample_block 'AvgPool'.*'Downsample' with"),
        ({"l1_upsample_wavelet": "InverseHaarWaveletTransform3D"}, "l1_upsample_block 'Upsample' with wavelet"),
        ({"l2_dowmsample_block": "Downsample", "l2_downsample_wavelet": "HaarWaveletTransform2D"}, "l2_dowmsample"),
        ({"l2_upsample_block": "Upsample", "l2_upsample_wavelet": "InverseHaarWaveletTransform2D"}, "l2_upsample"),
        ({key: TIME_8[key] for key in ("l1_dowmsample_block", "l1_downsample_wavelet")}, "do not belong together"),
    ],
)
def test_constructor_refuses(change: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        WFVAEModel(**(NARROW | change))
