"""Prompts to embeddings: the tokenizer, padding and masks, the cache, the prompts' file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from tdm_fast.text import MAX_LENGTH, PromptCache, encode_prompts, fingerprint, pad, read_prompts, word_tokenizer

PROMPTS = ["a small red circle moving left", "circle", "red red circle moving"]


@pytest.fixture(scope="module")
def encoder(tiny_teacher: Path) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(tiny_teacher / "text_encoder").eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_teacher / "tokenizer")


def test_the_tokenizer_knows_words_and_t5s_special_tokens(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["red", "a", "red", "circle"])
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one("A red  CIRCLE").input_ids == [3, 5, 4, 1]
        assert one("a blue circle").input_ids == [3, 2, 4, 1]
        assert one("").input_ids == [1]
        assert (one.pad_token_id, one.eos_token_id, one.unk_token_id, len(one)) == (0, 1, 2, 6)


def test_embeddings_do_not_depend_on_what_they_are_encoded_with(tokenizer: object, encoder: T5EncoderModel) -> None:
    together = encode_prompts(PROMPTS, tokenizer, encoder)
    assert [row.shape for row in together] == [(7, 8), (2, 8), (5, 8)]
    for prompt, row in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(encode_prompts([prompt], tokenizer, encoder)[0], row, rtol=1e-5, atol=1e-6)
    for row, again in zip(together, encode_prompts(PROMPTS, tokenizer, encoder, batch_size=2), strict=True):
        torch.testing.assert_close(row, again, rtol=1e-5, atol=1e-6)


def test_a_long_prompt_is_cut(tokenizer: object, encoder: T5EncoderModel) -> None:
    assert encode_prompts(["red " * 600], tokenizer, encoder)[0].shape == (MAX_LENGTH, 8)


def test_padding_makes_a_mask_only_where_lengths_differ() -> None:
    rows = [torch.full((length, 3), float(length)) for length in (2, 5, 1)]
    batch = pad(rows)
    states, mask = batch.tensors["encoder_hidden_states"], batch.tensors["encoder_attention_mask"]
    assert states.shape == (3, 5, 3)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert (states[mask == 0] == 0).all() and (states[mask == 1] != 0).all()
    assert pad([rows[0], rows[0]]).tensors.keys() == {"encoder_hidden_states"}


def test_the_cache_comes_back_as_it_was(tmp_path: Path, tokenizer: object, encoder: T5EncoderModel) -> None:
    prompts = [*PROMPTS, "ein kleiner Kreis — 小さな円"]
    cache = PromptCache.encode(prompts, tokenizer, encoder, negative_prompt="red triangle")
    cache.save(tmp_path / "folder" / "cache.safetensors")
    again = PromptCache.load(tmp_path / "folder" / "cache.safetensors")
    assert again.prompts == cache.prompts == tuple(prompts) and len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(again.embeddings, cache.embeddings, strict=True))
    assert torch.equal(again.negative, cache.negative) and cache.negative.shape == (3, 8)
    assert torch.equal(again.batch([1, 0]).tensors["encoder_hidden_states"][0, :2], cache.embeddings[1])
    assert again.negatives(3).tensors["encoder_hidden_states"].shape == (3, 3, 8)


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n a red circle \r\n\n  \nзелёный круг\n".encode())
    assert read_prompts(file) == ["a red circle", "зелёный круг"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"a red circle\n\xff\xfe", "byte 13 is not UTF-8"),
    ],
)
def test_a_prompts_file_that_cannot_work_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_prompts(file)
    assert "--prompts" in str(error.value) and str(file) in str(error.value)


def test_the_fingerprint_tells_lists_apart() -> None:
    lists = (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [])
    assert len({fingerprint(prompts) for prompts in lists}) == len(lists)
    assert fingerprint(["a", "b"]) == fingerprint(("a", "b"))
