"""The prompt cache on the disk: filled once, by content, by ranks or one process, whole after a kill; its command."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from encode_jobs import PROMPTS, fill_folder, slow_fill
from guide_parts import NAME, build_parts
from rank_runs import PRELOAD, run_ranks
from safetensors import safe_open
from tiny_encoders import clip_folder, edit_json, t5_folder

from tdm_fast import cli, prompt_store
from tdm_fast.encode import EncodeConfig, encode
from tdm_fast.encoders import Encoder, find_encoder, load_encoder
from tdm_fast.files import locked
from tdm_fast.notes import say_once
from tdm_fast.prompt_store import cached_prompts, fill, identity
from tdm_fast.text import PromptCache

FLAG = "--text_encoder_name_1"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_folder(tmp_path_factory.mktemp("encoders") / "t5")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("encoders") / "clip")


def same(one: PromptCache, other: PromptCache) -> bool:
    rows = zip([*one.embeddings, one.negative], [*other.embeddings, other.negative], strict=True)
    return tuple(one.prompts) == tuple(other.prompts) and all(torch.equal(a, b) for a, b in rows)


def keys_of(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found += [bytes(key) for key in shard.get_tensor("keys").tolist()]
    return found


def test_the_disk_gives_what_memory_would(t5: Path, tmp_path: Path) -> None:
    encoder = load_encoder(t5, flag=FLAG)
    expected = PromptCache.encode([*PROMPTS, "no", ""], encoder.tokenizer, encoder.model, negative_prompt="no")
    cache = fill_folder(tmp_path, t5, negative_prompt="no")
    assert tuple(cache.prompts) == tuple(PROMPTS) and cache.lengths == [len(row) for row in cache.embeddings]
    for row, wanted in zip(cache.embeddings, expected.embeddings, strict=False):
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache.negative, expected.negative, rtol=1e-5, atol=1e-6)
    batch, wanted_batch = cache.batch([3, 0]).tensors, expected.batch([3, 0]).tensors
    assert batch.keys() == wanted_batch.keys() == {"encoder_hidden_states", "encoder_attention_mask"}
    assert torch.equal(batch["encoder_attention_mask"], wanted_batch["encoder_attention_mask"])


def test_every_prompt_is_encoded_once_and_the_null_prompt_is_there(t5: Path, tmp_path: Path) -> None:
    cache = fill_folder(tmp_path, t5, [*PROMPTS, *PROMPTS[:3]])
    assert len(cache) == len(PROMPTS) + 3 and torch.equal(cache.embeddings[0], cache.embeddings[len(PROMPTS)])
    keys = keys_of(tmp_path)
    assert len(keys) == len(set(keys)) == len(PROMPTS) + 1 and prompt_store.key_of("") in keys
    assert cached_prompts(tmp_path) == PROMPTS


def test_what_is_there_is_not_encoded_again(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fill_folder(tmp_path, t5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    encoders = identity([find_encoder(t5, flag=FLAG)])
    never: Any = lambda: pytest.fail("loaded the encoder")  # noqa: E731
    assert same(first, fill(tmp_path, PROMPTS, encoders, never))
    assert torch.equal(fill(tmp_path, PROMPTS[2:4], encoders, never).embeddings[1], first.embeddings[3])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen: list[int] = []
    real = Encoder.states
    monkeypatch.setattr(Encoder, "states", lambda self, tokens: seen.append(len(tokens)) or real(self, tokens))
    more = fill_folder(tmp_path, t5, ["another one", PROMPTS[1]], negative_prompt="and this")
    assert seen == [2] and torch.equal(more.embeddings[1], first.embeddings[1])
    assert cached_prompts(tmp_path) == [*PROMPTS, "another one"]


def test_ranks_fill_it_together_to_the_same_bits(t5: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = fill_folder(tmp_path / "one", t5, shard_bytes=1)
    filled = run_ranks(2, fill_folder, tmp_path / "two", t5, None, "", 1, True)
    assert all(same(alone, PromptCache(*parts)) for parts in filled)
    assert set(keys_of(tmp_path / "one")) == set(keys_of(tmp_path / "two"))
    assert len(keys_of(tmp_path / "two")) == len(PROMPTS) + 1
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_a_kill_at_any_moment_loses_only_what_was_not_written(t5: Path, tmp_path: Path) -> None:
    """A process killed in the middle; whole shards stay, a torn one does not count, and the bits come out the same."""
    torch.set_num_threads(1)
    undisturbed = fill_folder(tmp_path / "undisturbed", t5, shard_bytes=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder = tmp_path / "killed"
    process = context.Process(target=slow_fill, args=(folder, t5))
    process.start()
    end = time.monotonic() + 60
    while len(list(folder.glob("shard-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    written = {path: path.read_bytes() for path in folder.glob("shard-*")}
    assert 2 <= len(written) < len(list((tmp_path / "undisturbed").glob("shard-*")))
    with pytest.raises(
        ValueError, match=r"holds no whole prompt cache .*`tdm-fast encode` fills one, and goes on where"
    ):
        cached_prompts(folder)
    (folder / ".shard-torn.safetensors.partial").write_bytes(b"torn")
    (folder / ".notes.partial").write_bytes(b"somebody's own")
    assert same(fill_folder(folder, t5, shard_bytes=1), undisturbed)
    (folder / ".notes.partial").unlink()
    assert all(path.read_bytes() == content for path, content in written.items())
    names = [{path.name for path in each.iterdir()} for each in (folder, tmp_path / "undisturbed")]
    assert names[0] == names[1]


def test_a_damaged_shard_is_made_again(t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fill_folder(tmp_path, t5, shard_bytes=1)
    rows = [row.clone() for row in before.embeddings]
    path = sorted(tmp_path.glob("shard-*"))[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    after = fill_folder(tmp_path, t5, shard_bytes=1)
    assert all(torch.equal(a, b) for a, b in zip(after.embeddings, rows, strict=True))
    assert f"{path} is damaged; its prompts are encoded again" in capsys.readouterr().err
    (tmp_path / "index.json").write_text("{")
    fill_folder(tmp_path, t5)
    assert cached_prompts(tmp_path) == PROMPTS


def test_two_encoders(t5: Path, clip: Path, tmp_path: Path) -> None:
    files = [find_encoder(t5, flag=FLAG), find_encoder(clip, flag="--text_encoder_name_2")]
    cache = fill(tmp_path, PROMPTS, identity(files), lambda: [part.load() for part in files], batch_size=2)
    second = load_encoder(clip, flag=FLAG)
    alone = PromptCache.encode(PROMPTS, second.tokenizer, second.model)
    assert cache.embeddings_2 is not None and cache.negative_2 is not None
    for row, wanted in zip(cache.embeddings_2, alone.embeddings, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache.negative_2, alone.negative, rtol=1e-5, atol=1e-6)
    batch = cache.batch([0, 1, 1]).tensors
    assert batch["encoder_2_hidden_states"].shape == (3, 1, 6) and "encoder_2_attention_mask" not in batch
    with pytest.raises(ValueError, match=r"another text encoder has encoded .*t5 and .*clip"):
        fill_folder(tmp_path, t5)


def test_a_cache_of_another_encoder_or_type_is_refused(t5: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill_folder(folder, t5)
    moved = shutil.copytree(t5, tmp_path / "moved")
    assert same(fill_folder(folder, moved), fill_folder(folder, t5))  # by content, not by path
    other = t5_folder(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match=r"another text encoder has encoded .*; name another folder, or remove this one"
    ):
        fill_folder(folder, other)
    never: Any = lambda: pytest.fail("loaded the encoder")  # noqa: E731
    with pytest.raises(ValueError, match=r"holds states in float32, .* in bfloat16; `tdm-fast encode --dtype float32`"):
        fill(folder, ["one more"], identity([find_encoder(t5, flag=FLAG)]), never, dtype=torch.bfloat16)
    with locked(folder), pytest.raises(ValueError, match="in use by another run"):
        fill_folder(folder, t5, ["one more"])


def test_states_in_bfloat16_take_half_the_room(t5: Path, tmp_path: Path) -> None:
    encoder = load_encoder(t5, flag=FLAG, dtype=torch.bfloat16)
    encoders = identity([find_encoder(t5, flag=FLAG)])
    cache = fill(tmp_path, PROMPTS, encoders, lambda: [encoder], dtype=torch.bfloat16)
    assert {row.dtype for row in cache.embeddings} == {torch.bfloat16}
    assert cache.batch([0]).tensors["encoder_hidden_states"].dtype == torch.float32
    alone = encoder.states(encoder.tokenize(PROMPTS[:1]))[0]
    torch.testing.assert_close(cache.embeddings[0], alone, rtol=2e-2, atol=2e-2)


def test_the_command(t5: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "it.csv").write_text("id,caption\n1,a red circle\n2,\n3," + "naïve " * 80 + "\n", encoding="utf-8")
    arguments = ["encode", "--prompts", tmp_path / "it.csv", "--output_dir", tmp_path / "cache"]
    arguments += ["--text_encoder_name_1", t5, "--text_encoder_name_2", clip, "--device", "cpu", "--dtype", "bfloat16"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'cache'}: 2 prompts, ") and said.out.endswith(f"by {t5} and {clip}\n")
    assert "1 of 3 prompts are empty and left out, row 2 first" in said.err
    assert f"1 of 3 prompts are longer than the 77 tokens that {clip} is given" in said.err  # the null prompt counts
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["prompts"][0] == "a red circle"


def test_a_teachers_own_encoder(
    tiny_teacher: Path, t5: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "it.txt"
    prompts.write_text("a red circle\n")
    config = EncodeConfig(prompts=str(prompts), output_dir=tmp_path / "cache", model=tiny_teacher, device="cpu")
    say_once.cache_clear()
    config.text_encoder_name_2 = str(clip)
    cache = encode(config)
    assert cache.embeddings[0].shape == (4, 8) and cache.embeddings_2 is None
    assert capsys.readouterr().err.count("the second encoder is not used") == 1
    config.text_encoder_name_1 = str(t5_folder(tmp_path / "wide", width=16))
    with pytest.raises(
        ValueError, match=r"--text_encoder_name_1 .*wide: it is 16 wide but the teacher takes .*=8; none"
    ):
        encode(config)
    both = shutil.copytree(tiny_teacher, tmp_path / "both")  # for the package's transformer, which may take two
    edit_json(both / "transformer" / "config.json", caption_channels=[8, 6])
    config = EncodeConfig(prompts=str(prompts), output_dir=tmp_path / "two", model=both, device="cpu")
    with pytest.raises(ValueError, match=r"--text_encoder_name_2 is needed: .*both/transformer takes two"):
        encode(config)
    config.text_encoder_name_2 = str(clip)
    assert encode(config).batch([0]).tensors["encoder_2_hidden_states"].shape == (1, 1, 6)


def test_a_transformer_that_is_named_as_train_names_it(tmp_path: Path) -> None:
    """A name and the weights' folder, as published: no pipeline, the encoder beside it."""
    parts = build_parts(tmp_path / "parts")
    shutil.move(parts / "transformer", parts / "published" / "any93x640x640")
    (tmp_path / "it.txt").write_text("a red circle\n")
    config = EncodeConfig(prompts=str(tmp_path / "it.txt"), output_dir=tmp_path / "cache", device="cpu")
    config.model, config.model_path = Path(NAME), parts / "published"
    with pytest.raises(ValueError, match="--text_encoder_name_1: name a text encoder"):
        encode(config)
    config.text_encoder_name_1 = str(t5_folder(tmp_path / "wide", width=16))
    with pytest.raises(ValueError, match=r"it is 16 wide but the teacher takes .*=8"):
        encode(config)
    config.text_encoder_name_1 = str(parts / "t5")
    assert encode(config).embeddings[0].shape[1] == 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "--text_encoder_name_1: name a text encoder, or with --model"),
        ("--model {folder}/none", "--model {folder}/none: no such folder"),
        ("--text_encoder_name_1 {folder}/none", "--text_encoder_name_1 {folder}/none: no such folder"),
        ("--text_encoder_name_1 {clip}", "is a CLIP encoder; this flag takes T5"),
        ("--text_encoder_name_1 {t5} --text_encoder_name_2 {t5}", "is a T5, mT5 or UMT5 encoder; this flag takes CLIP"),
        ("--text_encoder_name_1 {t5} --batch_size 0", "--batch_size 0: it takes a whole number from 1 up"),
    ],
)
def test_flags_that_cannot_work(
    flags: str, says: str, t5: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"folder": tmp_path, "t5": t5, "clip": clip}
    (tmp_path / "it.txt").write_text("a red circle\n")
    output = tmp_path / "cache"
    arguments = f"encode --device cpu --prompts {tmp_path}/it.txt --output_dir {output} {flags.format(**names)}".split()
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert says.format(**names) in said and said.count("\n") == 1
    assert not output.exists()
