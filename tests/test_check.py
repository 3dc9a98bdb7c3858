"""`tdm-fast check`: what works here, and for a run's flags train's own refusals, each in a row with what mends it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from guide_parts import build_parts, edit_json, guide_flags
from safetensors.torch import load_file, save_file
from tiny_encoders import t5_folder
from transformers import T5EncoderModel, T5ForConditionalGeneration

from tdm_fast import check, cli, encoders, installation, native, ops, preflight
from tdm_fast.check import Row, run_check
from tdm_fast.checkpoint import save_checkpoint
from tdm_fast.config import TrainConfig, parse_train
from tdm_fast.files import locked
from tdm_fast.memory import fill
from tdm_fast.models import WFVAEModel, registry
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.loading import load_parts
from tdm_fast.models.networks import check_tensors
from tdm_fast.models.sources import Sources
from tdm_fast.ops import _dispatch
from tdm_fast.ranks import Ranks
from tdm_fast.sizing import checkpoint_bytes
from tdm_fast.step import make_state
from tdm_fast.text import MAX_LENGTH, PromptCache
from tdm_fast.train import own_flags, prompts_of, train

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAST_NORM = "encoder.final_layer_norm.weight"
RUN = {"train_batch_size": 2, "max_train_steps": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open-Sora Plan's parts; to be read only."""
    return build_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def parts(built: Path, tmp_path: Path) -> Path:
    """A copy of them, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "parts"))


def flags(parts: Path, **changed: object) -> list[str]:
    return guide_flags(parts, **{"output_dir": parts / "run", **RUN, **changed})


def rows_of(arguments: list[str]) -> dict[str, Row]:
    """The rows of a run, by name."""
    return {row.name: row for row in preflight.rows(preflight.parse(arguments))}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def name_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"proj_out.bias": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def narrow_vae(parts: Path) -> None:
    vae = WFVAEModel.from_pretrained(parts / "vae")
    narrow = {"latent_dim": 4, "scale": [1.0] * 4, "shift": [0.0] * 4}
    WFVAEModel.from_config({**vae.config, **narrow}).save_pretrained(parts / "vae")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimates of a run's memory and checkpoints left out."""
    monkeypatch.setattr(preflight, "refuse_what_cannot_fit", lambda *_: "")
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda *_: 1000)


# ---- an installation


