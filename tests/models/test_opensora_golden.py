"""Weights trained with the public Open-Sora Plan code give its outputs here.

data/opensora_golden.safetensors holds what the public code computed for CASES; make_opensora_golden.py regenerates it.
Weights and inputs follow a formula, so that only outputs are stored.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tdm_fast.models.opensora import OpenSoraT2V_v1_3

GOLDEN_FILE = Path(__file__).parent / "data" / "opensora_golden.safetensors"
BATCH, TEXT_LENGTH = 2, 5
BASE: dict[str, Any] = {
    "num_layers": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 2,
    "patch_size_t": 1,
    "caption_channels": 10,
    "cross_attention_dim": 24,
    "activation_fn": "gelu-approximate",
    "sparse1d": True,
    "sparse_n": 4,
}
OTHER_OPTIONS = {
    "activation_fn": "geglu",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "attention_bias": False,
    "out_channels": 16,
    "interpolation_scale_t": 1.5,
    "interpolation_scale_h": 2.0,
    "interpolation_scale_w": 0.5,
}
# name: (constructor arguments, latent size T, H, W, masked). Lengths of the axes differ where scales do: the public
# code's cache forgets the scale. Its masks exist for sparse_n 1 and 4 only.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int], bool]] = {
    "skiparse": (BASE, (4, 8, 4), False),
    "padding": (BASE, (3, 8, 6), False),
    "odd_size_masks": (BASE, (3, 9, 7), True),
    "dense": (BASE | {"sparse1d": False, "sparse_n": 1}, (2, 6, 4), True),
    "other_options": (BASE | OTHER_OPTIONS, (2, 6, 8), False),
}


def chirp(shape: tuple[int, ...], phase: float) -> Tensor:
    """Numbers of mean square 1 without visible structure, the same on every machine; float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2.0) * torch.sin(0.618 * index * index + phase)).float().view(shape)


@torch.no_grad()
def set_weights(model: nn.Module) -> None:
    """Matrices with gain 1.5, biases and modulation tables of size 0.4, norm weights around 1."""
    for number, (name, weight) in enumerate(sorted(model.named_parameters())):
        is_norm = ".norm" in name and name.endswith("weight")
        matrix = weight.ndim > 1 and "table" not in name
        size = 1.5 / math.sqrt(weight[0].numel()) if matrix else 0.4
        weight.copy_(chirp(tuple(weight.shape), float(number)) * size + is_norm)


def inputs(config: dict[str, Any], size: tuple[int, int, int], masked: bool) -> dict[str, Tensor]:
    """A call's arguments, with masks as the public code wants them: always there."""
    attention_mask, text_mask = torch.ones(BATCH, *size), torch.ones(BATCH, 1, TEXT_LENGTH)
    if masked:
        attention_mask[0, :, 5:] = 0
        attention_mask[1, -1] = 0
        text_mask[0, :, 3:] = 0
        text_mask[1, :, 1] = 0
    return {
        "hidden_states": chirp((BATCH, config["in_channels"], *size), 0.1),
        "timestep": torch.tensor([12.25, 801.0]),
        "encoder_hidden_states": chirp((BATCH, 1, TEXT_LENGTH, config["caption_channels"]), 0.2),
        "attention_mask": attention_mask,
        "encoder_attention_mask": text_mask,
    }


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_the_original_ones(name: str) -> None:
    """In float64 and in float32: what the public code computed is float32 itself, up to 2.2e-5 off these formulas."""
    config, size, masked = CASES[name]
    model = OpenSoraT2V_v1_3(**config)
    set_weights(model)
    arguments = inputs(config, size, masked)
    keep = arguments["attention_mask"][..., : size[1] // 2 * 2, : size[2] // 2 * 2]
    if not masked:
        arguments |= {"attention_mask": None, "encoder_attention_mask": None}
    expected = load_file(GOLDEN_FILE)[name]
    output = model(**arguments).sample
    double = {key: None if value is None else value.double() for key, value in arguments.items()}
    exact = model.double()(**double).sample
    assert output.shape == expected.shape
    # Masked positions are outside the promise: what the original computes there depends on its padding.
    pooled = nn.functional.max_pool2d(keep, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    for mine, wanted in ((exact, expected), (output, exact)):
        error = (mine - wanted).abs() * pooled.unsqueeze(1)
        assert error.max() <= 3e-5 * expected.abs().max()


@torch.no_grad()
def test_the_golden_numbers_tell_sparse_from_dense() -> None:
    """The comparison above could not fail if attention hardly mattered for these weights."""
    config, size, masked = CASES["skiparse"]
    dense = OpenSoraT2V_v1_3(**config | {"sparse1d": False})
    set_weights(dense)
    expected = load_file(GOLDEN_FILE)["skiparse"]
    output = dense(**inputs(config, size, masked)).sample
    assert (output - expected).abs().max() > 1e-2 * expected.abs().max()
