"""What a run shows at its end: numbers, table, and a picture and a video of teacher and student side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdm_fast import tiny_shapes
from tdm_fast.evaluate import (
    FEW_STEPS,
    NOISE_SEED,
    TEACHER_STEPS,
    Yardstick,
    measure,
    measure_real,
    sweep_guidance,
)
from tdm_fast.evaluator import ShapesEvaluator
from tdm_fast.files import write_atomically
from tdm_fast.models.loading import METRICS_FILE, Pipeline, load_metrics
from tdm_fast.sample import generate
from tdm_fast.samplers import trailing_timesteps
from tdm_fast.text import PromptCache
from tdm_fast.video import captioned, enlarge, enlargement, grid, to_uint8, write_video

NUM_SHOWN, NUM_PICTURED = 6, 3
NUM_TIMED = 12
ROWS = ("real", "teacher", "teacher_few_step", "student")
LABELS = {
    "real": "real videos",
    "teacher": "teacher",
    "teacher_few_step": "teacher, few steps",
    "student": "student",
}


def finish(
    output: Path,
    teacher: Pipeline,
    student: Pipeline,
    cache: PromptCache,
    yardstick: Yardstick | None,
    num_videos: int,
    *,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Measure the student beside the teacher, write `comparison.png` and `comparison.mp4`; returns the table's rows.

    Without a yardstick nothing is measured, only shown, the teacher at `guidance`. The teacher's quality is what its
    folder says it measured once, else it is measured now and kept in the run's folder; its seconds per video are
    measured here, so that all times are of this machine. What is shown is computed in `dtype`, as `generate` says.
    """
    assert student.timesteps is not None
    rows: dict[str, Any] = {}
    guidances = {"teacher": guidance, "teacher_few_step": guidance, "student": 1.0}
    if yardstick:
        evaluator, reference, known = yardstick
        known = known or _swept_here(output, teacher, evaluator, reference)
        tiny_cache = PromptCache.encode(tiny_shapes.all_prompts(), student.tokenizer, student.text_encoder)
        rows["real"] = measure_real(evaluator, reference, num_videos)
        if num_videos != known["teacher"]["videos"]:
            print(
                f"note: student and real videos are measured on {num_videos} videos, the teacher was on"
                f" {known['teacher']['videos']}; Fréchet distances of fewer videos are larger",
                file=sys.stderr,
            )
        for name in ("teacher", "teacher_few_step"):
            rows[name] = {key: value for key, value in known[name].items() if key != "sweep"}
            guidances[name] = rows[name]["guidance"]
        rows["student"] = measure(student, tiny_cache, evaluator, reference, student.timesteps, count=num_videos)
    steps = {
        "teacher": trailing_timesteps(TEACHER_STEPS, teacher.schedule.num_train_timesteps),
        "teacher_few_step": trailing_timesteps(FEW_STEPS, teacher.schedule.num_train_timesteps),
        "student": list(student.timesteps),
    }
    # Five more each time, so that with tiny-shapes no attribute stays the same across the picture.
    shown = [(i * len(cache) // NUM_SHOWN + 5 * i) % len(cache) for i in range(min(NUM_SHOWN, len(cache)))]
    timed = (shown * NUM_TIMED)[:NUM_TIMED] if yardstick else shown
    clips: dict[str, list[Tensor]] = {}
    for name, timesteps in steps.items():
        began = time.perf_counter()
        pipeline = student if name == "student" else teacher
        chunks = generate(pipeline, cache, timed, timesteps, guidance=guidances[name], seed=NOISE_SEED, dtype=dtype)
        clips[name] = [to_uint8(clip) for chunk in chunks for clip in chunk]
        if yardstick:
            rows[name]["seconds_per_video"] = round((time.perf_counter() - began) / len(timed), 4)
    compare(
        output, clips, {name: len(timesteps) for name, timesteps in steps.items()}, [cache.prompts[i] for i in shown]
    )
    if yardstick:
        print(table(rows))
    return rows


def _swept_here(
    output: Path, teacher: Pipeline, evaluator: ShapesEvaluator, reference: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The numbers of a teacher whose folder has none, kept in the run's folder: the teacher's is not ours to write."""
    if (known := load_metrics(output)) is None:
        print(f"note: {teacher.folder} has no {METRICS_FILE}; its guidance is swept now, which takes minutes")
        known = sweep_guidance(teacher, evaluator, reference)
        write_atomically(output / METRICS_FILE, (json.dumps(known, indent=2) + "\n").encode())
    return known


def compare(
    output: Path, clips: Mapping[str, Sequence[Tensor]], steps: Mapping[str, int], prompts: Sequence[str]
) -> None:
    """`comparison.mp4`, a column a prompt, and `comparison.png`, its first prompts at three times; a row a model.

    Clips are uint8 `[T, H, W, 3]`; what is small is shown up to three times as large.
    """
    names = {name: f"{LABELS[name].split(',')[0]}, {steps[name]} steps" for name in clips}
    videos = {
        name: [enlarge(clip, enlargement(clip, most=3)) for clip in row[: len(prompts)]] for name, row in clips.items()
    }
    write_video(output / "comparison.mp4", _labelled(videos, names, prompts))
    stills = {
        name: [
            grid([[clip[i][None] for i in sorted({0, len(clip) // 2, len(clip) - 1})]], gap=1)
            for clip in row[:NUM_PICTURED]
        ]
        for name, row in videos.items()
    }
    write_video(output / "comparison.png", _labelled(stills, names, prompts[:NUM_PICTURED]))


def _labelled(rows: Mapping[str, Sequence[Tensor]], names: Mapping[str, str], prompts: Sequence[str]) -> Tensor:
    """Rows of clips uint8 `[T, H, W, 3]` to one clip: the model's name above a row's first, the prompts on top."""
    named = [
        [captioned(clip, names[name] if column == 0 else "") for column, clip in enumerate(clips)]
        for name, clips in rows.items()
    ]
    named[0] = [captioned(clip, prompt) for clip, prompt in zip(named[0], prompts, strict=True)]
    first, *rest = (grid([row]) for row in named)
    return torch.cat([first, *rest], dim=1)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | network calls | guidance | Fréchet distance (95 % interval) | prompt accuracy | seconds per video |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        row = rows[name]
        low, high = row["frechet_ci"]
        guidance = "" if row["guidance"] is None else f"{row['guidance']:g}"
        lines.append(
            f"| {LABELS[name]} | {row['nfe'] or ''} | {guidance} | {row['frechet']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {100 * row['prompt_accuracy']:.1f} % | {row['seconds_per_video']:.4f} |"
        )
    return "\n".join(lines)