@pytest.fixture(scope="module")
def report() -> tuple[int, str]:
    """Exit code and text of `tdm-fast check`."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = run_check()
    return code, shown.getvalue()


def test_report(report: tuple[int, str]) -> None:
    code, text = report
    assert code == 0 and " 0 failed" in text.splitlines()[-1]
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert torch.__version__.split("+")[0] in lines["torch"] and lines["imports"].startswith("  ok")
    for op in ops.__all__:
        assert "cpu tensors run " in lines[op]
    assert "cpu tensors run cpp" in lines["ode_step"] and "the definition" in lines["ode_step"]
    assert "runs on cpu tensors" in lines["cpp"]
    if not torch.cuda.is_available():
        assert "unavailable: there is no CUDA device" in lines["triton"]
    assert "flash, math" in lines["SDPA,"] and "2.77 billion" in lines["registry"]
    for name in ("WFVAEModel", "CausalVAEModel", "t5", "mt5", "umt5", "clip", "disk", "xformers", "CUDA"):
        assert lines[name].startswith("  ok") or name == "disk"
    assert "flash-attn-4 not installed: needs " in lines["flash4"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(native, "library_path", lambda backend: tmp_path / f"{backend}.so")
    native.load_library.cache_clear()
    try:
        found = {row.name: row for row in (*installation.build_rows(), *installation.op_rows())}
    finally:
        monkeypatch.undo()
        native.load_library.cache_clear()
    assert found["cpp"].state == "warn" and "cpp.so was not built" in found["cpp"].says
    assert found["cpp"].fix.startswith("TDM_FAST_BUILD=cpu pip install")
    assert found["ode_step"] == Row("ode_step", "ok", "cpu tensors run torch, the definition")
    assert not recwarn.list


@pytest.mark.parametrize(("factor", "says"), [(1.01, "from those of the definition"), (torch.nan, "are not finite")])
def test_an_op_that_gives_other_numbers(monkeypatch: pytest.MonkeyPatch, factor: float, says: str) -> None:
    written = dict(_dispatch._implementations["ode_step"])
    right = written["cpp"]
    written["cpp"] = lambda *arguments: right(*arguments) * factor
    monkeypatch.setitem(_dispatch._implementations, "ode_step", written)
    found = {row.name: row for row in installation.op_rows()}
    failed = [name for name, row in found.items() if row.state == "failed"]
    assert failed == ["ode_step"] and says in found["ode_step"].says and "TDM_FAST_BACKEND" in found["ode_step"].fix


def test_a_model_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.WFVAEWrapper, "decode", lambda self, z: z)
    monkeypatch.setitem(installation.CLASSES, "mt5", None)
    monkeypatch.delitem(installation.registry.ae_norm, "WFVAEModel_D8_4x8x8")
    found = {row.name: row for row in installation.model_rows()}
    failed = [name for name, row in found.items() if row.state == "failed"]
    assert failed == ["registry", "WFVAEModel", "mt5 encoder"] and "5 x 16 x 16 became" in found["WFVAEModel"].says


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    versions = {"torch": "2.0.0", "torchao": "0.1.0"}

    def version(name: str) -> str:
        if name == "tyro" or name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {row.name: row for row in check.version_rows()}
    assert (found["torch"].state, found["torch"].says) == ("failed", "2.0.0, but it takes >=2.11")
    assert found["torch"].fix == "pip install 'torch>=2.11'"
    assert found["tyro"].state == "failed" and found["torchao"].state == "warn" and found["triton"].state == "ok"
    assert found["torchao"].fix == "pip install 'tdm-fast[8bit]'"


def test_what_optional_packages_need_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for optional in ("torchao", "triton"):
        monkeypatch.setitem(sys.modules, optional, None)
    for name in [name for name in sys.modules if name.startswith(("torchao.", "tdm_fast.adamw_8bit"))]:
        monkeypatch.delitem(sys.modules, name)
    (row,) = check.import_rows()
    assert row.state == "ok", row.says


def test_what_does_not_import(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.import_module

    def fail(name: str) -> Any:
        if name == "tdm_fast.video":
            raise ImportError("No module named 'av'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    assert run_check() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=2)[:2] == ["failed", "imports"] and "tdm_fast.video: ImportError: No mod" in lines[1]
    assert lines[2].strip().startswith("fix: pip install") and len(lines) == 3


def test_low_disk_and_a_gpu_without_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = {row.name: row for row in installation.device_rows()}
    assert found["disk"].state == "warn" and found["CUDA"].state == "warn" and "nvidia-smi" in found["CUDA"].says


# ---- a run


def test_a_run_that_can_begin(built: Path) -> None:
    before = sorted(built.rglob("*"))
    found = rows_of(flags(built))
    assert [row for row in found.values() if row.state != "ok"] == []
    assert "videos of 5x32x32" in found["fit"].says and found["latents"].says == "8x2x4x4"
    assert {"transformer", "vae", "text_encoder", "memory", "disk", "tokens"} <= found.keys()
    assert sorted(built.rglob("*")) == before


Spoil = Callable[[Path], object]
NONE: Mapping[str, object] = {}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("spoil", "changed", "row", "says"),
    [
        (lambda p: name_a_shard(p / "transformer"), NONE, "teacher", "1 of 1 shards are missing"),
        (lambda p: cut(p / "transformer" / WEIGHTS), NONE, "teacher", "is damaged or half-written"),
        (lambda p: cut(p / "vae" / WEIGHTS), NONE, "teacher", "is damaged or half-written"),
        (lambda p: cut(p / "t5" / "model.safetensors"), NONE, "teacher", "is cut short or damaged"),
        (lambda p: (p / "t5" / "config.json").unlink(), NONE, "teacher", "a tokenizer without its model"),
        (lambda p: (p / "t5" / "spiece.model").unlink(), NONE, "teacher", "holds no tokenizer"),
        (
            lambda p: edit_json(p / "transformer" / "config.json", _class_name="OpenSoraT2V_v1_5"),
            NONE,
            "teacher",
            "holds no OpenSoraT2V_v1_3",
        ),
        (shutil.rmtree, NONE, "teacher", "no such folder"),
        (None, {"ae": "WFVAEModel_D16_4x8x8"}, "teacher", "with 8 latent channels"),
        (None, {"model": "OpenSoraT2V_v2"}, "teacher", "is not a model that is known here"),
        (None, {"text_encoder_name_1": None}, "teacher", "--text_encoder_name_1 is needed"),
        (
            lambda p: change_weights(p / "transformer" / WEIGHTS, lambda t: t.pop("proj_out.bias")),
            NONE,
            "transformer",
            "1 weights of OpenSoraT2V_v1_3 are missing, proj_out.bias first",
        ),
        (
            lambda p: change_weights(p / "vae" / WEIGHTS, lambda t: t.update(more=torch.zeros(1))),
            NONE,
            "vae",
            "1 weights of WFVAEModel are too many, more first",
        ),
        (
            lambda p: edit_json(p / "transformer" / "config.json", cross_attention_dim=24, attention_head_dim=12),
            NONE,
            "transformer",
            "its weights and config.json are not of one OpenSoraT2V_v1_3",
        ),
        (
            lambda p: change_weights(
                p / "t5" / "model.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight")
            ),
            NONE,
            "text_encoder",
            "1 weights of T5EncoderModel are missing",
        ),
        (
            lambda p: (shutil.rmtree(p / "t5"), t5_folder(p / "t5", "mt5", 16)),
            NONE,
            "fit",
            "it is 16 wide but the teacher takes caption_channels=8",
        ),
        (narrow_vae, {"ae": None}, "fit", "in_channels=8 but the VAE"),
        (None, {"max_height": 40}, "fit", "--max_height is 40"),
        (None, {"total_steps": 1100}, "trajectory", "total_steps is 1100"),
        (None, {"train_batch_size": 0}, "flags", "--train_batch_size 0"),
        (None, {"device": "cuda:64"}, "flags", "--device cuda:64: this machine has"),
        (None, {"profile": "2:3"}, "flags", "--profile 2:3: the run has 1 iterations"),
        (None, {"gradient_accumulation_steps": 3}, "ranks", "must be a multiple of 3"),
        (None, {"context_parallel": 2}, "ranks", "--context_parallel 2: it must divide the number of ranks, 1"),
        (None, {"video_sizes": "5x40x32"}, "latents", "--video_sizes 5x40x32"),
        (None, {"prompts": "no.txt"}, "prompts", "--prompts no.txt: no such file"),
        (None, {"resume_from_checkpoint": "checkpoint-7"}, "checkpoint", "checkpoint-7 is not a checkpoint"),
        (lambda p: (p / "transformer" / "few_step.json").write_text("{}"), NONE, "guidance", "knows no null prompt"),
    ],
)
def test_a_row_has_trains_own_words(
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Spoil | None,
    changed: Mapping[str, object],
    row: str,
    says: str,
) -> None:
    monkeypatch.chdir(parts.parent)
    if spoil is not None:
        spoil(parts)
    arguments = flags(parts, **{"output_dir": "run", **changed})
    found = rows_of(arguments)[row]
    assert found.state == "failed" and says in found.says and found.fix
    with pytest.raises(ValueError) as refusal:
        train(parse_train(arguments))
    assert str(refusal.value) == found.says
    assert not any(Path("run").glob("checkpoint*"))


@pytest.mark.usefixtures("unmeasured")
def test_what_a_checkpoint_says(parts: Path) -> None:
    def save(meta: dict[str, Any], groups: tuple[str, ...]) -> Row:
        shutil.rmtree(parts / "run", ignore_errors=True)
        (parts / "run").mkdir()
        save_checkpoint(parts / "run", 1, {name: {"x": torch.zeros(2)} for name in groups}, meta)
        return rows_of(flags(parts))["checkpoint"]

    config = parse_train(flags(parts))
    teacher = load_parts(Sources.of_flags(config.model), empty={"text_encoder"})
    mine = own_flags(config, prompts_of(config), teacher)
    groups = ("student", "fake", "student_optimizer", "fake_optimizer", "guard", "ema")
    assert "it lacks ema" in save({"config": mine}, groups[:-1]).says
    assert "another configuration (seed was 1, is 0)" in save({"config": mine | {"seed": 1}}, groups).says
    assert "(latents was 8x1x4x4, is " in save({"config": mine | {"latents": "8x1x4x4"}}, groups).says
    found = save({"config": mine | {"model": "sha256:any"}}, groups)
    assert found == Row("checkpoint", "ok", f"{parts}/run/checkpoint-1")
    with locked(parts / "run"):
        assert "is in use by another run" in rows_of(flags(parts))["run's folder"].says
    assert "would be lost" in rows_of(flags(parts, resume_from_checkpoint="none"))["run's folder"].says
    state = parts / "run" / "checkpoint-1" / "state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 2'))
    assert "is damaged" in rows_of(flags(parts))["checkpoint"].says


@pytest.mark.usefixtures("unmeasured")
def test_a_folder_that_cannot_be_written(built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    row = rows_of(flags(built, output_dir=tmp_path / "file" / "run"))["run's folder"]
    assert row.state == "failed" and f"{tmp_path}/file is no folder that can be written to" in row.says


@pytest.mark.usefixtures("unmeasured")
def test_a_full_disk(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))  # type: ignore[attr-defined]
    row = rows_of(flags(built))["disk"]
    assert row.state == "failed" and "1 checkpoints of 0.0 MB" in row.says and "--checkpoints_total_limit" in row.fix
    several = rows_of(flags(built, max_train_steps=500, lr_warmup_steps=5))["disk"].says
    assert several.startswith("3 checkpoints of")  # two that stay, and the next one beside them


def test_memory_that_is_not_there(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: TrainConfig, teacher: Denoiser, *_: object) -> None:
        assert all(parameter.is_meta for parameter in teacher.parameters())
        raise ValueError("the run would take 100 GB")

    monkeypatch.setattr(preflight, "refuse_what_cannot_fit", refuse)
    row = rows_of(flags(built))["memory"]
    assert (row.state, row.says) == ("failed", "the run would take 100 GB") and "--roles lora" in row.fix
    assert "when the run begins" in rows_of(flags(built, train_batch_size="auto"))["memory"].says


@pytest.mark.usefixtures("unmeasured")
def test_ranks_that_are_not_there(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Ranks] = []
    monkeypatch.setattr(preflight, "refuse_what_cannot_fit", lambda *arguments: asked.append(arguments[-1]) or "")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "multiple of 8" in rows_of(flags(built))["ranks"].says and not asked
    for sharding, copies in (("none", 8), ("full", 1), ("hybrid", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        found = rows_of(flags(built, sharding=sharding, train_batch_size=8, context_parallel=2))
        assert found["ranks"].says == "8, by WORLD_SIZE"
        assert (asked[-1].world, asked[-1].data_ranks, asked[-1].copies) == (8, 4, copies)


def test_the_longest_prompt_decides_the_memory(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PromptCache] = []
    monkeypatch.setattr(preflight, "refuse_what_cannot_fit", lambda *arguments: seen.append(arguments[2]) or "")
    (tmp_path / "prompts.txt").write_text("red\n" * 300 + "red " * 600 + "\n")
    found = rows_of(flags(built, prompts=tmp_path / "prompts.txt"))
    assert found["tokens"].says == f"{MAX_LENGTH} at most in a prompt"
    assert max(seen[0].lengths) == MAX_LENGTH and len(seen[0]) == preflight.FEW_PROMPTS
    assert seen[0].batch([0]).tensors["encoder_hidden_states"].shape == (1, MAX_LENGTH, 8)


def test_random_weights_are_not_made(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TWO_BILLION, "num_layers", 2)
    arguments = flags(built, model_path=None, train_batch_size="auto")
    found = rows_of(arguments)
    assert "videos of 5x32x32" in found["fit"].says and "transformer" not in found
    assert {row.state for row in found.values()} == {"ok"}
    empty = load_parts(Sources.of_flags(parse_train(arguments).model), empty={"text_encoder", "vae", "transformer"})
    assert all(parameter.is_meta for parameter in empty.denoiser.parameters())


def test_an_encoder_of_the_hub_is_not_downloaded(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(encoders, "_cached", lambda name: None)
    monkeypatch.setattr(encoders, "_download", download)
    monkeypatch.setattr(preflight, "offline_reason", lambda kind, name: None)
    row = rows_of(flags(built, text_encoder_name_1="somebody/t5"))["teacher"]
    assert row.state == "warn" and row.fix == "hf download somebody/t5, then check again"
    # Of a published one its width is known, and so all else is checked.
    found = rows_of(flags(built, text_encoder_name_1="google/mt5-xxl"))
    assert found["text_encoder"].state == "warn" and "4096 wide" in found["text_encoder"].says
    assert "it is 4096 wide but the teacher takes caption_channels=8" in found["fit"].says
    monkeypatch.setitem(encoders.WIDTHS["t5"], "google/mt5-xxl", 8)
    found = rows_of(flags(built, text_encoder_name_1="google/mt5-xxl"))
    assert {name for name, row in found.items() if row.state != "ok"} == {"text_encoder"}
    assert found["tokens"].says.startswith(f"{MAX_LENGTH} at most") and {"memory", "disk"} <= found.keys()


@pytest.mark.parametrize(
    "changed", [{}, {"roles": "lora", "lora_rank": 2}, {"use_ema": False}, {"use_8bit_adam": True}], ids=str
)
def test_bytes_of_a_checkpoint(built: Path, changed: dict[str, object]) -> None:
    arguments = flags(built, **{name: value for name, value in changed.items() if not isinstance(value, bool)})
    arguments += [f"--{'' if value else 'no-'}{name}" for name, value in changed.items() if isinstance(value, bool)]
    config = parse_train(arguments)
    sources = Sources.of_flags(config.model)
    teacher = load_parts(sources, empty={"text_encoder"})
    state = make_state(copy.deepcopy(teacher.denoiser), config)
    with torch.compiler.set_stance("force_eager"):
        fill(state.student_optimizer)
        fill(state.fake_optimizer)
    held = sum(tensor.nbytes for tensors in state.groups().values() for tensor in tensors.values())
    empty = load_parts(sources, empty={"text_encoder", "vae", "transformer"})
    assert checkpoint_bytes(config, empty.denoiser, torch.device("cpu")) == held > 0


def test_headers_of_tied_and_further_weights(tmp_path: Path) -> None:
    folder = t5_folder(tmp_path / "t5")
    config = T5EncoderModel.from_pretrained(folder).config
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="6kB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    check_tensors(folder, T5EncoderModel, others=True)
    with pytest.raises(ValueError, match="are too many"):
        check_tensors(folder, T5EncoderModel)


@pytest.mark.usefixtures("unmeasured")
def test_exit_codes(parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(installation, "SECTIONS", {})
    assert cli.main(["check", *flags(parts)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 failed")
    cut(parts / "vae" / WEIGHTS)
    assert cli.main(["check", *flags(parts)]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  failed"))
    assert lines[at].split()[1] == "teacher" and lines[at + 1].strip().startswith("fix: copy or download")
    for unknown in (["--use_hubert"], ["--num_steps", "7"], ["now"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["check", *unknown])
        assert end.value.code == 2
