"""Names of Open-Sora Plan: transformers and their sizes, VAEs and the folders that are theirs, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vaes import CAUSAL, VAES, wf

from tdm_fast.models import registry
from tdm_fast.models.causalvae import CausalVAEModel
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.registry import Diffusion_models, Diffusion_models_class, Preset
from tdm_fast.models.vae import CausalVAEWrapper, WFVAEWrapper
from tdm_fast.models.wfvae import WFVAEModel

SMALL: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 12,
    "cross_attention_dim": 12,
    "caption_channels": 6,
}


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every name."""
    folder = tmp_path_factory.mktemp("vaes")
    for name, (cls, config) in VAES.items():
        cls(**config).save_pretrained(folder / name)
    return folder


# Transformers


@pytest.mark.parametrize("name", ["OpenSoraT2V_v1_3-2B/122", "OpenSoraT2V_v1_3", "OpenSoraT2V_v1_3_93x640x640"])
def test_a_name_makes_the_published_configuration(name: str) -> None:
    facts = json.loads((Path(__file__).parent / "data" / "opensora_v1_3_2b_keys.json").read_text())
    assert registry.is_known(name) and name in Diffusion_models and name in Diffusion_models_class
    assert Diffusion_models_class[name] is OpenSoraT2V_v1_3
    with torch.device("meta"):
        model: Any = registry.build(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == facts["keys"]
    assert model.config.sparse1d and model.config.sparse_n == 4 and model.config.activation_fn == "gelu-approximate"
    made: Any = Diffusion_models[name](in_channels=4, **SMALL)
    assert made.config.num_layers == 1 and made.config.patch_size == 2


def test_a_size_in_the_name_is_the_model_s_own() -> None:
    assert registry.preset("OpenSoraT2V_v1_3_29x480x640") == Preset(num_frames=29, height=480, width=640)
    assert registry.preset("OpenSoraT2V_v1_3-2B/122_1x64x32") == (1, 64, 32)
    assert registry.preset("OpenSoraT2V_v1_3") is None
    config: Any = registry.build("OpenSoraT2V_v1_3_93x640x320", **SMALL).config
    assert (config.sample_size_t, config.sample_size_h, config.sample_size_w) == (24, 80, 40)
    assert config.in_channels == config.out_channels == 8 and config.num_layers == 1
    config = registry.build("OpenSoraT2V_v1_3_17x64x64", ae="WFVAEModel_D32_8x8x8", **SMALL, sample_size_h=4).config
    assert (config.sample_size_t, config.sample_size_h, config.sample_size_w) == (3, 4, 8)
    assert config.in_channels == 32


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("OpenSoraT2V_v1_3_92x640x640", "93x640x640"), ("OpenSoraT2V_v1_3_2x7x100", "1x16x96")],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"--model {name}: .* the nearest that fits is {nearest}"):
        registry.build(name, **SMALL)


@pytest.mark.parametrize("name", ["OpenSoraT2V_v1_5", "OpenSoraT2V_v1_3_93x640", "OpenSoraT2V_v1_3_0x640x640", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    assert not registry.is_known(name) and name not in Diffusion_models
    for call in (registry.preset, registry.build):
        with pytest.raises(ValueError, match=r"not a model that is known here; it takes OpenSoraT2V_v1_3-2B/122, Open"):
            call(name)
    with pytest.raises(KeyError):
        Diffusion_models_class[name]


# Folders


@pytest.mark.parametrize("subfolder", ["model", "transformer", "any93x640x640", "."])
def test_a_folder_is_found_where_users_have_it(subfolder: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    OpenSoraT2V_v1_3(**registry.configuration("OpenSoraT2V_v1_3", **SMALL)).save_pretrained(tmp_path / subfolder)
    found = registry.find_folder(tmp_path, OpenSoraT2V_v1_3)
    assert found == tmp_path / subfolder
    assert isinstance(OpenSoraT2V_v1_3.from_pretrained(found), OpenSoraT2V_v1_3)


def test_what_was_tried_and_found_is_listed(tmp_path: Path) -> None:
    CausalVAEModel(**CAUSAL).save_config(tmp_path / "any93x640x640")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "OpenSoraT2V_v1_3"}))
    (tmp_path / "transformer" / "checkpoint.ckpt").touch()
    with pytest.raises(ValueError) as caught:
        registry.find_folder(tmp_path, OpenSoraT2V_v1_3)
    says = str(caught.value).replace(f"{tmp_path}", "F")
    assert says == (
        "F holds no OpenSoraT2V_v1_3. Tried F/model: no such folder; F/transformer: config.json without weights as"
        " *.safetensors (found: checkpoint.ckpt, config.json); F/any93x640x640: a CausalVAEModel; F: no config.json"
        " (found: any93x640x640, transformer)"
    )
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        registry.find_folder(tmp_path, OpenSoraT2V_v1_3)
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"its config\.json names no class"):
        registry.find_folder(tmp_path, OpenSoraT2V_v1_3)


