"""Prompts from text files, tables and data sets; what is refused names the flag, the file and the way out."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from tdm_fast import prompts as module
from tdm_fast.prompts import read_prompts

WANTED = ["a red circle", 'a "blue", square', "зелёный\u2028круг"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table of these rows in the format of the path's suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    else:
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        quoted = ([f'"{str(cell).replace(chr(34), 2 * chr(34))}"' for cell in line] for line in lines)
        path.write_text("".join(",".join(line) + "\r\n" for line in quoted), encoding="utf-8-sig")
    return path


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff\n a red circle \r\n\n  \nзелёный круг\n".encode())
    assert read_prompts(file) == ["a red circle", "зелёный круг"]


@pytest.mark.parametrize("suffix", module.TABLES)
@pytest.mark.parametrize("column", ["prompt", "caption", "text"])
def test_tables(suffix: str, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"path": f"{n}.mp4", column: f" {prompt} "} for n, prompt in enumerate(WANTED)]
    assert read_prompts(write(tmp_path / f"it{suffix}", rows)) == WANTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", module.TABLES)
def test_the_column_of_prompts(suffix: str, tmp_path: Path) -> None:
    both = write(tmp_path / f"both{suffix}", [{"a": "one", "text": "two", "prompt": "three"}])
    assert read_prompts(both) == ["three"] and read_prompts(str(both), "a") == ["one"]
    with pytest.raises(ValueError, match=r"--prompt_column b is not among its columns \(a, text, prompt\)"):
        read_prompts(both, "b")
    odd = write(tmp_path / f"odd{suffix}", [{"a": "one", "b": "two"}])
    with pytest.raises(ValueError, match=r"called prompt, caption or text \(there are: a, b\); --prompt_column names"):
        read_prompts(odd)
    assert read_prompts(write(tmp_path / f"one{suffix}", [{"words": "one"}])) == ["one"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_only_column_of_text_will_do(suffix: str, tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / f"it{suffix}", [{"n": 1, "words": "one"}, {"n": 2, "words": None}][:1])) == [
        "one"
    ]
    numbers = write(tmp_path / f"numbers{suffix}", [{"prompt": 7}])
    with pytest.raises(ValueError, match="row 1 has no text but 7; --prompt_column names another"):
        read_prompts(numbers)


def test_lines_of_json_may_be_bare_strings(tmp_path: Path) -> None:
    file = tmp_path / "it.jsonl"
    file.write_text('"one"\n\n"two"\n')
    assert read_prompts(file) == ["one", "two"]


@pytest.mark.parametrize("suffix", module.TABLES)
def test_empty_prompts_are_left_out_and_said_once(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / f"it{suffix}", [{"prompt": text} for text in ("one", " ", "two", "")])
    assert read_prompts(file) == ["one", "two"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 of 4 prompts are empty and left out, row 2 first" in said
    with pytest.raises(ValueError, match="none of its 2 rows has a prompt"):
        read_prompts(write(tmp_path / f"none{suffix}", [{"prompt": ""}, {"prompt": " "}]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts.txt", None, r"no such file; it takes a UTF-8 text file .* a table \(.csv, .jsonl, .parquet\)"),
        ("prompts.csv", None, "no such file"),
        ("prompts.txt", b"", "is empty"),
        ("prompts.txt", b" \n\t\n", "is empty"),
        ("prompts.txt", b"a red circle\n\xff\xfe", "byte 13 is not UTF-8"),
        ("prompts.csv", b"", r"there are: none\)"),
        ("prompts.csv", b"prompt\n", "none of its 0 rows has a prompt"),
        ("prompts.csv", b"prompt\n\xff", "byte 7 is not UTF-8"),
        ("prompts.csv", b"prompt\n" + b"x" * 200_000, "no table of comma-separated values"),
        ("prompts.jsonl", b'{"prompt": "a"}\n{', "line 2 is no JSON"),
        ("prompts.jsonl", b"[1]", "line 1 is neither an object nor a string"),
        ("prompts.parquet", b"PAR1", "no whole parquet file"),
    ],
)
def test_a_file_that_cannot_work_is_refused(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_prompts(file)
    assert f"--prompts {file}" in str(error.value)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have imports of a package fail."""
    real = builtins.__import__

    def importing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "it.parquet", [{"prompt": "one"}])
    without(monkeypatch, "pyarrow")
    with pytest.raises(ValueError, match=r"it.parquet: .parquet needs pyarrow; pip install 'tdm-fast\[data\]'"):
        read_prompts(file)
    without(monkeypatch, "datasets")
    with pytest.raises(
        ValueError, match=r"owner/name: no such file; .* needs datasets; pip install 'tdm-fast\[data\]'"
    ):
        read_prompts("owner/name")


class FakeData:
    """What is used of a data set, as `datasets` has it."""

    def __init__(self, columns: dict[str, list[Any]], dtypes: dict[str, str], value: type) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: value(dtype) if dtype else SimpleNamespace() for name, dtype in dtypes.items()}

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package: it has one data set, in the cache, and notes what it is asked for."""
    fake: Any = ModuleType("datasets")
    fake.asked = []

    class Value:
        def __init__(self, dtype: str) -> None:
            self.dtype = dtype

    def load_dataset(name: str, *, split: str) -> FakeData:
        fake.asked.append((name, split, huggingface_hub.constants.HF_HUB_OFFLINE))
        if name == "owner/none":
            raise ConnectionError("not there\nat all")
        return FakeData(
            {"n": [1, 2], "words": ["one", " two"], "picture": [0, 0]},
            {"n": "int64", "words": "string", "picture": ""},
            Value,
        )

    fake.Value, fake.load_dataset = Value, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return fake


def test_a_data_sets_name(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "offline_reason", lambda *_: None)
    assert read_prompts("owner/name") == read_prompts(Path("owner/name:test")) == ["one", "two"]
    assert read_prompts(tmp_path) == ["one", "two"]  # a folder
    assert datasets.asked == [
        ("owner/name", "train", False),
        ("owner/name", "test", False),
        (str(tmp_path), "train", False),
    ]
    with pytest.raises(ValueError, match=r"--prompts owner/none: datasets cannot load it \(not there\)$"):
        read_prompts("owner/none")


def test_a_data_set_offline_is_taken_from_the_cache(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "offline_reason", lambda *_: "no network")
    assert read_prompts("owner/name") == ["one", "two"]
    with pytest.raises(ValueError, match=r"owner/none: no such file, .* \(no network\); save its prompts as a .txt"):
        read_prompts("owner/none")
    assert [offline for *_, offline in datasets.asked] == [True, True]  # so that nothing waits for a network
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
