"""Prompts to embeddings, once: encoded before training, kept unpadded, padded per batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tdm_fast.checkpoint import write_atomically
from tdm_fast.models.denoiser import Conditioning

MAX_LENGTH = 512


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


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, encoder: Any, *, batch_size: int = 64, max_length: int = MAX_LENGTH
) -> list[Tensor]:
    """Encode prompts to float32 `[L, D]` on the CPU, without padding; what exceeds `max_length` tokens is cut off."""
    rows: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        lengths = tokens.attention_mask.sum(1).tolist()
        tokens = tokens.to(encoder.device)
        states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.cpu()
        rows += [state[:length].float().clone() for state, length in zip(states, lengths, strict=True)]
    return rows


@dataclass(frozen=True)
class PromptCache:
    """Prompts with their embeddings (`[L_i, D]` each) and the embedding of the negative prompt."""

    prompts: tuple[str, ...]
    embeddings: tuple[Tensor, ...]
    negative: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: Sequence[int]) -> Conditioning:
        """Conditioning of the prompts at these indices, padded to the longest of them."""
        return pad([self.embeddings[i] for i in indices])

    def negatives(self, batch_size: int) -> Conditioning:
        """The negative prompt's conditioning, `batch_size` times."""
        return pad([self.negative] * batch_size)

    @classmethod
    def encode(cls, prompts: Sequence[str], tokenizer: Any, encoder: Any, *, negative_prompt: str = "") -> PromptCache:
        """Encode prompts and the negative prompt."""
        *rows, negative = encode_prompts([*prompts, negative_prompt], tokenizer, encoder)
        return cls(tuple(prompts), tuple(rows), negative)

    def save(self, path: Path) -> None:
        """Write the cache as one safetensors file: all rows end to end, their lengths, the prompts in the metadata."""
        rows = [*self.embeddings, self.negative]
        tensors = {"rows": torch.cat(rows), "lengths": torch.tensor([len(row) for row in rows])}
        tensors["prompts"] = torch.frombuffer(bytearray(json.dumps(self.prompts).encode()), dtype=torch.uint8)
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> PromptCache:
        """Read what `save` wrote."""
        tensors = load_file(path)
        *rows, negative = tensors["rows"].split(tensors["lengths"].tolist())
        return cls(tuple(json.loads(bytes(tensors["prompts"].tolist()))), tuple(rows), negative)


def pad(rows: Sequence[Tensor]) -> Conditioning:
    """Rows `[L_i, D]` to a batch padded at the end; a mask is made only when lengths differ."""
    states = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    tensors = {"encoder_hidden_states": states}
    lengths = torch.tensor([len(row) for row in rows])
    if (lengths != states.shape[1]).any():
        tensors["encoder_attention_mask"] = (torch.arange(states.shape[1]) < lengths[:, None]).long()
    return Conditioning(tensors)


def read_prompts(path: Path) -> list[str]:
    """Prompts from a UTF-8 text file, one a line, blank lines dropped. Raises ValueError when there are none."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file; it takes a UTF-8 text file with one prompt a line")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts {path}: byte {error.start} is not UTF-8; save the file as UTF-8, one prompt a line"
        ) from error
    if not prompts:
        raise ValueError(f"--prompts {path}: the file is empty; it takes one prompt a line")
    return prompts


def fingerprint(prompts: Sequence[str]) -> str:
    """A short digest of a prompt list, to tell whether a cache belongs to it."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
