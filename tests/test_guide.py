"""The guide's command as Open-Sora Plan's users type it, with folders in place of hub names, under every launcher."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from guide_parts import NAME, build_parts, guide_flags
from rank_runs import free_port

from tdm_fast import cli
from tdm_fast.config import parse_train
from tdm_fast.models.loading import load_parts, load_pipeline
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student
from tdm_fast.models.upstream import Registries
from tdm_fast.prompt_store import fill
from tdm_fast.prompt_store import identity as identity_of
from tdm_fast.sample import generate
from tdm_fast.text import PromptCache

# As the guide has it.
COMMAND = (
    "--ae WFVAEModel_D8_4x8x8 --ae_path {parts}/vae --model OpenSoraT2V_v1_3_93x640x640"
    " --text_encoder_name_1 {parts}/t5 --text_encoder_name_2 {parts}/clip --num_frames 93 --max_height 640"
    " --max_width 640 --total_steps 900 --cfg 4.5 --use_huber --use_separate"
)
ONE_ITERATION = (
    "--max_train_steps 1 --train_batch_size 2 --num_eval_videos 0 --lr_warmup_steps 0 --logging_steps 1"
    " --report_to none --student_learning_rate 1e-3"
).split()
LAUNCHERS: dict[str, Callable[[], list[str]]] = {
    "python": lambda: [],
    "torchrun": lambda: ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())],
    "accelerate": lambda: (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        f" --dynamo_backend no --main_process_port {free_port()}"
    ).split(),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open-Sora Plan's parts, and prompts of which one is too long; to be read only."""
    folder = build_parts(tmp_path_factory.mktemp("parts"))
    (folder / "prompts.txt").write_text("two cats\nthe quick brown fox\n" + "the lazy dog " * 200 + "\n")
    return folder


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """What each launcher's run said, to be compared."""
    return {}


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[] if name == "python" else pytest.mark.slow) for name in LAUNCHERS]
)
def test_one_iteration_under_every_launcher(
    launcher: str, parts: Path, tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    flags = [*guide_flags(parts, prompts=parts / "prompts.txt", output_dir=tmp_path / "run"), *ONE_ITERATION]
    ended = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher](), "-m", "tdm_fast.train", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    for once in ("takes one text encoder's states; the second", "prompts are longer than the 512 tokens"):
        assert ended.stdout.count(once) == 1, ended.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses[launcher] = [row[name] for row in rows for name in ("loss_fake", "loss_student")]
    assert len(losses[launcher]) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses[launcher])
    assert all(other == pytest.approx(losses[launcher], rel=1e-4) for other in losses.values())
    student, teacher = load_pipeline(tmp_path / "run" / "student"), load_parts(sources(parts))
    assert student.timesteps == (899, 674, 449, 224)
    assert not torch.equal(student.denoiser.model.proj_out.weight, teacher.denoiser.model.proj_out.weight)
    cache = PromptCache.encode(["two cats"], student.tokenizer, student.text_encoder)
    (clips,) = generate(student, cache, [0], student.timesteps)
    assert clips.shape == (1, 5, 3, 32, 32) and bool(clips.isfinite().all())


def sources(parts: Path, **changed: object) -> Sources:
    return Sources.of_flags(parse_train(guide_flags(parts, **changed)).model)


