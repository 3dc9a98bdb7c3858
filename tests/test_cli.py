"""The command: exit codes, and one message where a user can mend something."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import tdm_fast
from tdm_fast import cli
from tdm_fast.files import SaveError

Show = Callable[..., tuple[int, str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """show(*arguments) -> (exit code, everything printed): as a shell would see it."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # the parser's own way out
            code = int(end.code or 0)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.fixture
def copy(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def test_usage(show: Show) -> None:
    assert show()[0] == 2
    for flag in ("-h", "--help"):
        code, text = show(flag)
        assert code == 0 and all(command in text for command in cli.COMMANDS)
    for command in ("train", "encode", "sample", "evaluate", "make-teacher", "check"):
        code, text = show(command, "--help")
        assert code == 0 and f"tdm-fast {command}" in text


@pytest.mark.parametrize("name", ["tdm_fast", "tdm_fast.cli"])
def test_the_package_is_the_command(name: str) -> None:
    ended = subprocess.run([sys.executable, "-m", name, "no-such"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("tdm-fast: no command 'no-such'; there are train")


def test_the_flags_of_train_are_explained(show: Show) -> None:
    text = show("train", "--help")[1].replace("-", "_")
    for flag in (
        "cfg",
        "use_huber",
        "resume_from_checkpoint",
        "checkpoints_total_limit",
        "timesteps",
        "prompts",
        "config",
    ):
        assert f"__{flag}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("distil", "no command 'distil'; there are train, encode, sample, evaluate, make-teacher, check"),
        ("check now", "now"),
        ("check --use_hubert", "use.hubert"),
        ("train --use_hubert", "use.hubert"),
        ("train --cfg strong", "strong"),
        ("train --cfg nan", "cfg is nan; it must be a finite number"),
        ("train --lr_scheduler cosin", "cosin"),
        ("train --total_steps 902", "total_steps"),
        ("train --num_steps 7", "num_steps"),
        ("train --total_steps 40 --num_steps 4", "total_steps"),
        ("train --total_steps 1100", "total_steps.*1100"),
        ("train --timesteps 999 1000 399", "timesteps"),
        ("train --train_batch_size 0", "--train_batch_size 0: it takes a whole number from 1 up"),
        ("train --config no.yaml", "--config no.yaml: no such file"),
        ("train --model no/folder", "no/folder: no such folder"),
        ("sample", "prompt"),
        ("sample --prompt red --output a.avi", "--output a.avi: it takes a name that ends in .mp4, .gif, .png"),
        ("sample --prompt red --num_steps 1.5", "num.steps"),
        ("sample --prompt red --model no/folder", "no/folder: no such folder"),
        ("sample --prompt red --guidance nan", "--guidance nan: it takes a finite number"),
        ("evaluate --guidance inf", "--guidance inf: it takes a finite number"),
        ("evaluate --num_videos 63", "--num_videos 63: .* takes at least 64"),
        ("evaluate --model no/folder", "no/folder: no such folder"),
        ("evaluate --sweep --model no/folder", "no/folder: no such folder"),
        ("make-teacher --seed red", "seed"),
        ("make-teacher --seed 998", "--seed 998: it takes 0 to 900; the evaluation's clips have seeds above"),
        ("make-teacher --seed -1", "--seed -1: it takes 0 to 900"),
        ("make-teacher --vae_steps 0", "--vae_steps 0: it takes a whole number from 1 up"),
        ("make-teacher --num_latents 143", "--num_latents 143: it takes at least 144"),
        ("make-teacher --checkpoint_seconds nan", "--checkpoint_seconds nan: it takes a finite number"),
    ],
)
def test_what_cannot_work_ends_with_code_2(
    show: Show, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = arguments.split()
    if words[0] in ("train", "sample") and "--model" not in words:
        words += ["--model", str(tiny_teacher)]
    code, text = show(*words)
    assert code == 2
    assert re.search(says, " ".join(text.split())), text
    assert "Traceback" not in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), (b"\n \n", "the file is empty"), (b"caf\xe9", "byte 3 is not UTF-8")],
)
def test_prompts_files(show: Show, tiny_teacher: Path, tmp_path: Path, content: bytes | None, says: str) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "run"
    if content is not None:
        file.write_bytes(content)
    code, text = show("train", "--model", tiny_teacher, "--prompts", file, "--output_dir", output)
    assert code == 2 and f"tdm-fast: --prompts {file}: {says}" in text and not output.exists()


