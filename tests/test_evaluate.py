"""The numbers: rows, the choice of the guidance, and what a run shows at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tdm_fast import cli, report, tiny_shapes
from tdm_fast import evaluate as module
from tdm_fast.config import ModelConfig, RunConfig, TrainConfig
from tdm_fast.evaluate import (
    EvaluateConfig,
    assess,
    evaluate,
    load_evaluator,
    load_reference,
    measure,
    measure_teacher,
    prompt_indices,
    reference_moments,
)
from tdm_fast.evaluator import ShapesEvaluator, frechet_distance, moments
from tdm_fast.models.loading import load_pipeline
from tdm_fast.models.student import save_student
from tdm_fast.sample import UNMEASURED_GUIDANCE, generate
from tdm_fast.samplers import trailing_timesteps
from tdm_fast.text import PromptCache
from tdm_fast.train import train
from tdm_fast.video import to_uint8

COUNT = 64
NODES = (899, 674, 449, 224)
KNOWN = {"guidance": 1.5, "frechet": 2.0, "frechet_ci": [1.9, 2.1], "prompt_accuracy": 0.75, "nfe": 8, "videos": 576}
ROW = {"nfe", "guidance", "frechet", "frechet_ci", "prompt_accuracy", "seconds_per_video", "videos"}


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds_per_video"}


@pytest.fixture(scope="module")
def evaluator(tiny_shapes_teacher: Path) -> ShapesEvaluator:
    return load_evaluator(tiny_shapes_teacher)


@pytest.fixture(scope="module")
def reference(evaluator: ShapesEvaluator) -> tuple[Tensor, Tensor]:
    return reference_moments(evaluator, 160)


@pytest.fixture
def folder(tiny_shapes_teacher: Path, reference: tuple[Tensor, Tensor], tmp_path: Path) -> Path:
    """A copy of the teacher with the reference that it is measured against."""
    folder = Path(shutil.copytree(tiny_shapes_teacher, tmp_path / "teacher"))
    save_file({"mean": reference[0], "covariance": reference[1]}, folder / "evaluator" / "reference.safetensors")
    return folder


def test_every_prompt_has_its_turn() -> None:
    assert prompt_indices(300) == [*range(144), *range(144), *range(12)]


def test_the_reference_is_of_real_clips_and_kept(
    folder: Path, evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, _, _ = tiny_shapes.sample_clips(160, seed=module.REFERENCE_SEED)
    with torch.no_grad():
        mean, covariance = moments(evaluator(videos).features)
    torch.testing.assert_close(reference[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference[1], covariance, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(module, "reference_moments", lambda _: pytest.fail("computed again"))
    assert all(torch.equal(a, b) for a, b in zip(load_reference(folder, evaluator), reference, strict=True))


def test_assessing_in_chunks_changes_nothing(evaluator: ShapesEvaluator) -> None:
    videos, attributes, _ = tiny_shapes.sample_clips(7, seed=0)
    features, correct = assess([videos[:4], videos[4:]], evaluator, attributes)
    whole, right = assess([videos], evaluator, attributes)
    torch.testing.assert_close(features, whole, rtol=1e-4, atol=1e-5)
    assert features.shape == (7, 6) and correct.tolist() == right.tolist()


def test_a_row_says_what_its_clips_are(
    folder: Path, evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor]
) -> None:
    pipeline = load_pipeline(folder)
    cache = PromptCache.encode(tiny_shapes.all_prompts(), pipeline.tokenizer, pipeline.text_encoder)
    row = measure(pipeline, cache, evaluator, reference, [999, 499], guidance=2.0, count=COUNT)
    assert row.keys() == ROW and (row["nfe"], row["guidance"], row["videos"]) == (4, 2.0, COUNT)
    clips = torch.cat(list(generate(pipeline, cache, range(COUNT), [999, 499], guidance=2.0, seed=module.NOISE_SEED)))
    attributes = tiny_shapes.attributes_of(torch.arange(COUNT))
    features, correct = assess([clips.transpose(1, 2)], evaluator, attributes)
    assert row["frechet"] == pytest.approx(frechet_distance(moments(features), reference), rel=1e-3, abs=1e-4)
    assert row["prompt_accuracy"] == pytest.approx(float(correct.double().mean()), abs=1e-4)
    low, high = row["frechet_ci"]
    assert low <= row["frechet"] <= high and row["seconds_per_video"] > 0
    unguided = measure(pipeline, cache, evaluator, reference, [999, 499], count=COUNT)
    assert (unguided["nfe"], unguided["guidance"]) == (2, 1.0) and unguided["frechet"] != row["frechet"]


def test_the_same_command_gives_the_same_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", folder, "--evaluator", folder, "--num_steps", 2, "--num_videos", COUNT]
    shown = []
    for name in "ab":
        output = tmp_path / f"{name}.json"
        assert cli.main(["evaluate", *map(str, flags), "--output", str(output)]) == 0
        assert json.loads(output.read_text()) == json.loads(capsys.readouterr().out)
        shown.append(untimed(json.loads(output.read_text())))
    assert shown[0] == shown[1]


def test_a_teacher_is_evaluated_at_its_best_guidance(folder: Path) -> None:
    config = EvaluateConfig(model=folder, evaluator=folder, num_steps=1, num_videos=COUNT)
    assert evaluate(config)["guidance"] == UNMEASURED_GUIDANCE
    (folder / "teacher_metrics.json").write_text(json.dumps({"teacher": KNOWN, "teacher_few_step": KNOWN}))
    assert evaluate(config)["guidance"] == KNOWN["guidance"] == 1.5
    config.guidance = 3.0
    assert evaluate(config)["guidance"] == 3.0


def test_the_guidance_is_the_sweeps_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {4: 1.5, 50: 3.0}
    seeds: dict[str, set[int]] = {"sweep": set(), "reported": set()}

    def fake(*arguments: Any, guidance: float, count: int = 576, seed: int = module.NOISE_SEED) -> dict[str, Any]:
        steps = len(arguments[4])
        seeds["reported" if count == 576 else "sweep"].add(seed)
        return {"guidance": guidance, "frechet": abs(guidance - best[steps]) + 0.1, "prompt_accuracy": 0.5}

    monkeypatch.setattr(module, "measure", fake)
    monkeypatch.setattr(module, "measure_real", lambda *_: {"frechet": 0.01})
    monkeypatch.setattr(module, "reference_moments", lambda _: (torch.zeros(2), torch.eye(2)))
    metrics = measure_teacher(folder)
    assert metrics == json.loads((folder / "teacher_metrics.json").read_text())
    assert {name: row.get("guidance") for name, row in metrics.items()} == {
        "real": None,
        "teacher_few_step": 1.5,
        "teacher": 3.0,
    }
    assert [row["guidance"] for row in metrics["teacher"]["sweep"]] == list(module.GUIDANCES)
    assert not seeds["sweep"] & seeds["reported"]
    assert torch.equal(load_file(folder / "evaluator" / "reference.safetensors")["covariance"], torch.eye(2))


def test_a_run_ends_with_table_picture_and_video(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"real": {}, "teacher": {**KNOWN, "nfe": 100}, "teacher_few_step": {**KNOWN, "guidance": 1.0}}
    (folder / "teacher_metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(report, "NUM_TIMED", 2)
    monkeypatch.setattr(report, "TEACHER_STEPS", 5)
    teacher = load_pipeline(folder)
    save_student(tmp_path / "student", teacher.denoiser.model, folder, NODES)
    student = load_pipeline(tmp_path / "student")
    cache = PromptCache.encode(["red circle", "blue square"], teacher.tokenizer, teacher.text_encoder)
    yardstick = module.load_yardstick(teacher)
    results = [report.finish(tmp_path, teacher, student, cache, yardstick, COUNT) for _ in range(2)]
    assert [untimed(row) for row in results[0].values()] == [untimed(row) for row in results[1].values()]
    rows = results[0]
    assert set(rows) == {"real", "teacher", "teacher_few_step", "student"}
    assert all(ROW - {"videos"} <= row.keys() and "sweep" not in row for row in rows.values())
    assert (rows["student"]["nfe"], rows["student"]["guidance"], rows["student"]["videos"]) == (4, 1.0, COUNT)
    assert (rows["teacher"]["frechet"], rows["teacher"]["nfe"]) == (2.0, 100)
    assert rows["real"]["nfe"] == 0 and rows["real"]["frechet"] < rows["student"]["frechet"]
    assert rows["real"]["videos"] == COUNT
    table, notes = capsys.readouterr()
    assert f"are measured on {COUNT} videos, the teacher was on 576" in notes
    assert "| teacher, few steps | 8 | 1 | 2.000 (1.900 to 2.100) | 75.0 % |" in table and table.count("| real") == 2
    with Image.open(tmp_path / "comparison.png") as picture:
        # Three rows of models, two columns of prompts, three frames of each clip.
        assert picture.width * picture.height > 3 * 2 * 3 * 64 * 64
    assert (tmp_path / "comparison.mp4").stat().st_size > 0


def test_without_a_yardstick_a_teacher_is_shown_as_it_was_distilled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "TEACHER_STEPS", 3)
    shown: dict[str, Any] = {}
    monkeypatch.setattr(report, "compare", lambda _, clips, steps, prompts: shown.update(clips))
    teacher = load_pipeline(folder)
    save_student(tmp_path / "student", teacher.denoiser.model, folder, NODES)
    student = load_pipeline(tmp_path / "student")
    cache = PromptCache.encode(["red circle", "blue square"], teacher.tokenizer, teacher.text_encoder)
    assert report.finish(tmp_path, teacher, student, cache, None, 0, guidance=4.5) == {}
    for name, model, nodes, guidance in (
        ("teacher", teacher, trailing_timesteps(3, 1000), 4.5),
        ("teacher_few_step", teacher, trailing_timesteps(4, 1000), 4.5),
        ("student", student, NODES, 1.0),
    ):
        (clips,) = generate(model, cache, [0, 1], nodes, guidance=guidance, seed=module.NOISE_SEED)
        assert len(shown[name]) == 2
        assert all(torch.equal(one, to_uint8(clip)) for one, clip in zip(shown[name], clips, strict=True))


def test_a_teacher_without_numbers_is_measured_into_the_runs_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {"real": {}, "teacher": KNOWN, "teacher_few_step": KNOWN}
    monkeypatch.setattr(report, "sweep_guidance", lambda *_: metrics)
    monkeypatch.setattr(report, "TEACHER_STEPS", 4)
    teacher = load_pipeline(folder)
    save_student(tmp_path / "student", teacher.denoiser.model, folder, NODES)
    student = load_pipeline(tmp_path / "student")
    cache = PromptCache.encode(["red circle"], teacher.tokenizer, teacher.text_encoder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for _ in range(2):
        rows = report.finish(tmp_path, teacher, student, cache, module.load_yardstick(teacher), COUNT)
        assert rows["teacher"]["frechet"] == KNOWN["frechet"]
        monkeypatch.setattr(report, "sweep_guidance", lambda *_: pytest.fail("measured again"))
    assert json.loads((tmp_path / "teacher_metrics.json").read_text()) == metrics
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_evaluator_of_other_videos_is_refused_before_the_training(
    tiny_teacher: Path, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    shutil.copytree(folder / "evaluator", other / "evaluator")
    config = TrainConfig(model=ModelConfig(model=other), run=RunConfig(output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"takes videos of 17 frames of 64 × 64, .* make 5 of 32 × 32"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("evaluator/reference.safetensors", b"cut short", "reference.safetensors is damaged"),
        ("evaluator/reference.safetensors", save({"mean": torch.zeros(6)}), "is not of this evaluator of 6 features"),
        ("evaluator/config.json", b'{"width": 8, "feature_dim": 6}', "are not of one ShapesEvaluator"),
        ("teacher_metrics.json", b'{"teacher": {', "teacher_metrics.json is damaged"),
        ("teacher_metrics.json", b"[]", "it is no JSON object"),
        ("teacher_metrics.json", json.dumps({"teacher": KNOWN}).encode(), "it lacks teacher_few_step"),
        (
            "teacher_metrics.json",
            json.dumps({"teacher": KNOWN, "teacher_few_step": KNOWN | {"frechet": None}}).encode(),
            "teacher_few_step lacks numbers",
        ),
    ],
)
def test_a_damaged_yardstick_is_refused_before_the_training(
    folder: Path, tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    (folder / file).write_bytes(content)
    config = TrainConfig(model=ModelConfig(model=folder), run=RunConfig(output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match=says) as error:
        train(config)
    assert str(folder) in str(error.value) and not (tmp_path / "run").exists()


def test_videos_that_are_not_finite_are_counted(
    folder: Path, evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(folder)
    cache = PromptCache.encode(tiny_shapes.all_prompts(), pipeline.tokenizer, pipeline.text_encoder)
    clips = torch.zeros(COUNT, 17, 3, 64, 64)
    clips[3, 0, 0, 0, 0], clips[9, 2, 1, 5, 5] = float("nan"), float("inf")
    monkeypatch.setattr(module, "generate", lambda *_, **__: iter(clips.split(16)))
    with pytest.raises(ValueError, match=f"2 of {COUNT} videos are not finite"):
        measure(pipeline, cache, evaluator, reference, [999], count=COUNT)


def test_what_cannot_be_evaluated_is_refused(tiny_teacher: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluator in it"):
        evaluate(EvaluateConfig(model=folder, evaluator=tiny_teacher))
    with pytest.raises(ValueError, match=r"videos has shape \[48, 3, 5, 32, 32\]"):
        evaluate(EvaluateConfig(model=tiny_teacher, evaluator=folder, num_steps=1, num_videos=COUNT))
    with pytest.raises(ValueError, match="--num_videos 63"):
        evaluate(EvaluateConfig(model=folder, evaluator=folder, num_videos=63))
