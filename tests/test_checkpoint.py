"""Checkpoints: whole or not at all, the newest kept, optimisers restored to the bit."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdm_fast import checkpoint
from tdm_fast.checkpoint import (
    SaveError,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    locked,
    optimizer_tensors,
    save_checkpoint,
    whole_folder,
    write_atomically,
)


def groups(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "student": {"a.weight": torch.full((3, 5), value), "b": torch.tensor(value)},
        "optimizer": {"0.step": torch.tensor(value), "0.exp_avg": torch.full((2,), value, dtype=torch.float64)},
        "empty": {},
    }


def assert_holds(path: Path, value: float) -> None:
    loaded, _ = load_checkpoint(path)
    wanted = groups(value)
    assert loaded.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert loaded[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(loaded[name][key], tensor) and loaded[name][key].dtype == tensor.dtype


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run", 7, groups(1.5), {"seconds": 2.5, "config": {"a": None}})
    assert path == tmp_path / "run" / "checkpoint-7"
    assert_holds(path, 1.5)
    assert load_checkpoint(path)[1] == {"step": 7, "seconds": 2.5, "config": {"a": None}}


def test_views_and_slices_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    path = save_checkpoint(tmp_path, 1, {"x": {"turned": base.T, "part": base[:, 1], "same": base}}, {})
    loaded = load_checkpoint(path)[0]["x"]
    assert torch.equal(loaded["turned"], base.T) and torch.equal(loaded["part"], base[:, 1])


def test_the_newest_are_kept_and_found_by_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None and checkpoints(tmp_path) == []
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, groups(step), {}, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"
    save_checkpoint(tmp_path, 12, groups(12), {})
    assert len(checkpoints(tmp_path)) == 4


def test_going_back_deletes_nothing_later(tmp_path: Path) -> None:
    for step in (5, 6, 7):
        save_checkpoint(tmp_path, step, groups(step), {})
    for step, left in ((1, [1, 5, 6, 7]), (2, [1, 2, 5, 6, 7]), (3, [2, 3, 5, 6, 7]), (6, [5, 6, 7])):
        save_checkpoint(tmp_path, step, groups(-step), {}, keep=2)
        assert [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)] == left
    assert_holds(tmp_path / "checkpoint-6", -6)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"old": {"x": torch.zeros(1)}, **groups(1)}, {})
    save_checkpoint(tmp_path, 1, groups(2), {})
    assert_holds(tmp_path / "checkpoint-1", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_what_is_not_whole_is_not_a_checkpoint(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 1, groups(1), {})
    partial = tmp_path / ".checkpoint-2.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-4").write_text("a file")
    assert checkpoints(tmp_path) == [whole]
    save_checkpoint(tmp_path, 2, groups(2), {})
    assert not partial.exists()
    assert_holds(tmp_path / "checkpoint-2", 2)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_leaves_the_last_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, step: int
) -> None:
    save_checkpoint(tmp_path, 1, groups(1), {})
    written, write = [], checkpoint._write

    def write_until_full(path: Path, data: bytes) -> None:
        if len(written) == after:
            path.write_bytes(data[: len(data) // 2])
            no_space()
        written.append(path)
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write", write_until_full)
    with pytest.raises(SaveError, match=f"checkpoint-{step}: No space left on device. .*is {tmp_path}/checkpoint-1"):
        save_checkpoint(tmp_path, step, groups(2), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_a_failing_sync_is_a_failure_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SaveError, match="No checkpoint had been saved before"):
        save_checkpoint(tmp_path, 1, groups(1), {})
    assert checkpoints(tmp_path) == []
    (tmp_path / "file").write_text("old")
    with pytest.raises(SaveError, match=r"could not write .*file: No space left on device"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_whole_or_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError, match="stop"), whole_folder(target) as partial:
        (partial / "a").write_text("2")
        raise RuntimeError("stop")
    with pytest.raises(SaveError, match="No space left"), whole_folder(target) as partial:
        no_space()
    assert (target / "a").read_text() == "1"
    with whole_folder(target) as partial:
        (partial / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    for _ in range(2):
        with locked(folder), pytest.raises(ValueError, match="deep/run is in use by another run"), locked(folder):
            pass
        with pytest.raises(RuntimeError, match="stop"), locked(folder):
            raise RuntimeError("stop")
    assert not any(folder.iterdir())


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = checkpoint._sync

    def watch(path: Path) -> None:
        synced.append(path)
        assert (tmp_path / "folder").exists() == (path == tmp_path)
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", watch)
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text("written by somebody else")
    assert {path.name for path in synced} == {"weights", "deep", partial.name, tmp_path.name}


def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, groups(1), {})
    weights = path / "student.safetensors"
    data = weights.read_bytes()
    for bad in (data[:-3], data[:4], b""):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match=f"checkpoint {path} is damaged"):
            load_checkpoint(path)
    weights.write_bytes(data)
    (path / "state.json").write_text('{"step": 1')
    with pytest.raises(ValueError, match=f"checkpoint {path} is damaged"):
        load_checkpoint(path)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"is not a checkpoint \(no state.json; found: empty.safetensors"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="no such folder"):
        load_checkpoint(tmp_path / "checkpoint-9")


def test_write_atomically_replaces(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "metrics.json"
    for text in ("{}", json.dumps({"a": 1})):
        write_atomically(path, text.encode())
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_a_restored_optimiser_goes_on_to_the_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(6, 4, 3, generator=generator)

    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.0, 0.95), weight_decay=1e-2)

    def steps(model: torch.nn.Linear, optimizer: torch.optim.AdamW, which: range) -> None:
        for i in which:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
            optimizer.zero_grad()
            (model.weight - targets[i]).square().sum().add(model.bias.sum() ** 2).backward()
            optimizer.step()

    whole, resumed = make(), make()
    steps(*whole, range(6))
    steps(*resumed, range(3))
    saved = {"model": dict(resumed[0].named_parameters()), "optimizer": optimizer_tensors(resumed[1])}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, saved, {}))
    again = make()
    again[0].load_state_dict(loaded["model"])
    load_optimizer_tensors(again[1], loaded["optimizer"])
    steps(*again, range(3, 6))
    assert torch.equal(again[0].weight, whole[0].weight) and torch.equal(again[0].bias, whole[0].bias)
    ours, theirs = optimizer_tensors(again[1]), optimizer_tensors(whole[1])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
