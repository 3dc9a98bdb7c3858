"""Prompts to embeddings: the tokenizer, batches, padding and masks, the cache, rows in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_encoders import clip_folder
from tokenizers import processors
from transformers import AutoTokenizer, T5EncoderModel

from tdm_fast.encoders import load_encoder
from tdm_fast.text import (
    MAX_LENGTH,
    MappedRows,
    PromptCache,
    batches,
    encode_prompts,
    fingerprint,
    pad,
    word_tokenizer,
)

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


def test_a_long_prompt_is_cut_and_said_once(
    tokenizer: object, encoder: T5EncoderModel, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["red " * 511, "a " * 600, "circle", "red " * 700]
    rows = encode_prompts(prompts, tokenizer, encoder)
    assert [len(row) for row in rows] == [MAX_LENGTH, MAX_LENGTH, 2, MAX_LENGTH]
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and "2 of 4 prompts are longer than the 512 tokens" in said
    assert "the first, of 601 tokens, is 'a a a" in said
    assert [len(row) for row in encode_prompts(prompts, tokenizer, encoder, max_length=8)] == [8, 8, 2, 8]


def test_a_tokenizer_of_another_model_is_refused(tokenizer: object, encoder: T5EncoderModel) -> None:
    other = word_tokenizer(f"word{n}" for n in range(100))
    with pytest.raises(ValueError, match=r"token 10\d of a model that knows \d+ of the prompt 'word99'"):
        encode_prompts(["word1", "word99"], other, encoder)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="makes no token of the prompt ''"):
        encode_prompts(["word1", ""], other, encoder)


def test_padding_makes_a_mask_only_where_lengths_differ() -> None:
    rows = [torch.full((length, 3), float(length)) for length in (2, 5, 1)]
    batch = pad(rows)
    states, mask = batch.tensors["encoder_hidden_states"], batch.tensors["encoder_attention_mask"]
    assert states.shape == (3, 5, 3)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert (states[mask == 0] == 0).all() and (states[mask == 1] != 0).all()
    assert pad([rows[0], rows[0]]).tensors.keys() == {"encoder_hidden_states"}


def test_the_cache_holds_prompts_and_the_negative_one(tokenizer: object, encoder: T5EncoderModel) -> None:
    prompts = [*PROMPTS, "ein kleiner Kreis — 小さな円"]
    cache = PromptCache.encode(prompts, tokenizer, encoder, negative_prompt="red triangle")
    assert cache.prompts == tuple(prompts) and len(cache) == 4 and cache.lengths == [7, 2, 5, 6]
    assert cache.negative.shape == (3, 8) and cache.embeddings_2 is None
    assert torch.equal(cache.batch([1, 0]).tensors["encoder_hidden_states"][0, :2], cache.embeddings[1])
    assert cache.negatives(3).tensors["encoder_hidden_states"].shape == (3, 3, 8)


def test_a_second_encoder_has_states_and_masks_of_its_own(
    tmp_path: Path, tokenizer: object, encoder: T5EncoderModel
) -> None:
    second = load_encoder(clip_folder(tmp_path), flag="--text_encoder_name_2")
    cache = PromptCache.encode(PROMPTS, tokenizer, encoder, tokenizer_2=second.tokenizer, encoder_2=second.model)
    batch, alone = cache.batch([0, 1]).tensors, PromptCache.encode(PROMPTS, tokenizer, encoder).batch([0, 1]).tensors
    assert all(torch.equal(batch[name], tensor) for name, tensor in alone.items())
    assert batch.keys() - alone.keys() == {"encoder_2_hidden_states"}  # one token each: nothing to mask
    assert batch["encoder_2_hidden_states"].shape == (2, 1, 6)
    assert cache.negatives(2).tensors["encoder_2_hidden_states"].shape == (2, 1, 6)
    padded = pad([torch.ones(2, 3)] * 2, [torch.ones(1, 4), torch.ones(3, 4)]).tensors
    assert padded["encoder_2_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert "encoder_attention_mask" not in padded


def test_rows_in_less_precision_are_padded_in_float32() -> None:
    row = torch.tensor([[0.1, 3.0]]).bfloat16()
    assert torch.equal(pad([row]).tensors["encoder_hidden_states"], row.float()[None])


def test_batches_are_of_similar_lengths_and_equal_ones_stay_in_order() -> None:
    assert batches([3, 9, 3, 1, 9, 3], 2) == [[1, 4], [0, 2], [5, 3]]
    assert batches([7] * 5 + [1], 3) == [[0, 1, 2], [3, 4, 5]]
    assert batches([], 3) == []


def test_mapped_rows_are_read_when_asked_for(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    tensors = [torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(4, 3, dtype=torch.bfloat16)]
    for file, tensor in zip(files, tensors, strict=True):
        save_file({"rows": tensor}, file)
    rows = MappedRows(files, "rows", torch.tensor([[1, 0, 3], [0, 2, 2], [1, 3, 1]]))
    files[0].rename(tmp_path / "away")
    assert len(rows) == 3 and rows.lengths == [3, 2, 1]
    assert torch.equal(rows[0], tensors[1][:3]) and torch.equal(rows[-1], tensors[1][3:])
    assert [len(row) for row in rows[::2]] == [3, 1]
    (tmp_path / "away").rename(files[0])
    assert torch.equal(rows[1], tensors[0][2:4])


def test_the_fingerprint_tells_lists_apart() -> None:
    lists = (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], [])
    assert len({fingerprint(prompts) for prompts in lists}) == len(lists)
    assert fingerprint(["a", "b"]) == fingerprint(("a", "b"))
