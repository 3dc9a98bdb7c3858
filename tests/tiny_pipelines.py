"""A folder of every family of diffusers' own: the tiny network of `tiny_networks`, tiny encoders and VAE around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_networks import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, network, scheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tdm_fast.text import word_tokenizer

PROMPTS = ["a red circle", "a blue square moving left", "red"]
WORDS = ["a", "red", "blue", "circle", "square", "moving", "left"]
CLIP_TOKENS = 6
PIPELINES = {
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3Pipeline",
    "cogvideox_2b": "CogVideoXPipeline",
    "cogvideox_5b": "CogVideoXPipeline",
    "wan": "WanPipeline",
}
SD3 = ("sd3", "sd35")
SIZES = {"cogvideox_2b": (9, 32, 48), "cogvideox_5b": (9, 32, 48), "wan": (5, 32, 48)}
"""Frames, height and width that a test samples; images are 32 x 48."""


def size(name: str) -> tuple[int, int, int]:
    return SIZES.get(name, (1, 32, 48))


def _tokenizer(length: int) -> Any:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = length
    return tokenizer


def _clip(width: int, projection: int | None = None) -> Any:
    cls = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokens = {"vocab_size": 10, "max_position_embeddings": CLIP_TOKENS, "bos_token_id": 2, "pad_token_id": 0}
    return cls(CLIPTextConfig(**sizes, **tokens, eos_token_id=1, projection_dim=projection or 8)).eval()


def _t5(config: Any, model: Any) -> Any:
    sizes = {"vocab_size": 10, "d_model": TEXT_WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return model(config(**sizes, dropout_rate=0.0)).eval()


def _vae(name: str) -> Any:
    if name.startswith("cogvideox"):
        return diffusers.AutoencoderKLCogVideoX(
            latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
            scaling_factor=1.15 if name.endswith("2b") else 0.7,
        )  # fmt: skip
    if name == "wan":
        means, deviations = [0.1 * i for i in range(CHANNELS)], [1 + 0.1 * i for i in range(CHANNELS)]
        return diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=CHANNELS, num_res_blocks=1, latents_mean=means, latents_std=deviations
        )
    return diffusers.AutoencoderKL(
        latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.06 if name in SD3 else None, scaling_factor=1.5 if name in SD3 else 0.18,
    )  # fmt: skip


def _texts(name: str) -> dict[str, Any]:
    if name == "sd15":
        return {"text_encoder": _clip(TEXT_WIDTH), "tokenizer": _tokenizer(CLIP_TOKENS)}
    if name == "sdxl":
        return {
            "text_encoder": _clip(2), "tokenizer": _tokenizer(CLIP_TOKENS),
            "text_encoder_2": _clip(TEXT_WIDTH - 2, POOLED_WIDTH[name]), "tokenizer_2": _tokenizer(CLIP_TOKENS),
        }  # fmt: skip
    if name in SD3:
        half = POOLED_WIDTH[name] // 2
        return {
            "text_encoder": _clip(2, half), "tokenizer": _tokenizer(CLIP_TOKENS),
            "text_encoder_2": _clip(4, half), "tokenizer_2": _tokenizer(CLIP_TOKENS),
            "text_encoder_3": _t5(T5Config, T5EncoderModel), "tokenizer_3": _tokenizer(512),
        }  # fmt: skip
    encoder = _t5(UMT5Config, UMT5EncoderModel) if name == "wan" else _t5(T5Config, T5EncoderModel)
    return {"text_encoder": encoder, "tokenizer": _tokenizer(512)}


def pipeline(name: str, **options: Any) -> Any:
    """diffusers' own pipeline around parts of random weights; `options` are further arguments of its class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {"vae": _vae(name).eval(), **_texts(name), "scheduler": scheduler(name)}
    if name == "sd15":
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts["unet" if name.startswith("sd") and name not in SD3 else "transformer"] = network(name)
    return getattr(diffusers, PIPELINES[name])(**parts, **options)


def build(name: str, folder: Path, **options: Any) -> Path:
    """That pipeline saved to a folder."""
    pipeline(name, **options).save_pretrained(folder)
    return folder
