"""Where a model's parts come from: flags and folders, sizes, what a student's folder takes over, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guide_parts import NAME, build_parts, edit_json, guide_flags
from safetensors.torch import load_file, save_file

from tdm_fast.config import BUNDLED_TEACHER, parse_train
from tdm_fast.models import registry
from tdm_fast.models.loading import load_parts, load_pipeline
from tdm_fast.models.sizes import units
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student
from tdm_fast.notes import say_once

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLIC = {"num_frames": 93, "max_height": 640, "max_width": 640}
UNSIZED = dict.fromkeys(PUBLIC)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open-Sora Plan's parts; to be read only."""
    return build_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    say_once.cache_clear()


def sources(parts: Path, **changed: object) -> Sources:
    return Sources.of_flags(parse_train(guide_flags(parts, **changed)).model)


def test_every_part_comes_from_its_flag(parts: Path) -> None:
    found = sources(parts)
    assert found.folders == {
        "transformer": parts / "transformer", "vae": parts / "vae", "scheduler": None, "text_encoder": parts / "t5",
        "tokenizer": parts / "t5",
    }  # fmt: skip
    assert (found.name, found.size, found.upstream) == (NAME, (5, 32, 32), False)
    teacher = load_parts(found)
    assert teacher.latent_shape == (8, 2, 4, 4) and teacher.video_shape == (5, 32, 32)
    saved = load_file(parts / "transformer" / WEIGHTS)
    assert all(torch.equal(saved[name], p) for name, p in teacher.denoiser.model.named_parameters())
    # Open-Sora Plan v1.3's own recipe: betas from 1e-4 to 0.02, rescaled to end without signal.
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert teacher.schedule.prediction_type == "v_prediction"
    torch.testing.assert_close(teacher.schedule.alpha.double(), alpha, rtol=0, atol=1e-6)
    assert teacher.scheduler.config.timestep_spacing == "trailing" and not teacher.scheduler.config.clip_sample


@pytest.mark.parametrize("inside", [".", "model", "transformer", "any93x640x640"])
def test_a_transformers_folder_may_be_one_deeper(parts: Path, tmp_path: Path, inside: str) -> None:
    weights = tmp_path / "weights" / inside
    shutil.copytree(parts / "transformer", weights)
    by_path = sources(parts, model_path=tmp_path / "weights")
    by_folder = sources(parts, model=tmp_path / "weights", model_path=None)
    assert by_path.transformer == by_folder.transformer and by_path.transformer.samefile(weights)  # type: ignore[union-attr]
    assert (by_path.name, by_folder.name) == (NAME, None)


