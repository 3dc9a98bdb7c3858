"""Prompts from a text file, a table (.csv, .jsonl, .parquet) or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tdm_fast.encoders import first_line, is_hub_name, offline_reason

COLUMNS = ("prompt", "caption", "text")
"""What a table's column of prompts is called, the first that is there."""
TABLES = (".csv", ".jsonl", ".parquet")
INSTALL = "pip install 'tdm-fast[data]'"


def read_prompts(source: Path | str, column: str | None = None) -> list[str]:
    """Prompts in the order of their source, stripped, empty ones left out.

    A UTF-8 text file has one a line. In a table (.csv with a header, .jsonl, .parquet) they are in `column`, else in
    one called `prompt`, `caption` or `text`, else in its only column of text; a .jsonl of bare strings does, too. What
    is no file is a data set's name with its split, `owner/name:train`, or a folder that `datasets` can load.
    Raises ValueError, naming --prompts, for a source that is missing, unreadable or without prompts.
    """
    path, here = Path(source), f"--prompts {source}"
    if path.is_file():
        if path.suffix in TABLES:
            return _filled(_table(path, column, here), here)
        prompts = [line.strip() for line in _text(path, here).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{here}: the file is empty; it takes one prompt a line")
        return prompts
    named = path.suffix not in (".txt", *TABLES) and is_hub_name(str(source).partition(":")[0])
    if path.is_dir() or named:
        return _filled(_dataset(str(source), column, here), here)
    raise ValueError(
        f"{here}: no such file; it takes a UTF-8 text file with one prompt a line, a table ({', '.join(TABLES)}) or the"
        " name of a data set"
    )


def _text(path: Path, here: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{here}: byte {error.start} is not UTF-8; save the file as UTF-8, one prompt a line"
        ) from error


def _table(path: Path, column: str | None, here: str) -> Iterable[Any]:
    if path.suffix == ".csv":
        try:
            rows = list(csv.reader(io.StringIO(_text(path, here), newline="")))
        except csv.Error as error:
            raise ValueError(f"{here}: it is no table of comma-separated values ({error})") from error
        header = rows[0] if rows else []
        place = header.index(_choose(header, header, column, here))
        return [row[place] if place < len(row) else "" for row in rows[1:] if row]
    if path.suffix == ".jsonl":
        return _json_lines(path, column, here)
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise ValueError(f"{here}: .parquet needs pyarrow; {INSTALL}") from error
    try:
        schema = parquet.read_schema(path)
        texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        name = _choose(schema.names, texts, column, here)
        return parquet.read_table(path, columns=[name]).column(name).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{here}: it is no whole parquet file ({error})") from error


def _json_lines(path: Path, column: str | None, here: str) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path, here).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{here}: line {number} is no JSON ({error})") from error
        if not isinstance(row, dict | str):
            raise ValueError(f"{here}: line {number} is neither an object nor a string")
        rows.append(row)
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        return rows
    names = list(dict.fromkeys(name for row in objects for name in row))
    texts = [name for name in names if all(isinstance(row.get(name, ""), str) for row in objects)]
    name = _choose(names, texts, column, here)
    return [row if isinstance(row, str) else row.get(name) for row in rows]


def _dataset(name: str, column: str | None, here: str) -> Iterable[Any]:
    """A column of a data set. One of the hub is taken from its cache on this machine where the hub is not reached."""
    local = Path(name).is_dir()
    try:
        from datasets import Value, load_dataset
    except ImportError as error:
        what = "a folder of data" if local else "no such file; to take it as the name of a data set"
        raise ValueError(f"{here}: {what} needs datasets; {INSTALL}") from error
    from huggingface_hub import constants

    repository, _, split = (name, "", "") if local else name.partition(":")
    reason = None if local else offline_reason("dataset", repository)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or reason is not None
    try:
        data = load_dataset(repository, split=split or "train")
    except Exception as error:  # its builders raise what they like
        if reason is None:
            raise ValueError(f"{here}: datasets cannot load it ({first_line(error)})") from error
        raise ValueError(
            f"{here}: no such file, and as a data set it is not in this machine's Hugging Face cache and the hub does"
            f" not give it ({reason}); save its prompts as a .txt, .csv, .jsonl or .parquet file and name that"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before
    texts = [key for key, kind in data.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    return data[_choose(data.column_names, texts, column, here)]


def _choose(names: Sequence[str], texts: Sequence[str], wanted: str | None, here: str) -> str:
    """The column of prompts among `names`, of which `texts` hold text."""
    listing = ", ".join(names) or "none"
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{here}: --prompt_column {wanted} is not among its columns ({listing})")
        return wanted
    for name in COLUMNS:
        if name in names:
            return name
    if len(texts) == 1:
        return texts[0]
    raise ValueError(
        f"{here}: none of its columns is called {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} (there are: {listing});"
        " --prompt_column names the one to take"
    )


def _filled(values: Iterable[Any], here: str) -> list[str]:
    """The prompts among a column's values; says once how many are empty. Raises ValueError for what is no text."""
    prompts, empty, count = [], [], 0
    for count, value in enumerate(values, 1):
        if not isinstance(value, str | None):
            raise ValueError(f"{here}: row {count} has no text but {value!r:.60}; --prompt_column names another column")
        text = (value or "").strip()
        prompts += [text] if text else []
        empty += [] if text else [count]
    if not prompts:
        raise ValueError(f"{here}: none of its {count} rows has a prompt")
    if empty:
        print(
            f"note: {here}: {len(empty)} of {count} prompts are empty and left out, row {empty[0]} first",
            file=sys.stderr,
        )
    return prompts