@pytest.mark.parametrize("command", ["train", "sample"])
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", None, "transformer is half-written"),
        ("vae/diffusion_pytorch_model.safetensors", b"\x10\0\0\0\0\0\0\0{", "is damaged or half-written"),
        ("model_index.json", b'{"_class_name": "DDPMPipeline", "unet": ["diffusers", "U"]}', "holds a DDPMPipeline"),
        ("transformer/config.json", "sample_size_h", "sample_size_h is 7; latents .* so 6 or 8 would do"),
    ],
)
def test_folders_that_are_no_teacher(
    show: Show, copy: Path, tmp_path: Path, command: str, file: str, content: bytes | str | None, says: str
) -> None:
    if content is None:
        (copy / file).unlink()
    elif isinstance(content, bytes):
        (copy / file).write_bytes(content)
    else:
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, content: 7}))
    output = tmp_path / ("run" if command == "train" else "clip.png")
    flags = ["--output_dir", output] if command == "train" else ["--output", output, "--prompt", "red"]
    code, text = show(command, "--model", copy, *flags)
    assert code == 2 and re.search(f"tdm-fast: {copy}.*{says}", text), text
    assert not output.exists()


@pytest.mark.parametrize("error", [ValueError("bad"), SaveError("bad"), OSError("bad")])
def test_mistakes_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert cli.guarded(fail) == 2
    assert capsys.readouterr().err == "tdm-fast: bad\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="ours"):
        cli.guarded(lambda: (_ for _ in ()).throw(AssertionError("ours")))


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no/folder"):
        cli.main(["sample", "--prompt", "red", "--model", "no/folder"])


def test_ctrl_c_is_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> int:
        raise KeyboardInterrupt

    assert cli.guarded(stop) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_threads_full_disk_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def work() -> int:
        for error in (OSError(28, "No space left on device"), RuntimeError("a bug")):

            def fail(error: Exception = error) -> None:
                raise error

            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
        return 0

    assert cli.guarded(work) == 0
    errors = capsys.readouterr().err
    assert "RuntimeError: a bug" in errors and "No space left" not in errors


ENTRIES = {"command": ["-c", "import sys; from tdm_fast import cli; sys.exit(cli.main())", "train"]}
ENTRIES["module"] = ["-m", "tdm_fast.train"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_is_heard_during_start_up(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", *ENTRIES[entry], "--output_dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # PyTorch is being imported when the first of its modules has been.
        first = next(line for line in process.stderr if " torch." in line)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130, first + errors
    assert "Traceback" not in errors and "tdm-fast: stopped" in errors.splitlines()[-1]


def test_the_modules_entry_is_the_same_command(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_teacher), "--output_dir", str(tmp_path), "--train_batch_size", "0"]
    ended = subprocess.run([sys.executable, *ENTRIES["module"], *flags], capture_output=True, text=True, check=False)
    assert (ended.returncode, cli.main(["train", *flags])) == (2, 2)
    # A new process also has what the libraries say that it imports.
    assert ended.stderr.splitlines()[-1:] == capsys.readouterr().err.splitlines()


def test_every_public_name_is_there() -> None:
    namespace: dict[str, object] = {}
    exec("from tdm_fast import *", namespace)
    assert set(tdm_fast.__all__) <= namespace.keys() and set(tdm_fast.__all__) <= set(dir(tdm_fast))
    with pytest.raises(AttributeError, match="module 'tdm_fast' has no attribute 'none'"):
        _ = tdm_fast.none
