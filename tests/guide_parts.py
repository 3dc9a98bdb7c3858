"""Open-Sora Plan's parts as its users have them, each in a folder of its own, of random weights and tiny."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_encoders import clip_folder, t5_folder

NAME = "OpenSoraT2V_v1_3_93x640x640"
# 5 frames of 32 × 32, latents [8, 2, 4, 4].
SIZE = {"num_frames": 5, "max_height": 32, "max_width": 32}


def build_parts(folder: Path) -> Path:
    """`transformer`, `vae`, `t5` and `clip` in a folder; the transformer has 2 layers and the public class's config."""
    from tdm_fast.models import OpenSoraT2V_v1_3, WFVAEModel

    torch.manual_seed(0)
    transformer = OpenSoraT2V_v1_3(
        num_layers=2, attention_head_dim=6, num_attention_heads=2, cross_attention_dim=12, caption_channels=8,
        in_channels=8, out_channels=8, patch_size_t=1, patch_size=2, sparse1d=True, sparse_n=2,
        sample_size_t=2, sample_size_h=4, sample_size_w=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.1)  # which starts at zero, and would teach nothing
    transformer.save_pretrained(folder / "transformer")
    WFVAEModel(
        latent_dim=8, base_channels=4, encoder_num_resblocks=1, encoder_energy_flow_hidden_size=4,
        decoder_num_resblocks=1, decoder_energy_flow_hidden_size=4, norm_type="layernorm",
    ).save_pretrained(folder / "vae")  # fmt: skip
    t5_folder(folder / "t5")
    clip_folder(folder / "clip")
    return folder


def guide_flags(parts: Path, **changed: object) -> list[str]:
    """The guide's command, with folders in place of hub names; `changed` flags, None leaves one out."""
    flags: dict[str, object] = {
        "ae": "WFVAEModel_D8_4x8x8", "ae_path": parts / "vae", "model": NAME, "model_path": parts / "transformer",
        "text_encoder_name_1": parts / "t5", "text_encoder_name_2": parts / "clip", **SIZE, "total_steps": 900,
        "cfg": 4.5,
    }  # fmt: skip
    given = [
        word for name, value in (flags | changed).items() if value is not None for word in (f"--{name}", str(value))
    ]
    return [*given, "--use_huber", "--use_separate"]


def edit_json(path: Path, **values: object) -> None:
    """Change some values of a JSON file; None drops one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
