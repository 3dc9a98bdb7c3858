"""Text encoders of random weights and a few kilobytes, in folders as people have them."""

from __future__ import annotations

import io
import json
import string
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    MT5Config,
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

T5_FAMILY: dict[str, tuple[Any, Any]] = {
    "t5": (T5Config, T5EncoderModel),
    "mt5": (MT5Config, MT5EncoderModel),
    "umt5": (UMT5Config, UMT5EncoderModel),
}
VOCABULARY = 160
LINES = [
    "a small red circle moving left",
    "the quick brown fox jumps over the lazy dog",
    "two cats, naïve café — kleiner",
]


@cache
def pieces() -> bytes:
    """A SentencePiece model with T5's special tokens, learnt from three lines."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 5), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0,
    )  # fmt: skip
    return model.getvalue()


def t5_config(model_type: str = "t5", width: int = 8) -> Any:
    return T5_FAMILY[model_type][0](
        vocab_size=VOCABULARY, d_model=width, d_kv=4, d_ff=8, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip


def t5_folder(folder: Path, model_type: str = "t5", width: int = 8, *, seed: int = 0) -> Path:
    """Model and spiece.model in one folder, as on the hub."""
    torch.manual_seed(seed)
    T5_FAMILY[model_type][1](t5_config(model_type, width)).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(pieces())
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    """Letters are its tokens; `<|endoftext|>` ends a prompt and pads it."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: n for n, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_folder(folder: Path, width: int = 6) -> Path:
    """CLIP's text model with its projection, and its tokenizer."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **values: object) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
