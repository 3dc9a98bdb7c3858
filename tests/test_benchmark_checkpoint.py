"""The benchmark of checkpoints leaves its numbers and their table."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "checkpoint"


def test_it_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "1", "--parameters", "1e6", "--saves", "3", "--output", str(tmp_path)]
    assert runpy.run_path(str(SCRIPT))["main"](arguments) == 0
    (file,) = tmp_path.glob("checkpoint-1m-1ranks_*.json")
    data = json.loads(file.read_text())
    assert 28 * 2**20 < data["bytes"] < 29 * 2**20  # seven tensors of a million float32
    counts = {name: len(seconds) for name, seconds in data["seconds"].items()}
    assert list(counts.values()) == [1, 2, 3, 1, 1]
    table = file.with_suffix(".md").read_text()
    assert all(f"\n| {name} | " in table for name in counts) and table in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--saves 1", "--ranks 3", "--ranks 2 --device cuda"])
def test_what_cannot_work_is_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"](flags.split())
    assert f"{flags}: " in capsys.readouterr().err
