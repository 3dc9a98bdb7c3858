"""Checkpoints: whole or not at all, the newest kept, optimisers restored to the bit."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import checkpoint_jobs as jobs
import few_ranks
import pytest
import torch
from torch import Tensor, nn

from tdm_fast import checkpoint, files
from tdm_fast.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from tdm_fast.files import (
    LOCK_FILE,
    STATE_FILE,
    SaveError,
    checkpoints,
    latest_checkpoint,
    locked,
    whole_folder,
    write_atomically,
)
from tdm_fast.optimizer_state import load_optimizer_tensors, optimizer_tensors


def names(folder: Path) -> list[str]:
    """What is in a run's folder besides its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE)


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
@pytest.mark.parametrize("after", [0, 1, 9])
def test_a_full_disk_leaves_the_last_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, step: int
) -> None:
    save_checkpoint(tmp_path, 1, groups(1), {})
    written, write = [], checkpoint._HashedFile.write

    def write_until_full(file: checkpoint._HashedFile, data: bytes) -> int:
        if len(written) == after:
            write(file, bytes(data)[: len(data) // 2])
            no_space()
        written.append(file)
        return write(file, data)

    monkeypatch.setattr(checkpoint._HashedFile, "write", write_until_full)
    with pytest.raises(SaveError, match=f"checkpoint-{step}: No space left on device. .*is {tmp_path}/checkpoint-1"):
        save_checkpoint(tmp_path, step, groups(2), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_a_failing_sync_or_state_is_a_failure_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(SaveError, match="No checkpoint had been saved before"):
        patch.setattr(files, "write", no_space)
        save_checkpoint(tmp_path, 1, groups(1), {})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SaveError, match="No checkpoint had been saved before"):
        save_checkpoint(tmp_path, 1, groups(1), {})
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("old")
    with pytest.raises(SaveError, match=r"could not write .*file: No space left on device"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


class Disk:
    """Writing that waits until it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.fails, write = threading.Event(), False, checkpoint._HashedFile.write

        def slow(file: checkpoint._HashedFile, data: bytes) -> int:
            assert self.go.wait(30)
            return no_space() or 0 if self.fails else write(file, data)

        monkeypatch.setattr(checkpoint._HashedFile, "write", slow)


def test_the_loop_waits_for_copies_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, now = Disk(monkeypatch), groups(1)
    with Checkpoints(tmp_path, keep=1) as store:
        store.save(1, now, {})
        assert not checkpoints(tmp_path) and not store.failed and store.last == tmp_path / "checkpoint-1"
        for tensor in checkpoint.flat(now).values():
            tensor.fill_(9)
        waiting = threading.Thread(target=lambda: store.save(2, now, {}))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive() and not checkpoints(tmp_path)  # for the save before
        disk.go.set()
        waiting.join()
        assert_holds(tmp_path / "checkpoint-1", 1)
        disk.go.clear()
        threading.Timer(0.1, disk.go.set).start()
    assert_holds(tmp_path / "checkpoint-2", 9)  # the end waits, too
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_failure_in_the_background_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.go.set()
    says = (
        f"could not write {tmp_path}/checkpoint-2: No space left on device. The last whole .* {tmp_path}/checkpoint-1"
    )
    for end in ("wait", "save", "exit"):
        disk.fails = False
        with pytest.raises(SaveError, match=says), Checkpoints(tmp_path) as store:
            store.save(1, groups(1), {})
            store.wait()
            disk.fails = True
            store.save(2, groups(2), {})
            while not store.failed:
                time.sleep(0.001)
            if end != "exit":
                with pytest.raises(SaveError, match=says) as failure:
                    store.wait() if end == "wait" else store.save(3, groups(3), {})
                assert store.last == tmp_path / "checkpoint-1" and not store.failed
                raise failure.value
        assert names(tmp_path) == ["checkpoint-1"]


def test_a_run_that_fails_lets_its_save_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(monkeypatch)
    for step, fails in ((1, False), (2, True)):
        disk.go.clear()
        disk.fails = fails
        with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as store:
            store.save(step, groups(1), {})
            threading.Timer(0.05, disk.go.set).start()
            raise KeyboardInterrupt
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "note: could not write" in capsys.readouterr().err


def test_what_killed_runs_left_is_cleared_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, groups(step), {})
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old")  # killed while it was replaced
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-3.old")  # killed when it had been
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.gone")
    for name in (".checkpoint-2.partial", ".checkpoint-4.partial", ".mine"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another run"), Checkpoints(tmp_path):
        pass
    assert names(tmp_path) == before  # by one that has the lock
    with Checkpoints(tmp_path):
        assert names(tmp_path) == [".mine", "checkpoint-2", "checkpoint-3"]
        with pytest.raises(ValueError, match="in use by another run"), Checkpoints(tmp_path):
            pass
    assert_holds(tmp_path / "checkpoint-2", 2)
    with Checkpoints(tmp_path):
        pass


def test_no_clock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.cycle([2e9, 0.0, -1e6, 4e9])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    with Checkpoints(tmp_path, keep=2) as store:
        for step, moment in ((1, 4e9), (2, 3e9), (10, 1e9), (9, 2e9)):
            store.save(step, groups(step), {})
            store.wait()
            os.utime(store.last, (moment, moment))
        assert store.newest() == tmp_path / "checkpoint-10"
        store.save(11, groups(11), {})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert_holds(latest_checkpoint(tmp_path), 11)


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
    assert not names(folder)


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    sync = files.sync

    def watch(path: Path) -> None:
        synced.append(path)
        assert (tmp_path / "folder").exists() == (path == tmp_path)
        sync(path)

    monkeypatch.setattr(files, "sync", watch)
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text("written by somebody else")
    assert {path.name for path in synced} == {"weights", "deep", partial.name, tmp_path.name}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path / "run", 1, groups(1), {"config": {"a": 0.125}})
    other = save_checkpoint(tmp_path / "other", 1, groups(2), {"config": {"a": 0.375}})
    file = path / name
    data = file.read_bytes()
    rotten = bytearray(data)
    rotten[data.index(b"0.125") if name == STATE_FILE else len(data) // 2] ^= 1
    wrong = {
        "cut": (data[:-3], "bytes, not .*: cut"),
        "empty": (b"", "has 0 bytes"),
        "longer": (data + b"x", "bytes, not .*: too long"),
        "rotten": (bytes(rotten), "is not as it was saved: its SHA-256 differs"),
        "foreign": ((other / name).read_bytes(), "is not as it was saved: its SHA-256 differs"),
    }
    if name == ".metadata":
        wrong["foreign"] = (data.replace(b"student", b"STUDENT"), "is not as it was saved")
    if name == STATE_FILE:
        wrong = {
            "rotten": wrong["rotten"],
            **{kind: (wrong[kind][0], "is no JSON object") for kind in ("cut", "empty")},
        }
        wrong["no object"] = (b"[1]", "is no JSON object")
        (path / name).write_bytes((other / name).read_bytes())
        with pytest.raises(ValueError, match=r"is damaged \((__0_0.distcp|.metadata) "):
            load_checkpoint(path)
    for kind, (bad, what) in wrong.items():
        assert bad != data, kind
        file.write_bytes(bad)
        says = rf"checkpoint {path} is damaged \({name} .*{what}.*\); remove it to go on from the one before"
        with pytest.raises(ValueError, match=says) as error:
            load_checkpoint(path)
        assert len(str(error.value).splitlines()) == 1
    file.unlink()
    with pytest.raises(
        ValueError, match=rf"{name} is missing|is not a checkpoint \(no state.json; found: .metadata, __0"
    ):
        load_checkpoint(path)
    file.write_bytes(data)
    assert_holds(path, 1)


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a checkpoint \(no state.json; found: no such folder"):
        load_checkpoint(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match=r"is not a checkpoint \(no state.json; found: an empty folder"):
        load_checkpoint(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(ValueError, match="is of another version of tdm-fast"):
        load_checkpoint(tmp_path)


def test_shapes_and_meta_are_known_before_anything_is_read(tmp_path: Path) -> None:
    saved = groups(1.0)
    with Checkpoints(tmp_path) as store:
        assert store.newest() is None
        store.save(5, saved, {"config": "mine"})
        store.wait()
        found = store.read(store.newest())
        assert found.path == tmp_path / "checkpoint-5" and found.meta == {"step": 5, "config": "mine"}
        for group, tensors in saved.items():
            for name, tensor in tensors.items():
                told = found.groups[group][name]
                assert told.is_meta and told.shape == tensor.shape and told.dtype == tensor.dtype
        target = {"student": {"a.weight": nn.Parameter(torch.zeros(3, 5)), "b": torch.zeros(())}}
        pointers = [tensor.data_ptr() for tensor in target["student"].values()]
        store.load(found, target)
        assert pointers == [tensor.data_ptr() for tensor in target["student"].values()]
        assert torch.equal(target["student"]["a.weight"], saved["student"]["a.weight"]) and store.last == found.path
        bad = {
            "1 tensors of student are in one of them alone, b in the checkpoint": {"a.weight": torch.zeros(3, 5)},
            "1 tensors of student .*, c in this run": {**target["student"], "c": torch.zeros(1)},
            r"student/b is float32 \[\] there and float32 \[1\] here": {**target["student"], "b": torch.zeros(1)},
            r"student/b is float32 \[\] there and int64 \[\] here": {**target["student"], "b": torch.tensor(1)},
        }
        for says, tensors in bad.items():
            with pytest.raises(ValueError, match=f"checkpoint-5 does not fit this run: {says}"):
                store.load(found, {"student": tensors})


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


def test_states_made_of_tensors_are_saved_in_parts(tmp_path: Path) -> None:
    def make() -> tuple[Tensor, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.ones(2, 4))
        return parameter, jobs.Eighths([parameter], lr=torch.tensor(0.5))

    whole, resumed, again = make(), make(), make()
    for parameter, optimizer in (whole, resumed):
        for step in range(2):
            parameter.grad = torch.arange(8.0).view(2, 4) + step
            optimizer.step()
    tensors = optimizer_tensors(resumed[1])
    assert set(tensors) == {"0.moment.codes", "0.moment.scale", "0.moment.qmap", "0.step"}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 2, {"p": {"p": resumed[0]}, "o": tensors}, {}))
    with torch.no_grad():
        again[0].copy_(loaded["p"]["p"])
    load_optimizer_tensors(again[1], loaded["o"])
    assert again[1].param_groups[0]["lr"] == 0.5
    for parameter, optimizer in (whole, again):
        parameter.grad = torch.ones(2, 4)
        optimizer.step()
    assert torch.equal(again[0], whole[0])
    with pytest.raises(ValueError, match=r"another optimiser: 2 names differ, 0.exp_avg first"):
        load_optimizer_tensors(
            torch.optim.SGD([nn.Parameter(torch.ones(8))], momentum=0.9), {"0.exp_avg": torch.ones(8)}
        )


# ---- several ranks

TOTAL = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What two ranks come to that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder, "first").wait() == [0, 0]
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]
    files = json.loads((folder / "checkpoint-5" / STATE_FILE).read_text())["files"]
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    return torch.load(folder / "result.pt")


def start(folder: Path, name: str, *, ranks: int = 2, total: int = TOTAL, **options: Any) -> few_ranks.Job:
    return few_ranks.start(functools.partial(jobs.train, **options), ranks, folder / "jobs" / name, folder, total)


def assert_result(folder: Path, wanted: dict[str, Tensor]) -> None:
    result = torch.load(folder / "result.pt")
    assert result.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(result[name], wanted[name])] == []


ONE_OF_TWO = [("training", 0), ("training", 1), ("staging", 0), ("staging", 1), ("writing", 0), ("writing", 1)]
ONLY_RANK_0 = ["index", "state", "renaming", "renamed", "removing"]
LEFT = {"training": 2, "staging": 2, "writing": 2, "index": 2, "state": 2, "renaming": 2, "renamed": 3, "removing": 3}


@pytest.mark.parametrize(
    ("phase", "victim"), [*ONE_OF_TWO, *((p, 0) for p in ONLY_RANK_0), *((phase, None) for phase in LEFT)]
)
def test_killed_ranks_go_on_from_the_last_whole_checkpoint(
    undisturbed: dict[str, Tensor], tmp_path: Path, phase: str, victim: int | None
) -> None:
    job = start(tmp_path, "killed", accident=jobs.Kill(phase, victim, tmp_path / "jobs" / "killed"))
    codes = job.wait(30)
    if victim is None:
        assert codes == [-9, -9]
    else:
        assert codes.pop(victim) == -9 and codes in ([1], [2]), job.errors()
        last = job.errors(1 - victim).strip().splitlines()[-1]
        assert "a rank has died" in last or "another rank has died" in last
        assert "Traceback" not in job.errors()
    left = latest_checkpoint(tmp_path)
    # A save that is under way when a rank dies in the next step may end or not.
    assert left.name in {f"checkpoint-{LEFT[phase] - (phase == 'training')}", f"checkpoint-{LEFT[phase]}"}
    load_checkpoint(left)
    again = start(tmp_path, "again")
    assert again.wait() == [0, 0], again.errors()
    assert_result(tmp_path, undisturbed)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5", "jobs", "result.pt"]


def test_killed_between_two_renames(undisturbed: dict[str, Tensor], tmp_path: Path) -> None:
    """The checkpoint of a step that is saved again, by a run that went back, is there at all times."""
    assert start(tmp_path, "first", total=3).wait() == [0, 0]
    (tmp_path / "checkpoint-3").rename(tmp_path / "aside")
    job = start(
        tmp_path, "back", accident=jobs.Kill("renaming", None, tmp_path / "jobs" / "back"), pause=tmp_path / "aside"
    )
    assert job.wait() == [-9, -9], job.errors()
    assert [name for name in names(tmp_path) if name.startswith(".")] == [".checkpoint-3.old", ".checkpoint-3.partial"]
    again = start(tmp_path, "again")
    assert again.wait() == [0, 0], again.errors()
    assert_result(tmp_path, undisturbed)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_going_on_with_another_number_of_ranks(
    undisturbed: dict[str, Tensor], tmp_path: Path, before: int, after: int, sharded: bool
) -> None:
    assert start(tmp_path, "before", ranks=before, total=3, sharded=before > 1).wait() == [0] * before
    job = start(tmp_path, "after", ranks=after, sharded=sharded and after > 1)
    assert job.wait() == [0] * after, job.errors()
    assert_result(tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_ranks_full_disk_stops_all(undisturbed: dict[str, Tensor], tmp_path: Path, victim: int) -> None:
    job = start(tmp_path, "full", accident=jobs.DiskFull(victim), every=0.05)
    assert job.wait() == [2, 2], job.errors()
    says = (
        f"could not write {tmp_path}/checkpoint-3: No space left on device. The last whole checkpoint is {tmp_path}/ch"
    )
    for rank in range(2):
        assert job.errors(rank).startswith(f"tdm-fast: {says}"), job.errors()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "jobs"]
    assert start(tmp_path, "again").wait() == [0, 0]
    assert_result(tmp_path, undisturbed)


def test_all_ranks_of_a_second_run_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".checkpoint-7.partial").mkdir()
        job = start(tmp_path, "second")
        assert job.wait() == [2, 2]
    for rank in range(2):
        assert (
            job.errors(rank)
            .strip()
            .endswith(f"{tmp_path} is in use by another run; wait for its end or name another folder")
        )
    assert (tmp_path / ".checkpoint-7.partial").exists()


def test_all_ranks_refuse_a_shard_that_is_not_what_it_was(tmp_path: Path) -> None:
    assert start(tmp_path, "first", total=2).wait() == [0, 0]
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        file = tmp_path / "checkpoint-2" / name
        data = file.read_bytes()
        other = (tmp_path / "checkpoint-1" / name).read_bytes()
        for number, (bad, what) in enumerate({data[:-1]: "cut", other: "SHA-256", None: "is missing"}.items()):
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            job = start(tmp_path, f"{name}{number}")
            assert job.wait() == [2, 2]
            for rank in range(2):
                line = job.errors(rank).strip()
                assert f"checkpoint {tmp_path}/checkpoint-2 is damaged ({name} " in line and what in line
                assert "Traceback" not in line and "remove it to go on from the one before" in line
            file.write_bytes(data)
    assert start(tmp_path, "again").wait() == [0, 0]


def test_of_replicas_one_is_written(tmp_path: Path) -> None:
    job = few_ranks.start(jobs.save_replicas, 4, tmp_path / "jobs", tmp_path / "run")
    assert job.wait() == [0] * 4, job.errors()
    files = json.loads((tmp_path / "run" / "checkpoint-1" / STATE_FILE).read_text())["files"]
    shards = [of["bytes"] for name, of in files.items() if name.startswith("__")]
    tensors, _ = load_checkpoint(tmp_path / "run" / "checkpoint-1")
    assert all(torch.equal(tensors["a"][f"{i}"], torch.full((8, 1000), float(i))) for i in range(4))
    size = 4 * 8 * 1000 * 4
    assert len(shards) == 4 and size < sum(shards) < 1.2 * size
    assert max(shards) < 1.1 * size / 4  # and all write alike


def test_parts_of_sharded_states(tmp_path: Path) -> None:
    job = few_ranks.start(jobs.save_eighths, 2, tmp_path / "jobs", tmp_path / "run")
    assert job.wait() == [0, 0], job.errors()
