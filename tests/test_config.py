"""Flags: the demo's as they are written, a YAML file's defaults below them, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from tdm_fast.config import TrainConfig, parse_train
from tdm_fast.distill import TDMConfig

# As the public demo is called.
COMMAND_LINE = (
    "--use_huber --use_separate --total_steps 900 --cfg 4.5 --max_train_steps 10 --train_batch_size 2 "
    "--learning_rate 2e-5 --lr_scheduler cosine_with_restarts --lr_warmup_steps 50 --max_grad_norm 1 "
    "--checkpointing_steps 5 --checkpoints_total_limit 2 --resume_from_checkpoint latest --output_dir x --seed 3 "
    "--use_randmid --use_ema"
)
DEMO = COMMAND_LINE.split()


@pytest.fixture
def parse(tmp_path: Path):
    """parse(*flags, **yaml values): with a model folder that has no `train.yaml`."""

    def run(*flags: str, **values: object) -> TrainConfig:
        (tmp_path / "defaults.yaml").write_text(yaml.safe_dump(values))
        return parse_train(["--model", str(tmp_path), "--config", str(tmp_path / "defaults.yaml"), *flags])

    return run


def test_the_demos_flags_parse_as_written(tmp_path: Path) -> None:
    config = parse_train(["--model", str(tmp_path), *DEMO])
    assert config.tdm == TDMConfig(use_randmid=True, seed=3)
    o, r = config.optimiser, config.run
    assert (o.max_train_steps, o.train_batch_size, o.learning_rate, o.max_grad_norm) == (10, 2, 2e-5, 1.0)
    assert (o.lr_scheduler, o.lr_warmup_steps, o.use_ema) == ("cosine_with_restarts", 50, True)
    assert (r.checkpointing_steps, r.checkpoints_total_limit, r.resume_from_checkpoint) == (5, 2, "latest")
    assert r.output_dir == Path("x")


def test_without_flags_the_demos_values_hold(tmp_path: Path) -> None:
    config = parse_train(["--model", str(tmp_path)])
    assert config == TrainConfig(model=dataclasses.replace(TrainConfig().model, model=tmp_path))
    assert (config.tdm.num_steps, config.tdm.total_steps, config.tdm.cfg) == (4, 900, 4.5)
    assert (config.optimiser.adam_beta1, config.optimiser.adam_beta2) == (0.0, 0.95)


def test_flags_override_the_file(parse) -> None:
    values = {"cfg": 2, "seed": 5, "use_ema": False, "use_huber": True, "learning_rate": "1e-3", "prompts": None}
    config = parse("--cfg", "3.5", "--use_ema", "--no-use_huber", **values)
    assert (config.tdm.cfg, config.tdm.seed, config.tdm.use_huber) == (3.5, 5, False)
    assert config.optimiser.use_ema is True and config.optimiser.learning_rate == 1e-3
    assert config.model.prompts is None
    assert parse(**values).optimiser.use_ema is False


def test_lists_and_null(parse) -> None:
    nodes = [999, 856, 665, 399]
    config = parse(timesteps=nodes, total_steps=1000, checkpoints_total_limit=None, student_learning_rate=None)
    assert config.tdm.timesteps == tuple(nodes)
    assert config.run.checkpoints_total_limit is None and config.optimiser.student_learning_rate is None
    assert parse("--timesteps", "None", "--total_steps", "900", timesteps=nodes, total_steps=1000).tdm.timesteps is None
    assert parse("--checkpoints_total_limit", "None").run.checkpoints_total_limit is None


@pytest.mark.parametrize(
    "flags",
    [
        [],
        DEMO,
        [
            "--timesteps",
            "999",
            "856",
            "665",
            "399",
            "--total_steps",
            "1000",
            "--prompts",
            "a file",
            "--no-use_separate",
        ],
        ["--negative_prompt", "blurry, ugly", "--checkpoints_total_limit", "None", "--no-use_ema"],
    ],
)
def test_the_runs_file_gives_the_run_again(parse, tmp_path: Path, flags: list[str]) -> None:
    config = parse(*flags)
    assert parse(**config.flat()) == config


def test_a_teachers_folder_brings_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("cfg: 1.5\nmax_train_steps: 7\n")
    config = parse_train(["--max_train_steps", "9", f"--model={tmp_path}"])
    assert (config.tdm.cfg, config.optimiser.max_train_steps) == (1.5, 9)
    other = tmp_path / "other.yaml"
    other.write_text("max_train_steps: 8\n")
    config = parse_train(["--model", str(tmp_path), f"--config={other}"])
    assert (config.tdm.cfg, config.optimiser.max_train_steps) == (1.5, 8)
    config = parse_train(["--model", "elsewhere", "--config", "no.yaml", f"--config={other}", "--model", str(tmp_path)])
    assert (config.model.model, config.tdm.cfg, config.optimiser.max_train_steps) == (tmp_path, 1.5, 8)


def test_the_file_may_name_the_teacher(tmp_path: Path) -> None:
    teacher, file = tmp_path / "teacher", tmp_path / "mine.yaml"
    teacher.mkdir()
    (teacher / "train.yaml").write_text("cfg: 1.5\nseed: 3\n")
    file.write_text(f"model: {teacher}\nseed: 4\n")
    config = parse_train(["--config", str(file)])
    assert (config.model.model, config.tdm.cfg, config.tdm.seed) == (teacher, 1.5, 4)
    assert parse_train(["--config", str(file), "--model", str(tmp_path)]).tdm.cfg == 4.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "takes a mapping from flags' names to values, got list"),
        ("", "takes a mapping from flags' names to values, got NoneType"),
        ("a: [1,\n", "is not a YAML file"),
        (b"cfg: \xff\xfe", "is not a YAML file"),
        (None, "no such file"),
        ("negative_prompt: null\n", "negative_prompt is null, but it always has a value"),
        ("cfg: 2\noutput-dir:\n", "output-dir is null"),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path: Path, text: str | bytes | None, says: str) -> None:
    file = tmp_path / "defaults.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says) as error:
        parse_train(["--config", str(file)])
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("values", "flags", "names"),
    [
        ({"learning_rat": 1e-3}, [], "learning_rat"),
        ({"cfg": "strong"}, [], "cfg"),
        ({"use_ema": "perhaps"}, [], "perhaps"),
        ({}, ["--no_such_flag"], "no_such_flag"),
        ({}, ["--cfg"], "cfg"),
        ({}, ["--cfg", "strong"], "cfg"),
        ({}, ["--max_train_steps", "1.5"], "max_train_steps"),
        ({}, ["--lr_scheduler", "cosin"], "lr_scheduler"),
        ({}, ["stray"], "stray"),
    ],
)
def test_unknown_flags_and_values_end_with_code_2(
    parse, values: dict[str, object], flags: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*flags, **values)
    assert end.value.code == 2
    shown = capsys.readouterr()
    text = (shown.out + shown.err).replace("-", "_")
    assert names in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("flag", "value", "takes"),
    [
        ("max_train_steps", "0", "from 1 up"),
        ("train_batch_size", "-3", "from 1 up"),
        ("lr_warmup_steps", "-1", "from 0 up"),
        ("checkpointing_steps", "0", "from 1 up"),
        ("validation_steps", "0", "from 1 up"),
        ("checkpoints_total_limit", "0", "from 1 up"),
        ("learning_rate", "0", "above 0"),
        ("learning_rate", "nan", "above 0"),
        ("student_learning_rate", "inf", "above 0"),
        ("max_grad_norm", "-1", "above 0"),
        ("adam_beta2", "1", "below 1"),
        ("ema_decay", "1.5", "below 1"),
        ("num_eval_videos", "63", "at least 64"),
    ],
)
def test_values_out_of_range_are_refused(parse, flag: str, value: str, takes: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag} .*{takes}"):
        parse(f"--{flag}", value)
