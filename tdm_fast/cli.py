"""The command `tdm-fast`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence

USAGE = """usage: tdm-fast COMMAND [FLAGS]

  train         distil a teacher into a few-step student
  encode        encode prompts for training, once, on as many ranks as torchrun starts
  sample        make videos from prompts, with a student or a teacher
  evaluate      measure a student or a teacher of tiny-shapes
  make-teacher  train the bundled teacher from nothing
  check         what works here and what mends the rest; with train's flags, whether that run could begin

`tdm-fast COMMAND --help` lists a command's flags."""


def _train(arguments: Sequence[str]) -> int:
    from tdm_fast.config import parse_train
    from tdm_fast.train import train

    train(parse_train(arguments))
    return 0


def _encode(arguments: Sequence[str]) -> int:
    from tdm_fast.config import parse
    from tdm_fast.encode import EncodeConfig, encode

    encode(parse(EncodeConfig, arguments, prog="tdm-fast encode"))
    return 0


def _sample(arguments: Sequence[str]) -> int:
    from tdm_fast.config import parse
    from tdm_fast.sample import SampleConfig, sample

    sample(parse(SampleConfig, arguments, prog="tdm-fast sample"))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    from tdm_fast.config import parse
    from tdm_fast.evaluate import EvaluateConfig, evaluate

    evaluate(parse(EvaluateConfig, arguments, prog="tdm-fast evaluate"))
    return 0


def _make_teacher(arguments: Sequence[str]) -> int:
    from tdm_fast.config import parse
    from tdm_fast.make_teacher import TeacherConfig, make_teacher

    config = parse(TeacherConfig, arguments, prog="tdm-fast make-teacher")
    config.check()
    make_teacher(config)
    return 0


def _check(arguments: Sequence[str]) -> int:
    from tdm_fast.check import run_check

    return run_check(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "encode": _encode,
    "sample": _sample,
    "evaluate": _evaluate,
    "make-teacher": _make_teacher,
    "check": _check,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0, 1 when a rank is lost, 2 after a user's mistake or a full disk, 130 after Ctrl-C, 143 when told to leave.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib import metadata

        print(metadata.version("tdm-fast"))
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"tdm-fast: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(lambda: command(arguments[1:]))


def guarded(command: Callable[[], int]) -> int:
    """Turn what a user can mend into one line and exit code 2; TDM_FAST_TRACEBACK=1 shows the whole traceback."""
    threading.excepthook = _thread_failed
    try:
        return command()
    except KeyboardInterrupt:
        print("tdm-fast: stopped; the last whole checkpoint is intact", file=sys.stderr)
        return 130
    except Exception as error:
        _record(error)
        from safetensors import SafetensorError

        from tdm_fast.files import SaveError
        from tdm_fast.preemption import EXIT_CODE, Preempted, RankLost

        codes = {Preempted: EXIT_CODE, RankLost: 1}
        codes |= dict.fromkeys((ValueError, SaveError, OSError, SafetensorError), 2)
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), None)
        if code is None or os.environ.get("TDM_FAST_TRACEBACK") == "1":
            raise
        print(f"tdm-fast: {_rank()}{error}", file=sys.stderr)
        return code


def _rank() -> str:
    """Which rank speaks, if it is not the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _record(error: Exception) -> None:
    """Have torchrun say which rank's error ended the run: the earliest that was recorded."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread meets a full disk first; the main thread meets it next, and says so in one line."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


if __name__ == "__main__":
    sys.exit(main())
