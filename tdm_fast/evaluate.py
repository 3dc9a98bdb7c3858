"""Numbers for a teacher or a student of tiny-shapes: Fréchet distance, prompt accuracy, seconds per video."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from tdm_fast import tiny_shapes
from tdm_fast.config import BUNDLED_TEACHER
from tdm_fast.evaluator import ShapesEvaluator, all_correct, frechet_interval, moments
from tdm_fast.files import write_atomically
from tdm_fast.models.loading import METRICS_FILE, Pipeline, load_metrics, load_pipeline
from tdm_fast.models.networks import check_weights, load_network
from tdm_fast.pipeline import choose_timesteps
from tdm_fast.sample import best_guidance, check_guidance, generate
from tdm_fast.samplers import trailing_timesteps
from tdm_fast.text import PromptCache

NUM_VIDEOS = 4 * tiny_shapes.NUM_PROMPTS
NUM_REFERENCE = 32 * tiny_shapes.NUM_PROMPTS
# Seeds of what is compared: the reference set, the fresh real clips, the guidance sweep and the reported numbers.
REFERENCE_SEED, REAL_SEED, SWEEP_SEED, NOISE_SEED = 1001, 1002, 1003, 1004
TEACHER_STEPS, FEW_STEPS = 50, 4
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
REFERENCE_FILE = "reference.safetensors"


def load_evaluator(folder: Path) -> ShapesEvaluator:
    """The evaluation network of a teacher's folder. Raises ValueError when there is none."""
    if not (folder / "evaluator" / "config.json").is_file():
        raise ValueError(f"{folder}: no evaluator in it; evaluation takes a folder that `tdm-fast make-teacher` wrote")
    check_weights(folder / "evaluator")
    return load_network(folder / "evaluator", ShapesEvaluator).eval()


def load_reference(folder: Path, evaluator: ShapesEvaluator) -> tuple[Tensor, Tensor]:
    """The reference moments kept beside the evaluator, computed if they are not there.

    Raises ValueError when the file is damaged or of another evaluator.
    """
    path = folder / "evaluator" / REFERENCE_FILE
    if not path.is_file():
        return reference_moments(evaluator)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to have it computed again") from error
    size = evaluator.config.feature_dim
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != {"mean": [size], "covariance": [size, size]}:
        raise ValueError(f"{path} is not of this evaluator of {size} features; remove it to have it computed again")
    return tensors["mean"], tensors["covariance"]


class Yardstick(NamedTuple):
    """What a student is measured with: evaluator, reference moments, and its teacher's rows if they are known."""

    evaluator: ShapesEvaluator
    reference: tuple[Tensor, Tensor]
    teacher: dict[str, Any] | None


def load_yardstick(teacher: Pipeline) -> Yardstick | None:
    """The yardstick in a teacher's folder, None where it has no evaluator.

    Raises ValueError when it is damaged, or of other videos than the teacher makes.
    """
    evaluator = check_evaluator(teacher)
    if evaluator is None:
        return None
    return Yardstick(evaluator, load_reference(teacher.folder, evaluator), load_metrics(teacher.folder))


def check_evaluator(teacher: Pipeline) -> ShapesEvaluator | None:
    """The evaluator in a teacher's folder, None where there is none; raises ValueError as `load_yardstick`."""
    folder, shape = teacher.folder, (tiny_shapes.NUM_FRAMES, tiny_shapes.RESOLUTION, tiny_shapes.RESOLUTION)
    if not (folder / "evaluator").is_dir():
        return None
    if teacher.video_shape != shape:
        frames, height, width = teacher.video_shape
        raise ValueError(
            f"{folder}: its evaluator takes videos of {shape[0]} frames of {shape[1]} × {shape[2]}, but its transformer"
            f" and VAE make {frames} of {height} × {width}; --num_eval_videos 0 leaves the evaluation out"
        )
    return load_evaluator(folder)


