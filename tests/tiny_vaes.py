"""A narrow autoencoder for every name of a VAE in the registry, with that name's class, strides and channels."""

from typing import Any

from tdm_fast.models.causalvae import CausalVAEModel
from tdm_fast.models.wfvae import WFVAEModel

CAUSAL: dict[str, Any] = {
    "hidden_size": 32,
    "hidden_size_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "encoder_attention": "AttnBlock3DFix",
    "decoder_attention": "AttnBlock3DFix",
}
CAUSAL_TIME_2 = CAUSAL | {
    "encoder_temporal_downsample": ["", "TimeDownsample2x", "", ""],
    "decoder_temporal_upsample": ["", "", "", "TimeUpsample2x"],
}
WF: dict[str, Any] = {
    "base_channels": 4,
    "encoder_num_resblocks": 1,
    "decoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 6,
    "decoder_energy_flow_hidden_size": 5,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}
WF_TIME_8 = WF | {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}


def wf(latent_dim: int, base: dict[str, Any] = WF) -> dict[str, Any]:
    """A WF-VAE's config with a scale and a shift for each channel."""
    return base | {"latent_dim": latent_dim, "scale": [0.5] * latent_dim, "shift": [0.25] * latent_dim}


VAES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "CausalVAEModel_D4_2x8x8": (CausalVAEModel, CAUSAL_TIME_2),
    "CausalVAEModel_D8_2x8x8": (CausalVAEModel, CAUSAL_TIME_2 | {"embed_dim": 8}),
    "CausalVAEModel_D4_4x8x8": (CausalVAEModel, CAUSAL),
    "CausalVAEModel_D8_4x8x8": (CausalVAEModel, CAUSAL | {"embed_dim": 8}),
    "WFVAEModel_D8_4x8x8": (WFVAEModel, wf(8)),
    "WFVAEModel_D16_4x8x8": (WFVAEModel, wf(16)),
    "WFVAEModel_D32_4x8x8": (WFVAEModel, wf(32)),
    "WFVAEModel_D32_8x8x8": (WFVAEModel, wf(32, WF_TIME_8)),
}
