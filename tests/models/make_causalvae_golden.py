"""Compute data/causalvae_golden.safetensors with the public Open-Sora Plan code (v1.3).

    python tests/models/make_causalvae_golden.py PATH_OF_AN_OPEN_SORA_PLAN_CHECKOUT

Needs torch, diffusers and einops. Only the VAE's modules of the checkout are imported, no __init__ files.
Computed in float64, kept in float32.
"""

import argparse
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_causalvae import CASES, GOLDEN_FILE, TILED, TILES, sample_of, set_weights, video_of

PACKAGES = ("", ".models", ".models.causalvideovae", ".models.causalvideovae.model", ".models.causalvideovae.model.vae")


def import_original(checkout: Path) -> type[torch.nn.Module]:
    """The public model's class."""
    for name in PACKAGES:
        package = types.ModuleType("opensora" + name)
        package.__path__ = [str(checkout.joinpath("opensora", *name.split(".")[1:]))]
        sys.modules[package.__name__] = package
    from opensora.models.causalvideovae.model.vae.modeling_causalvae import CausalVAEModel

    return CausalVAEModel


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    original = import_original(parser.parse_args().checkout)
    outputs = {}
    for name in (*CASES, "tiled"):
        config, size = TILED if name == "tiled" else CASES[name]
        model = original(**config).double().eval()
        set_weights(model)
        if name == "tiled":
            model.enable_tiling()
            for attribute, value in TILES.items():
                setattr(model, attribute, value)
        posterior = model.encode(video_of(size))
        outputs[f"{name}.moments"] = posterior.parameters.float().contiguous()
        outputs[f"{name}.decoded"] = sample_of(model.decode(posterior.mode())).float().contiguous()
        for key in (f"{name}.moments", f"{name}.decoded"):
            print(f"{key}: {tuple(outputs[key].shape)}, deviation {outputs[key].std():.3f}")
    save_file(outputs, GOLDEN_FILE)


if __name__ == "__main__":
    main()
