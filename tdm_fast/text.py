"""Prompts to embeddings: encoded once, kept unpadded, padded per batch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tdm_fast.encoders import LIMITS, Encoder
from tdm_fast.models.denoiser import Conditioning

MAX_LENGTH = LIMITS["t5"]


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with T5's special tokens: `<pad>` 0, `</s>` 1 (ends every prompt), `<unk>` 2."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_LENGTH
    )


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, encoder: Any, *, batch_size: int = 64, max_length: int | None = None
) -> list[Tensor]:
    """Encode prompts to a list of float32 `[L, D]` on the CPU, without padding, in batches of similar lengths.

    What exceeds `max_length` tokens, 512 for a T5 and 77 for a CLIP if not given, is cut off and said once.
    """
    return encode_with(Encoder.of(tokenizer, encoder), prompts, batch_size=batch_size, max_length=max_length)


def encode_with(
    encoder: Encoder, prompts: Sequence[str], *, batch_size: int = 64, max_length: int | None = None
) -> list[Tensor]:
    """`encode_prompts` by an encoder with its tokenizer."""
    lengths = [len(row) for row in encoder.tokenize(prompts, max_length)]
    if note := cut_note(prompts, lengths, encoder, max_length):
        print(note, file=sys.stderr)
    rows: dict[int, Tensor] = {}
    for batch in batches(lengths, batch_size):
        states = encoder.encode([prompts[i] for i in batch], max_length)
        rows |= {i: state.float() for i, state in zip(batch, states, strict=True)}
    return [rows[i] for i in range(len(prompts))]


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts with these numbers of tokens in batches of similar lengths, the longest first.

    The largest batch is the first, so that what has no memory for it ends early. Equal lengths stay in order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def cut_note(
    prompts: Sequence[str], lengths: Sequence[int], encoder: Encoder, max_length: int | None = None
) -> str | None:
    """What to say of the prompts that were cut, given the lengths that they have been cut to; None if none was."""
    limit = max_length or encoder.limit
    suspects = [i for i, length in enumerate(lengths) if length >= limit]
    cut = []
    for i in suspects:
        whole = len(encoder.tokenizer(prompts[i], verbose=False).input_ids)
        cut += [(i, whole)] if whole > limit else []
    if not cut:
        return None
    first, whole = cut[0]
    return (
        f"note: {len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens that {encoder.name} is given,"
        f" and are cut there; the first, of {whole} tokens, is {prompts[first][:60]!r}"
    )


class MappedRows(Sequence[Tensor]):
    """Rows `[L_i, D]` that lie end to end in safetensors files, mapped when they are asked for, never read whole."""

    def __init__(self, files: Sequence[Path], name: str, places: Tensor) -> None:
        """`places` int64 `[n, 3]`: of each row its file, its first line in the file's tensor `name`, its length."""
        self.files, self.name, self.places = files, name, places
        self._mapped: dict[int, Tensor] = {}

    @property
    def lengths(self) -> list[int]:
        """All L_i; no file is touched."""
        return self.places[:, 2].tolist()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        file, start, length = self.places[index].tolist()
        if file not in self._mapped:
            with safe_open(self.files[file], framework="pt") as opened:
                self._mapped[file] = opened.get_tensor(self.name)  # a map of the file, which outlives its closing
        return self._mapped[file][start : start + length]


@dataclass(frozen=True)
class PromptCache:
    """Prompts with their embeddings (`[L_i, D]` each) and the embedding of the negative prompt."""

    prompts: Sequence[str]
    embeddings: Sequence[Tensor]
    negative: Tensor
    embeddings_2: Sequence[Tensor] | None = None
    """The second encoder's, `[L2_i, D2]` each; None without one."""
    negative_2: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt, for the first encoder."""
        rows = self.embeddings
        return rows.lengths if isinstance(rows, MappedRows) else [len(row) for row in rows]

    def batch(self, indices: Sequence[int]) -> Conditioning:
        """Conditioning of the prompts at these indices, padded to the longest of them."""
        second = None if self.embeddings_2 is None else [self.embeddings_2[i] for i in indices]
        return pad([self.embeddings[i] for i in indices], second)

    def negatives(self, batch_size: int) -> Conditioning:
        """The negative prompt's conditioning, `batch_size` times."""
        second = None if self.negative_2 is None else [self.negative_2] * batch_size
        return pad([self.negative] * batch_size, second)

    @classmethod
    def encode(
        cls,
        prompts: Sequence[str],
        tokenizer: Any,
        encoder: Any,
        *,
        negative_prompt: str = "",
        tokenizer_2: Any = None,
        encoder_2: Any = None,
    ) -> PromptCache:
        """Encode prompts and the negative prompt, in memory; with a second encoder for it as well."""
        encoders = [Encoder.of(tokenizer, encoder)]
        encoders += [] if encoder_2 is None else [Encoder.of(tokenizer_2, encoder_2)]
        return cls.encode_with(encoders, prompts, negative_prompt=negative_prompt)

    @classmethod
    def encode_with(
        cls, encoders: Sequence[Encoder], prompts: Sequence[str], *, negative_prompt: str = ""
    ) -> PromptCache:
        """`encode` by one or two encoders with their tokenizers."""
        *rows, negative = encode_with(encoders[0], [*prompts, negative_prompt])
        if len(encoders) == 1:
            return cls(tuple(prompts), tuple(rows), negative)
        *second, negative_2 = encode_with(encoders[1], [*prompts, negative_prompt])
        return cls(tuple(prompts), tuple(rows), negative, tuple(second), negative_2)


def pad(rows: Sequence[Tensor], rows_2: Sequence[Tensor] | None = None) -> Conditioning:
    """Rows `[L_i, D]` to a float32 batch padded at the end; a mask is made only when lengths differ.

    The second encoder's rows become tensors of their own, with a mask of their own.
    """
    tensors = _padded("encoder", rows)
    return Conditioning(tensors if rows_2 is None else tensors | _padded("encoder_2", rows_2))


def _padded(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    states = torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True)
    tensors = {f"{name}_hidden_states": states}
    lengths = torch.tensor([len(row) for row in rows])
    if (lengths != states.shape[1]).any():
        tensors[f"{name}_attention_mask"] = (torch.arange(states.shape[1]) < lengths[:, None]).long()
    return tensors


def fingerprint(prompts: Sequence[str]) -> str:
    """A short digest of a prompt list, to tell whether a cache belongs to it."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
