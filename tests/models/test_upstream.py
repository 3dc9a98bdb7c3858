"""The package `opensora`: its registries and models, from a small fake one, and what is said when it is not there."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from tdm_fast.models import registry, upstream
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.schedule import Schedule

SMALL: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 12,
    "cross_attention_dim": 12,
    "caption_channels": 6,
}
# Its transformer is ours, under its name and without our arguments; like the original it takes no None for a mask and
# switches to one attention kernel.
FAKE = {
    "__init__.py": "",
    "models/__init__.py": "",
    "models/diffusion/__init__.py": """
import torch
from tdm_fast.models.opensora import OpenSoraT2V_v1_3 as Ours

class OpenSoraT2V_v1_3(Ours):
    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask, encoder_attention_mask,
                return_dict=True):
        assert attention_mask.shape == (hidden_states.shape[0], *hidden_states.shape[2:])
        assert encoder_attention_mask.shape == encoder_hidden_states.shape[:3]
        with torch.backends.cuda.sdp_kernel(enable_math=False, enable_flash=False, enable_mem_efficient=True):
            return super().forward(hidden_states, timestep, encoder_hidden_states, attention_mask=attention_mask,
                                   encoder_attention_mask=encoder_attention_mask, return_dict=return_dict)

Diffusion_models_class = {"OpenSoraT2V_v1_3-2B/122": OpenSoraT2V_v1_3, "OpenSoraT2V_v1_3": OpenSoraT2V_v1_3}
Diffusion_models = {"OpenSoraT2V_v1_3-2B/122": OpenSoraT2V_v1_3}
""",
    "models/causalvideovae/__init__.py": """
from torch import nn

class WFVAEModelWrapper(nn.Module):
    pass

ae_wrapper = {"WFVAEModel_D8_4x8x8": WFVAEModelWrapper}
ae_stride_config = {"WFVAEModel_D8_4x8x8": [4, 8, 8]}
ae_channel_config = {"WFVAEModel_D8_4x8x8": 8}
ae_norm = {"WFVAEModel_D8_4x8x8": lambda x: 2 * x - 1}
ae_denorm = {"WFVAEModel_D8_4x8x8": lambda x: (x + 1) / 2}
""",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake package's folder, importable for one test."""
    folder = tmp_path / "path" / "opensora"
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    # Put back what loading its transformer replaces.
    monkeypatch.setattr(torch.backends.cuda, "sdp_kernel", torch.backends.cuda.sdp_kernel)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def denoise(model: torch.nn.Module, *, masked: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 8, 2, 4, 6, generator=generator)
    tensors = {"encoder_hidden_states": torch.randn(2, 5, 6, generator=generator)}
    if masked:
        tensors["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        denoiser = OpenSoraDenoiser(model.eval(), Schedule.from_scheduler(DDPMScheduler()))
        return denoiser(x_t, torch.tensor([3, 700]), Conditioning(tensors))


def test_its_registries_are_found(package: Path) -> None:
    assert upstream.is_importable()
    tables = upstream.registries()
    assert list(tables.Diffusion_models) == ["OpenSoraT2V_v1_3-2B/122"] and "OpenSoraT2V_v1_3" in tables[1]
    assert tables.ae_stride_config == {"WFVAEModel_D8_4x8x8": [4, 8, 8]}
    assert Path(sys.modules[upstream.DIFFUSION].__file__ or "").is_relative_to(package)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("package")
def test_its_transformer_runs_in_our_denoiser(masked: bool, tmp_path: Path) -> None:
    ours = registry.build("OpenSoraT2V_v1_3_5x32x48", **SMALL)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3, generator=generator)
    ours.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    theirs = upstream.load_transformer(tmp_path, "OpenSoraT2V_v1_3_5x32x48")
    assert type(theirs).__module__ == upstream.DIFFUSION
    # A trainer's three networks are copies of it.
    expected = denoise(ours, masked=masked)
    for model in (theirs, copy.deepcopy(theirs)):
        torch.testing.assert_close(denoise(model, masked=masked), expected, rtol=0, atol=1e-6)
    assert (expected - denoise(ours, masked=not masked)).abs().max() > 1e-5


@pytest.mark.usefixtures("package")
def test_lists_of_two_encoders_get_two_masks() -> None:
    states = [torch.zeros(2, 1, 5, 6), torch.zeros(2, 1, 3, 4)]
    own = torch.zeros(2, 1, 3)
    for given, second in ((None, torch.ones(2, 1, 3)), ([None, own], own)):
        _, keywords = upstream._fill_masks(
            torch.nn.Identity(),
            (torch.zeros(2, 8, 3, 4, 6), torch.zeros(2), states),
            {"attention_mask": None, "encoder_attention_mask": given, "return_dict": False},
        )
        assert keywords["attention_mask"].equal(torch.ones(2, 3, 4, 6)) and keywords["return_dict"] is False
        assert keywords["encoder_attention_mask"][0].equal(torch.ones(2, 1, 5))
        assert keywords["encoder_attention_mask"][1].equal(second)


@pytest.mark.usefixtures("package")
def test_its_transformer_is_built_as_ours_is() -> None:
    model: Any = upstream.build("OpenSoraT2V_v1_3_5x32x48", **SMALL)
    assert type(model).__module__ == upstream.DIFFUSION
    assert (model.config.sample_size_t, model.config.sample_size_w, model.config.patch_size) == (2, 6, 2)
    with pytest.raises(ValueError, match="--unify"):
        model(torch.zeros(1, 8, 2, 4, 6), torch.zeros(1), torch.zeros(1, 1, 5, 6), added_time_embedding=0)


def test_names_that_it_lacks_are_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the package opensora has no OpenSoraT2V_v1_5; it has OpenSoraT2V_v1_3-2B/122"
    ):
        upstream.load_transformer(tmp_path, "OpenSoraT2V_v1_5")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no OpenSoraT2V_v1_3. Tried"):
        upstream.load_transformer(tmp_path)
    path = package / "models" / "causalvideovae" / "__init__.py"
    path.write_text("import a_module_that_nobody_has\n")
    del sys.modules[upstream.CAUSAL_VIDEO_VAE]
    with pytest.raises(ValueError, match=r"does not import here .*a_module_that_nobody_has.*native"):
        upstream.registries()


def test_without_the_package_native_is_named() -> None:
    assert not upstream.is_importable()
    with pytest.raises(ValueError, match="no package opensora can be imported; put a checkout of Open-Sora Plan on"):
        upstream.registries()
