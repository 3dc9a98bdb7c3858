"""Compute data/opensora_golden.safetensors with the public Open-Sora Plan code (v1.3).

    python tests/models/make_opensora_golden.py PATH_OF_AN_OPEN_SORA_PLAN_CHECKOUT

Needs torch, diffusers and einops. The checkout's own pins are not needed: of its packages only the model's modules are
imported, and the attention-kernel switch that a CPU does not have is replaced.
"""

import argparse
import contextlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_opensora_golden import CASES, GOLDEN_FILE, inputs, set_weights


def import_original(checkout: Path) -> type[torch.nn.Module]:
    """The public model's class, without running its packages' __init__ files."""
    for name in ("", ".models", ".models.diffusion", ".models.diffusion.opensora_v1_3", ".utils"):
        package = types.ModuleType("opensora" + name)
        package.__path__ = [str(checkout.joinpath("opensora", *name.split(".")[1:]))]
        sys.modules[package.__name__] = package
    helpers = types.ModuleType("opensora.utils.utils")
    helpers.to_2tuple = None  # imported by name, never called
    sys.modules[helpers.__name__] = helpers
    torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()
    from opensora.models.diffusion.opensora_v1_3.modeling_opensora import OpenSoraT2V_v1_3

    return OpenSoraT2V_v1_3


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    original = import_original(parser.parse_args().checkout)
    outputs = {}
    for name, (config, size, masked) in CASES.items():
        model = original(**config)
        set_weights(model)
        outputs[name] = model(**inputs(config, size, masked)).sample.contiguous()
        print(f"{name}: {tuple(outputs[name].shape)}, deviation {outputs[name].std():.3f}")
    save_file(outputs, GOLDEN_FILE)


if __name__ == "__main__":
    main()