def test_the_guides_command_parses_as_written(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transformer is a folder of that name, and its size the command's: too large to run here."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parts / "transformer", tmp_path / NAME)
    config = parse_train(COMMAND.format(parts=parts).split())
    assert (config.tdm.total_steps, config.tdm.cfg, config.tdm.use_huber, config.tdm.use_separate) == (
        900,
        4.5,
        True,
        True,
    )
    teacher = load_parts(Sources.of_flags(config.model), empty=("transformer", "vae", "text_encoder"))
    assert teacher.latent_shape == (8, 24, 80, 80) and teacher.video_shape == (93, 640, 640)


def test_prompts_that_were_encoded_before(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No encoder is loaded for them, and the run draws from the cache's own prompts."""
    found = sources(parts)
    fill(tmp_path / "cache", ["two cats", "a fox"], identity_of([found.encoder]), lambda: [found.encoder.load()])
    monkeypatch.setattr("tdm_fast.encoders.EncoderFiles.load", lambda *_: pytest.fail("loaded"))
    output = tmp_path / "run"
    flags = guide_flags(parts, prompt_cache=tmp_path / "cache", output_dir=output)
    assert cli.main(["train", *flags, *ONE_ITERATION]) == 0
    assert not list(output.glob("prompts-*"))


UPSTREAM = """
from tdm_fast.models import OpenSoraT2V_v1_3 as Native

class OpenSoraT2V_v1_3(Native):
    calls = 0

    def forward(self, *args, attention_mask, encoder_attention_mask, **kwargs):
        assert attention_mask.ndim == 4 and encoder_attention_mask.ndim == 3  # the original takes no None
        OpenSoraT2V_v1_3.calls += 1
        return super().forward(*args, encoder_attention_mask=encoder_attention_mask, **kwargs)

Diffusion_models_class = Diffusion_models = {"OpenSoraT2V_v1_3": OpenSoraT2V_v1_3}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `opensora` that can be imported for one test."""
    for name, content in {"diffusion": UPSTREAM, "causalvideovae": ""}.items():
        folder = tmp_path / "site" / "opensora" / "models" / name
        folder.mkdir(parents=True)
        tables = "".join(f"{table} = {{}}\n" for table in Registries._fields if not content and "ae" in table)
        (folder / "__init__.py").write_text(content + tables)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_the_packages_own_transformer_trains_the_same(parts: Path, tmp_path: Path) -> None:
    """Also in the pictures that a run makes of its student; and what it leaves is read without the package."""
    flags = guide_flags(parts, prompts=parts / "prompts.txt")
    rows = []
    for source in ("native", "upstream"):
        output = tmp_path / source
        assert (
            cli.main(["train", *flags, *ONE_ITERATION, "--opensora_source", source, "--output_dir", str(output)]) == 0
        )
        rows.append(json.loads((output / "metrics.jsonl").read_text()))
    assert importlib.import_module("opensora.models.diffusion").OpenSoraT2V_v1_3.calls > 8
    for name in ("loss_fake", "loss_student"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5)
    assert type(load_pipeline(tmp_path / "upstream" / "student").denoiser.model) is OpenSoraT2V_v1_3


def distilled(parts: Path, folder: Path) -> dict[str, object]:
    found = sources(parts)
    save_student(folder / "student", load_parts(found).denoiser.model, found, [899, 449])
    own = dict.fromkeys(("ae", "ae_path", "model_path", "text_encoder_name_1", "text_encoder_name_2"))
    return {**own, "model": folder / "student"}


def no_prompts(parts: Path, folder: Path) -> dict[str, object]:
    (folder / "prompts.txt").write_text("\n \n")
    return {"prompts": folder / "prompts.txt"}


Change = Callable[[Path, Path], dict[str, Any]]
BAD: list[tuple[Change, str]] = [
    (lambda parts, folder: {"model_path": parts / "vae"}, "--model_path|holds no OpenSoraT2V_v1_3. Tried"),
    (lambda parts, folder: {"ae_path": parts / "t5"}, "t5 holds no .*WFVAEModel"),
    (
        lambda parts, folder: {"text_encoder_name_1": "google/mt5-xxl"},
        "google/mt5-xxl: .* copy FOLDER here",
    ),
    (lambda parts, folder: {"text_encoder_name_1": parts / "vae"}, "--text_encoder_name_1 .*vae: its model is of type"),
    (lambda parts, folder: {"num_frames": 92}, r"--num_frames is 92; it comes as 1 \+ n·4, so 89 or 93 would do"),
    (lambda parts, folder: {"max_height": 639}, "--max_height is 639; .* so 624 or 640 would do"),
    (lambda parts, folder: {"opensora_source": "upstream"}, "--opensora_source upstream: no package opensora"),
    (lambda parts, folder: {"prompt_cache": folder / "none"}, "none holds no whole prompt cache"),
    (no_prompts, "--prompts .*prompts.txt: "),
    (distilled, "--cfg 4.5: .*student is distilled and knows no null prompt .* --cfg 1 would do"),
    (
        lambda parts, folder: {"model_path": None, "lora_save": "adapter", "roles": "lora"},
        "--lora_save adapter: OpenSoraT2V_v1_3_93x640x640 has no weights on disk",
    ),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_what_cannot_work_ends_with_code_2(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Change, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = guide_flags(parts, **change(parts, tmp_path), output_dir=tmp_path / "run")
    # What reads weights would be the long work.
    for place in ("models.loading.load_network", "models.registry.load_network", "encoders.EncoderFiles.load"):
        monkeypatch.setattr(f"tdm_fast.{place}", lambda *_, **__: pytest.fail("weights are read"))
    capsys.readouterr()
    assert cli.main(["train", *flags]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tdm-fast: ")]
    assert re.search(says, said), said
    assert not (tmp_path / "run").exists()