def test_a_scheduler_beside_a_transformer_counts(parts: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    shutil.copytree(parts / "transformer", tmp_path / "model" / "transformer")
    shutil.copytree(tiny_teacher / "scheduler", tmp_path / "model" / "scheduler")
    edit_json(tmp_path / "model" / "scheduler" / "scheduler_config.json", prediction_type="sample")
    found = sources(parts, model=tmp_path / "model", model_path=None)
    assert found.scheduler_object().config.prediction_type == "sample"
    # Likewise where the transformer's own folder is named.
    inner = sources(parts, model_path=tmp_path / "model" / "transformer")
    assert inner.scheduler_object().config.prediction_type == "sample"


def test_the_recipe_is_named_where_there_is_no_scheduler(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sources(parts).scheduler is None
    said = capsys.readouterr().err
    assert f"{parts}/transformer has no scheduler/ in or beside it" in said and "zero-terminal SNR" in said


def two_encoders(parts: Path, folder: Path) -> Path:
    """Parts whose transformer takes two encoders, as only the package's do."""
    copied = Path(shutil.copytree(parts, folder))
    edit_json(copied / "transformer" / "config.json", caption_channels=[8, 6])
    return copied


def test_a_second_encoder_is_looked_for_only_where_it_is_used(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one, two = sources(parts), two_encoders(parts, tmp_path / "two")
    for path in (parts / "transformer", None):
        assert sources(parts, model_path=path, text_encoder_name_2="openai/none").encoder_2 is None
    assert capsys.readouterr().err.count("the second encoder is not used") == 2
    for name, says in (("openai/none", "no such folder"), (str(two / "t5"), "it is a T5, .*; this flag takes CLIP")):
        with pytest.raises(ValueError, match=f"--text_encoder_name_2 .*: {says}"):
            sources(two, text_encoder_name_2=name)
    both = sources(two)
    assert both.folders["text_encoder_2"] == both.folders["tokenizer_2"] == two / "clip"
    names = ("transformer", "scheduler", "text_encoder", "tokenizer")
    assert [part for part in one.folders if part != "vae"] == sorted(names, key=list(one.folders).index)
    # The second one's weights are part of what a run is of.
    before = both.digest(*(part for part in both.folders if part != "vae"))
    weights = load_file(two / "clip" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, two / "clip" / "model.safetensors")
    assert before != both.digest(*(part for part in both.folders if part != "vae"))


def test_a_folder_of_the_name_wins(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parts / "transformer", tmp_path / NAME)
    for other in (None, parts / "transformer"):
        found = sources(parts, model_path=other)
        assert found.transformer == Path(NAME) and found.name == NAME
    assert f"--model_path {parts}/transformer is left out" in capsys.readouterr().err


def test_flags_replace_parts_of_a_pipeline(parts: Path, tiny_teacher: Path) -> None:
    found = sources(parts, model=tiny_teacher, model_path=None, ae=None, ae_path=None, text_encoder_name_2=None)
    assert found.folders["vae"] == tiny_teacher / "vae" and found.folders["text_encoder"] == parts / "t5"
    assert found.scheduler == tiny_teacher / "scheduler"
    assert load_parts(found).tokenizer("a red circle").input_ids != load_pipeline(tiny_teacher).tokenizer(
        "a red circle"
    )


def test_without_a_folder_the_registry_makes_it(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12}
    for name, value in tiny.items():
        monkeypatch.setitem(registry.TWO_BILLION, name, value)
    found = sources(parts, model_path=None, **UNSIZED)
    first, second = load_parts(found), load_parts(found)
    assert first.latent_shape == (8, 24, 80, 80)
    config: Any = first.denoiser.model.config
    assert (config.num_layers, config.caption_channels, config.sparse_n) == (2, 8, 4)
    for ours, theirs in zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # on every rank, and when a run goes on
    assert capsys.readouterr().err.count("RANDOM WEIGHTS") == 1
    assert load_parts(sources(parts, model_path=None)).latent_shape == (8, 2, 4, 4)


# ---- sizes


def test_whose_word_on_the_size_counts(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformer = shutil.copytree(parts / "transformer", tmp_path / "transformer")

    def shape(**flags: object) -> tuple[int, ...]:
        return load_parts(sources(parts, model_path=transformer, **flags), empty=("text_encoder",)).latent_shape[1:]

    assert shape() == (2, 4, 4) and "outrank" not in capsys.readouterr().err
    assert load_parts(sources(parts)).has_own_size and not load_parts(sources(parts, num_frames=9)).has_own_size
    assert shape(**UNSIZED, model="OpenSoraT2V_v1_3") == (2, 4, 4) and "outrank" not in capsys.readouterr().err
    assert shape(**UNSIZED) == (2, 4, 4)
    assert "num_frames 5, not 93 and max_height 32, not 640 and max_width 32, not 640" in capsys.readouterr().err
    assert shape(**PUBLIC) == (24, 80, 80)
    assert shape(**PUBLIC | {"max_width": None}) == (24, 80, 4)
    edit_json(transformer / "config.json", sample_size_t=None, sample_size_h=None, sample_size_w=None)
    assert shape(**UNSIZED) == (24, 80, 80)
    with pytest.raises(
        ValueError, match=r"size of its videos is not known, .* --num_frames, --max_height, --max_width"
    ):
        shape(**UNSIZED, model="OpenSoraT2V_v1_3")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_frames": 92}, r"--num_frames is 92; it comes as 1 \+ n·4, so 89 or 93 would do"),
        ({"num_frames": 0}, r"--num_frames is 0; .* so 1 would do"),
        ({"max_height": 650}, "--max_height is 650; it comes as multiples of 16, so 640 or 656 would do"),
        ({"max_width": 8}, "--max_width is 8; it comes as multiples of 16, so 16 would do"),
        ({"max_width": -16}, "--max_width is -16; .* so 16 would do"),
    ],
)
def test_sizes_that_do_not_divide(parts: Path, flags: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_parts(sources(parts, **flags), empty=("transformer", "vae", "text_encoder"))


def test_a_presets_size_has_to_divide_too(parts: Path, tmp_path: Path) -> None:
    transformer = shutil.copytree(parts / "transformer", tmp_path / "transformer")
    edit_json(transformer / "config.json", sample_size_h=None)
    found = sources(parts, model="OpenSoraT2V_v1_3_93x650x640", model_path=transformer, **UNSIZED)
    with pytest.raises(
        ValueError, match=r"--model OpenSoraT2V_v1_3_93x650x640: max_height is 650; .* 640 or 656 would do"
    ):
        load_parts(found)


@pytest.mark.parametrize("strides", [(4, 8, 8), (2, 8, 8), (8, 8, 8)])
def test_units(strides: tuple[int, int, int]) -> None:
    """Every length to 200 against what VAE and patch embedding make of it."""
    time, height, _ = units(strides, 2)
    for length in range(1, 200):
        whole = (length - 1) / strides[0]
        assert time.fits(length) == whole.is_integer()
        assert height.fits(length) == ((length / strides[1]) % 2 == 0)
        for unit in (time, height):
            if unit.fits(length):
                assert unit.pixels(unit.latents(length, str(length))) == length
            else:
                below, above = range(1, length), range(length, 300)
                assert unit.nearest(length) == [*filter(unit.fits, below)][-1:] + [*filter(unit.fits, above)][:1]


# ---- identity


def test_the_bundled_teachers_digest_is_what_it_was() -> None:
    """Checkpoints of earlier runs name it: of each file the part, the name and the content."""
    total = hashlib.sha256()
    for part in ("scheduler", "text_encoder", "tokenizer", "transformer"):
        for path in sorted((BUNDLED_TEACHER / part).iterdir()):
            total.update(f"{part}/{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    found = Sources.of_folder(BUNDLED_TEACHER).digest("transformer", "scheduler", "text_encoder", "tokenizer")
    assert found == total.hexdigest()[:16]


def test_a_digest_is_of_contents(parts: Path, tmp_path: Path) -> None:
    names = ("transformer", "scheduler", "text_encoder", "tokenizer")
    before = sources(parts).digest(*names)
    moved = Path(shutil.copytree(parts, tmp_path / "moved"))
    assert sources(moved).digest(*names) == before
    weights = load_file(moved / "t5" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / "t5" / "model.safetensors")
    assert sources(moved).digest(*names) != before
    assert sources(moved).digest("tokenizer") == sources(parts).digest("tokenizer")
    with_weights = sources(parts, model_path=None).digest("transformer"), sources(parts).digest("transformer")
    assert len(set(with_weights)) == 2


# ---- a student's folder


def through_links(folder: Path) -> None:
    """Replace files by links to them, as in the hub's cache."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)


@pytest.mark.parametrize("linked", [True, False])
def test_a_student_has_all_parts(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    own = Path(shutil.copytree(parts, tmp_path / "parts"))
    through_links(own / "t5")
    found = sources(own, num_frames=9)
    teacher = load_parts(found)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        if not linked:
            patch.setattr(os, "link", refuse)
        save_student(tmp_path / "student", teacher.denoiser.model, found, [899, 449])
    encoder, blob = tmp_path / "student" / "text_encoder", own / "blobs"
    assert encoder.joinpath("model.safetensors").samefile(blob / "model.safetensors") == linked
    assert not encoder.joinpath("config.json").samefile(blob / "config.json")  # which one may edit
    assert not any(path.is_symlink() for path in (tmp_path / "student").rglob("*"))
    shutil.rmtree(own)
    student = load_pipeline(tmp_path / "student")
    assert student.timesteps == (899, 449) and student.latent_shape == (8, 3, 4, 4)
    assert torch.equal(student.schedule.alpha, teacher.schedule.alpha)
    text = "a red circle"
    assert student.tokenizer(text).input_ids == teacher.tokenizer(text).input_ids
    again = Sources.of_folder(tmp_path / "student")
    assert again.folders.keys() == found.folders.keys() and not again.knows_null_prompt and found.knows_null_prompt


def test_a_vae_of_a_trainers_checkpoint_becomes_a_folder_of_safetensors(parts: Path, tmp_path: Path) -> None:
    weights = load_file(parts / "vae" / WEIGHTS)
    (tmp_path / "vae").mkdir()
    shutil.copy(parts / "vae" / "config.json", tmp_path / "vae")
    torch.save({"state_dict": weights}, tmp_path / "vae" / "checkpoint.ckpt")
    found = sources(parts, ae_path=tmp_path / "vae")
    save_student(tmp_path / "student", load_parts(found).denoiser.model, found, [899])
    saved = load_file(tmp_path / "student" / "vae" / WEIGHTS)
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)


def test_an_adapter_goes_beside_the_teachers_weights(parts: Path, tmp_path: Path) -> None:
    """Its config, and so its size, is the student's all the same."""
    found = sources(parts, num_frames=9)
    files = {"adapter.safetensors": b"content"}
    network = load_parts(found).denoiser.model
    save_student(tmp_path / "student", network, found, [899], files=files, adapter="adapter.safetensors")
    folder = tmp_path / "student" / "transformer"
    assert (folder / WEIGHTS).samefile(parts / "transformer" / WEIGHTS)
    assert '"sample_size_t": 3' in (folder / "config.json").read_text()
    assert '"sample_size_t": 2' in (parts / "transformer" / "config.json").read_text()


# ---- what is refused


def no_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


REFUSED: list[tuple[dict[str, str | None], str]] = [
    ({"model": "OpenSoraT2V_v9"}, "--model 'OpenSoraT2V_v9' is not a model that is known here"),
    ({"model": "no/folder", "model_path": None}, "--model no/folder: no such folder, nor a name that is known"),
    ({"model_path": "no/folder"}, "--model_path no/folder: no such folder"),
    ({"ae_path": "no/folder"}, "--ae_path no/folder: no such folder"),
    ({"ae_path": None}, "--ae_path is needed: .*transformer has no model_index.json and so brings no VAE"),
    ({"ae": "WFVAEModel_D9"}, "--ae 'WFVAEModel_D9' is not a VAE that is known here; it takes Causal"),
    ({"ae": "WFVAEModel_D16_4x8x8"}, "--ae WFVAEModel_D16_4x8x8: .* 8 latent channels .* --ae WFVAEModel_D8_4x8x8"),
    ({"text_encoder_name_1": None}, "--text_encoder_name_1 is needed: .* brings no text encoder"),
    ({"text_encoder_name_1": "{parts}/clip"}, "--text_encoder_name_1 .*: it is a CLIP encoder; this flag takes T5"),
    ({"text_encoder_name_1": "google/mt5"}, "--text_encoder_name_1 google/mt5: no such folder, .* copy FOLDER here"),
]
SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "t5" / "spiece.model").unlink(), "holds no tokenizer; a model needs its own"),
    (lambda f: (f / "t5" / "config.json").unlink(), "it holds a tokenizer without its model"),
    (lambda f: shutil.rmtree(f / "transformer"), "--model_path .*transformer: no such folder"),
    (lambda f: (f / "transformer" / WEIGHTS).unlink(), "holds no OpenSoraT2V_v1_3. Tried .* config.json without"),
    (no_shard, "transformer is half-written: 1 of 2 shards are missing, model-00002-of-00002.safetensors first"),
    (
        lambda f: edit_json(f / "transformer" / "config.json", _class_name="OpenSoraT2V_v1_5"),
        "holds no OpenSoraT2V_v1_3. Tried .*: a OpenSoraT2V_v1_5",
    ),
    (
        lambda f: edit_json(f / "transformer" / "config.json", caption_channels=4096),
        "--text_encoder_name_1 .*: it is 8 wide but the teacher takes caption_channels=4096; google/mt5-xxl, .* fit",
    ),
    (
        lambda f: edit_json(f / "transformer" / "config.json", in_channels=16),
        "in_channels=16 but the VAE in .*vae decodes 8 channels",
    ),
    (
        lambda f: edit_json(f / "transformer" / "config.json", caption_channels=[8, 6]),
        r"caption_channels=\[8, 6\], so it takes two text encoders; .* --opensora_source upstream runs",
    ),
]


def refused(parts: Path, says: str, **flags: str | None) -> None:
    """Refused before any weight is read, which is not there to be found fault with."""
    with pytest.raises(ValueError, match=says):
        load_parts(sources(parts, **flags), empty=("transformer", "vae", "text_encoder"))


@pytest.mark.parametrize(("flags", "says"), REFUSED)
def test_flags_that_cannot_work(
    parts: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str | None], says: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(parts, says, **{name: value and value.replace("{parts}", str(parts)) for name, value in flags.items()})


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_folders_that_cannot_work(parts: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    copy = Path(shutil.copytree(parts, tmp_path / "parts"))
    spoil(copy)
    refused(copy, says)