# VAEs


def test_tables_say_the_same_of_every_vae() -> None:
    for table in (registry.ae_wrapper, registry.ae_stride_config, registry.ae_channel_config, registry.ae_norm):
        assert list(table) == list(registry.ae_denorm) == list(VAES)
    pixels = torch.tensor([0.0, 0.25, 1.0])
    for name in VAES:
        depth, strides = name.split("_")[1:]
        assert registry.ae_channel_config[name] == int(depth[1:])
        assert registry.ae_stride_config[name] == [int(stride) for stride in strides.split("x")]
        assert registry.ae_norm[name](pixels).tolist() == [-1.0, -0.5, 1.0]
        assert torch.equal(registry.ae_denorm[name](registry.ae_norm[name](pixels)), pixels)


def test_every_name_takes_its_folder_and_no_other(vaes: Path) -> None:
    for name in VAES:
        assert registry.check_vae(name, vaes / name) == vaes / name
    # Another class, other channels, another stride.
    for name, other in (
        ("CausalVAEModel_D8_4x8x8", "WFVAEModel_D8_4x8x8"),
        ("WFVAEModel_D16_4x8x8", "WFVAEModel_D32_4x8x8"),
        ("WFVAEModel_D32_4x8x8", "WFVAEModel_D32_8x8x8"),
        ("CausalVAEModel_D4_4x8x8", "CausalVAEModel_D4_2x8x8"),
    ):
        with pytest.raises(ValueError, match=f"--ae {name}: .*--ae {other} would do"):
            registry.check_vae(name, vaes / other)


@pytest.mark.parametrize(("name", "wrapper"), [("CausalVAEModel_D8_2x8x8", CausalVAEWrapper), (None, WFVAEWrapper)])
def test_a_loaded_vae_is_frozen_and_says_what_it_is(name: str | None, wrapper: type, vaes: Path) -> None:
    folder = "CausalVAEModel_D8_2x8x8" if name else "WFVAEModel_D16_4x8x8"
    vae = registry.ae_wrapper[name](vaes / folder) if name else registry.load_vae(None, vaes / folder)
    assert type(vae) is wrapper and not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert (vae.strides, vae.channels) == (((2, 8, 8), 8) if name else ((4, 8, 8), 16))
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
    frames = vae.strides[0] + 1
    with torch.no_grad():
        z = vae.encode(torch.zeros(1, 3, frames, 8, 16))
        assert z.shape == (1, vae.channels, 2, 1, 2)
        assert vae.decode(z).shape == (1, frames, 3, 8, 16)


def test_a_pipeline_s_folder_or_a_checkpoint_will_do(vaes: Path, tmp_path: Path) -> None:
    shutil.copytree(vaes / "WFVAEModel_D8_4x8x8", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    expected = registry.load_vae("WFVAEModel_D8_4x8x8", tmp_path).vae.state_dict()
    weights.unlink()
    filters = {name: value for name, value in expected.items() if "wavelet" in name}
    averages = {name: value for name, value in expected.items() if name not in filters}
    older = {name: torch.zeros_like(value) for name, value in averages.items()}
    torch.save({"state_dict": {"gen_model": older | filters}, "ema_state_dict": averages}, tmp_path / "vae" / "x.ckpt")
    loaded = registry.load_vae("WFVAEModel_D8_4x8x8", tmp_path).vae.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_vaes_that_are_none_are_refused(vaes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ae 'WFVAEModel_D4_4x8x8' is not a VAE that is known here; it takes Causal"):
        registry.load_vae("WFVAEModel_D4_4x8x8", vaes / "WFVAEModel_D8_4x8x8")
    with pytest.raises(
        ValueError, match=f"{tmp_path} holds no CausalVAEModel or WFVAEModel. Tried {tmp_path}/vae: no s"
    ):
        registry.load_vae(None, tmp_path)
    WFVAEModel(**wf(4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4 latent channels and strides 4x8x8; no name of --ae is of such; leave it"):
        registry.load_vae("WFVAEModel_D8_4x8x8", tmp_path)
    assert registry.load_vae(None, tmp_path).channels == 4
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"t_interpolation": "cubic"}))
    with pytest.raises(ValueError, match=r"its config\.json does not make a WFVAEModel: t_interpolation must be"):
        registry.load_vae("WFVAEModel_D8_4x8x8", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_channels": 8}))
    with pytest.raises(ValueError, match=r"its weights and config\.json are not of one WFVAEModel"):
        registry.load_vae(None, tmp_path)