@torch.no_grad()
def assess(videos: Iterable[Tensor], evaluator: ShapesEvaluator, attributes: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[N, F]` and correctness bool `[N]` of clips in chunks `[b, 3, T, H, W]`, for attributes `[N, 4]`."""
    parts = [evaluator(chunk) for chunk in videos]
    features = torch.cat([part.features for part in parts])
    logits = tuple(torch.cat(rows) for rows in zip(*(part.logits for part in parts), strict=True))
    return features, all_correct(logits, attributes)


def prompt_indices(count: int) -> list[int]:
    """The prompts of an evaluation: every one of the 144 in turn."""
    return [i % tiny_shapes.NUM_PROMPTS for i in range(count)]


def reference_moments(evaluator: ShapesEvaluator, count: int = NUM_REFERENCE) -> tuple[Tensor, Tensor]:
    """Feature mean and covariance of `count` real clips that no network was trained on."""
    return moments(_real_features(evaluator, REFERENCE_SEED, count)[0])


def measure_real(
    evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor], count: int = NUM_VIDEOS
) -> dict[str, Any]:
    """The floor: fresh real clips against the reference set."""
    began = time.perf_counter()
    features, correct = _real_features(evaluator, REAL_SEED, count)
    return _row(features, correct, reference, nfe=0, guidance=None, seconds=(time.perf_counter() - began) / count)


def _real_features(evaluator: ShapesEvaluator, seed: int, count: int) -> tuple[Tensor, Tensor]:
    size = tiny_shapes.NUM_PROMPTS
    attributes = tiny_shapes.sample_paths(count, seed=seed)[0]
    videos = (
        tiny_shapes.sample_clips(min(size, count - offset), seed=seed, sample_offset=offset)[0]
        for offset in range(0, count, size)
    )
    return assess(videos, evaluator, attributes)


def measure(
    pipeline: Pipeline,
    cache: PromptCache,
    evaluator: ShapesEvaluator,
    reference: tuple[Tensor, Tensor],
    timesteps: Sequence[int],
    *,
    guidance: float = 1.0,
    count: int = NUM_VIDEOS,
    seed: int = NOISE_SEED,
) -> dict[str, Any]:
    """One row of the table: sample `count` clips of the 144 prompts in turn and compare them with the reference.

    `nfe` counts network calls per video, a guided step being two.
    """
    indices = prompt_indices(count)
    clips = _Timed(generate(pipeline, cache, indices, timesteps, guidance=guidance, seed=seed))
    features, correct = assess(
        (
            clip.transpose(1, 2)
            for clip in tqdm(clips, desc=f"{len(timesteps)} steps, guidance {guidance:g}", leave=False)
        ),
        evaluator,
        tiny_shapes.attributes_of(torch.tensor(indices)),
    )
    calls = len(timesteps) * (1 if guidance == 1 else 2)
    return _row(features, correct, reference, nfe=calls, guidance=guidance, seconds=clips.seconds / count)


def _row(
    features: Tensor,
    correct: Tensor,
    reference: tuple[Tensor, Tensor],
    *,
    nfe: int,
    guidance: float | None,
    seconds: float,
) -> dict[str, Any]:
    odd = int((~features.isfinite().all(1)).sum())
    if odd:
        raise ValueError(f"{odd} of {len(features)} videos are not finite numbers; this model or its training diverged")
    value, low, high = frechet_interval(features, reference)
    return {
        "nfe": nfe,
        "guidance": guidance,
        "frechet": round(value, 4),
        "frechet_ci": [round(low, 4), round(high, 4)],
        "prompt_accuracy": round(correct.double().mean().item(), 4),
        "seconds_per_video": round(seconds, 4),
        "videos": len(features),
    }


class _Timed:
    """Iterates over something and adds up the seconds spent in producing its items, not in using them."""

    def __init__(self, items: Iterator[Tensor]) -> None:
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            began = time.perf_counter()
            item = next(self.items, None)
            self.seconds += time.perf_counter() - began
            if item is None:
                return
            yield item


def measure_teacher(folder: Path) -> dict[str, Any]:
    """`sweep_guidance` on a teacher's folder, whose numbers and reference are then kept beside its weights."""
    pipeline, evaluator = load_pipeline(folder), load_evaluator(folder)
    mean, covariance = reference_moments(evaluator)
    write_atomically(folder / "evaluator" / REFERENCE_FILE, save({"mean": mean, "covariance": covariance}))
    metrics = sweep_guidance(pipeline, evaluator, (mean, covariance))
    write_atomically(folder / METRICS_FILE, (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def sweep_guidance(pipeline: Pipeline, evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A teacher's own numbers, at the guidance that suits it best at 50 and at 4 steps, and those of real clips.

    The guidance is chosen on other noise than the reported row uses, so that the choice does not flatter the row.
    """
    cache = PromptCache.encode(tiny_shapes.all_prompts(), pipeline.tokenizer, pipeline.text_encoder)
    metrics: dict[str, Any] = {"real": measure_real(evaluator, reference)}
    for name, steps in (("teacher_few_step", FEW_STEPS), ("teacher", TEACHER_STEPS)):
        timesteps = trailing_timesteps(steps, pipeline.schedule.num_train_timesteps)
        sweep = [
            measure(
                pipeline, cache, evaluator, reference, timesteps, guidance=g, count=NUM_VIDEOS // 2, seed=SWEEP_SEED
            )
            for g in GUIDANCES
        ]
        best = min(sweep, key=lambda row: row["frechet"])["guidance"]
        row = measure(pipeline, cache, evaluator, reference, timesteps, guidance=best)
        metrics[name] = row | {
            "sweep": [{key: r[key] for key in ("guidance", "frechet", "prompt_accuracy")} for r in sweep]
        }
        print(name, json.dumps(metrics[name]), flush=True)
    return metrics


@dataclass(kw_only=True)
class EvaluateConfig:
    """What `tdm-fast evaluate` measures."""

    model: Path = BUNDLED_TEACHER
    """Folder of a student or a teacher; the bundled teacher if none is named."""
    evaluator: Path = BUNDLED_TEACHER
    """Folder of the teacher whose evaluator and reference are used."""
    sweep: bool = False
    """Measure a teacher's own numbers again: its guidance swept at 50 and at 4 steps. Writes `teacher_metrics.json`."""
    num_steps: int | None = None
    """Network steps; a student's own, or 50 for a teacher, if not given."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is none. If not given 1 for a student, a teacher's measured best if its folder has
    one, else 7.5."""
    num_videos: int = NUM_VIDEOS
    """Videos to measure, the 144 prompts in turn."""
    output: Path | None = None
    """JSON file for the row; printed only if not given."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure one model and print its row. Raises ValueError for folders and numbers that cannot work."""
    if config.num_videos < 64:
        raise ValueError(f"--num_videos {config.num_videos}: a Fréchet distance of 32 features takes at least 64")
    check_guidance(config.guidance)
    if config.sweep:
        return measure_teacher(config.model)
    pipeline, evaluator = load_pipeline(config.model), load_evaluator(config.evaluator)
    timesteps = choose_timesteps(pipeline, config.num_steps)
    guidance = best_guidance(pipeline, len(timesteps)) if config.guidance is None else config.guidance
    cache = PromptCache.encode(tiny_shapes.all_prompts(), pipeline.tokenizer, pipeline.text_encoder)
    reference = load_reference(config.evaluator, evaluator)
    row = measure(pipeline, cache, evaluator, reference, timesteps, guidance=guidance, count=config.num_videos)
    text = json.dumps(row, indent=2)
    print(text)
    if config.output:
        write_atomically(config.output, (text + "\n").encode())
    return row
