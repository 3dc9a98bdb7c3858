"""A tiny random network of every family of diffusers' own, its schedule as published, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tdm_fast.models.cogvideox import CogVideoXDenoiser
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.pixart import PixArtDenoiser
from tdm_fast.models.sd3 import SD3Denoiser
from tdm_fast.models.stable_diffusion import StableDiffusionDenoiser
from tdm_fast.models.wan import WanDenoiser
from tdm_fast.schedule import Schedule

CHANNELS = 4
"""Of the latents."""
TEXT_WIDTH = 8
"""Of `encoder_hidden_states`."""
POOLED_WIDTH = {"sdxl": 6, "sd3": 8, "sd35": 8}
"""Of `encoder_2_hidden_states`, for the families that take it."""
TEXT_TOKENS = 6
"""Of a prompt; the only length that CogVideoX takes."""
FRAMES, HEIGHT, WIDTH = 2, 4, 6
"""Of the latents."""

PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 6, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS,
    "num_layers": 2, "cross_attention_dim": 12, "caption_channels": TEXT_WIDTH,
}  # fmt: skip
UNET: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": HEIGHT, "block_out_channels": (4, 8),
    "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": 2,
}  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": HEIGHT, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 16,
    "pooled_projection_dim": POOLED_WIDTH["sd3"], "pos_embed_max_size": 6,
}  # fmt: skip
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "time_embed_dim": 6, "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": WIDTH, "sample_height": HEIGHT,
    "sample_frames": 4 * (FRAMES - 1) + 1, "max_text_seq_length": TEXT_TOKENS,
}  # fmt: skip
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS, "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2,
}  # fmt: skip

CONFIGS: dict[str, tuple[type[Denoiser], type[nn.Module], dict[str, Any]]] = {
    "pixart_alpha": (
        PixArtDenoiser,
        diffusers.PixArtTransformer2DModel,
        PIXART | {"sample_size": 128, "use_additional_conditions": True},
    ),
    "pixart_sigma": (
        PixArtDenoiser,
        diffusers.PixArtTransformer2DModel,
        PIXART | {"sample_size": WIDTH, "use_additional_conditions": False, "interpolation_scale": 2},
    ),
    "sd15": (
        StableDiffusionDenoiser,
        diffusers.UNet2DConditionModel,
        UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "sdxl": (
        StableDiffusionDenoiser,
        diffusers.UNet2DConditionModel,
        UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + POOLED_WIDTH["sdxl"],
        },
    ),
    "sd3": (SD3Denoiser, diffusers.SD3Transformer2DModel, SD3),
    "sd35": (
        SD3Denoiser,
        diffusers.SD3Transformer2DModel,
        SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "cogvideox_2b": (CogVideoXDenoiser, diffusers.CogVideoXTransformer3DModel, COGVIDEOX),
    "cogvideox_5b": (
        CogVideoXDenoiser,
        diffusers.CogVideoXTransformer3DModel,
        COGVIDEOX | {"use_rotary_positional_embeddings": True},
    ),
    "wan": (WanDenoiser, diffusers.WanTransformer3DModel, WAN),
}
FAMILIES = tuple(CONFIGS)
VIDEOS = ("cogvideox_2b", "cogvideox_5b", "wan")


def network(name: str, **options: Any) -> Any:
    """The family's network with every parameter random, and so every output; `options` of its class go first."""
    _, cls, config = CONFIGS[name]
    model = cls(**config | options)
    generator = torch.Generator().manual_seed(FAMILIES.index(name))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            gain = "norm" in path and path.endswith("weight") and parameter.ndim == 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + gain)
    return model.eval()


def scheduler(name: str) -> Any:
    """The scheduler that the family's pipelines are published with."""
    scaled: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    cog = scaled | {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "clip_sample": False, "set_alpha_to_one": True,
    }  # fmt: skip
    wan = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    makers: dict[str, Callable[[], Any]] = {
        "pixart_alpha": diffusers.DPMSolverMultistepScheduler,
        "pixart_sigma": diffusers.DPMSolverMultistepScheduler,
        "sd15": lambda: diffusers.PNDMScheduler(**scaled, skip_prk_steps=True, steps_offset=1),
        "sdxl": lambda: diffusers.EulerDiscreteScheduler(**scaled, steps_offset=1, timestep_spacing="leading"),
        "sd3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "sd35": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "cogvideox_2b": lambda: diffusers.CogVideoXDDIMScheduler(**cog, snr_shift_scale=3.0),
        "cogvideox_5b": lambda: diffusers.CogVideoXDDIMScheduler(**cog, snr_shift_scale=1.0),
        "wan": lambda: diffusers.UniPCMultistepScheduler(**wan),
    }
    return makers[name]()


def schedule(name: str) -> Schedule:
    return Schedule.from_scheduler(scheduler(name))


def denoiser(name: str, **options: Any) -> Denoiser:
    return CONFIGS[name][0](network(name, **options), schedule(name))


def latent_shape(name: str) -> tuple[int, ...]:
    """`(C, H, W)`, or `(C, T, H, W)` for videos."""
    return (CHANNELS, FRAMES, HEIGHT, WIDTH) if name in VIDEOS else (CHANNELS, HEIGHT, WIDTH)


def conditioning(name: str, batch: int, seed: int = 0) -> Conditioning:
    """Text of TEXT_TOKENS tokens, and the pooled embedding where the family takes one; no mask."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)}
    if name in POOLED_WIDTH:
        tensors["encoder_2_hidden_states"] = torch.randn(batch, 1, POOLED_WIDTH[name], generator=generator)
    return Conditioning(tensors)


def example(name: str, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, table indices and conditioning of a batch."""
    generator = torch.Generator().manual_seed(seed + 1)
    latents = torch.randn(batch, *latent_shape(name), generator=generator)
    return latents, torch.randint(20, 980, (batch,), generator=generator), conditioning(name, batch, seed)
