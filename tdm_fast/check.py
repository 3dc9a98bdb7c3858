"""`tdm-fast check`: a table of what works here and what does not, with what mends it; with train's flags, of that run.

Nothing of this project that imports PyTorch is imported before it is known that it can be.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

DISTRIBUTION = "tdm-fast"
EXTRAS = ("8bit", "data", "gpu")
"""What some flags need and most runs do not."""

NAME = 30
"""Characters for a row's name."""

State = Literal["ok", "warn", "failed"]
Rows = Iterator["Row"]


class Row(NamedTuple):
    """One thing that was checked."""

    name: str
    state: State
    says: str
    fix: str = ""
    """What mends it: a command, or a flag."""


def attempt(
    name: str,
    work: Callable[[], str | None],
    fix: str,
    errors: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Row:
    """Do `work` and say what it says; a failing row with the error's message, and `fix` beside it, where it raises."""
    try:
        return Row(name, "ok", work() or "")
    except errors as error:
        says = str(error).strip() or type(error).__name__
        return Row(name, "failed", says if isinstance(error, ValueError | OSError) else brief(error), fix)


def brief(error: BaseException) -> str:
    """The first line of what an error says, with its kind."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def run_check(arguments: Sequence[str] = ()) -> int:
    """Print the table of this installation and, if there are any `arguments`, of the `train` command with them.

    Returns the exit code: 1 if a row has failed, so that with `arguments` that command could not run, else 0. Writes
    nothing, and leaves out what takes long. Raises SystemExit with code 2 for flags that `train` does not have.
    """
    table = Table()
    imports = list(import_rows())
    if any(row.state == "failed" for row in imports):
        table.add("Imports", imports)
        return 1
    from tdm_fast import installation, preflight

    given = preflight.parse(arguments) if arguments else None
    table.add("Imports", imports)
    table.add("Versions", version_rows())
    for title, rows in installation.SECTIONS.items():
        table.add(title, rows())
    if given is not None:
        table.add("This run", preflight.rows(given))
    return table.end()


class Table:
    """Rows under headings, printed as they come."""

    def __init__(self) -> None:
        self.count = dict.fromkeys(("ok", "warn", "failed"), 0)

    def add(self, title: str, rows: Sequence[Row] | Rows) -> None:
        print(title, flush=True)
        for row in rows:
            self.count[row.state] += 1
            fix = f"\n{'':>{10 + NAME}}fix: {row.fix}" if row.fix else ""
            print(f"  {row.state:<6}  {row.name:<{NAME}}{row.says}{fix}", flush=True)

    def end(self) -> int:
        """Print the sum; returns the exit code."""
        print(", ".join(f"{number} {state}" for state, number in self.count.items()))
        return 1 if self.count["failed"] else 0


def import_rows() -> Rows:
    """Every module of the project, with all that they need, but for those that need an optional package."""
    package = importlib.import_module("tdm_fast")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "tdm_fast.")]
    names = [name for name in names if not re.search(r"^tdm_fast\.(_|kernels|adamw_8bit)", name)]
    for name in names:
        row = attempt("imports", partial(_import, name), "pip install --upgrade --force-reinstall tdm-fast")
        if row.state == "failed":
            yield row._replace(says=f"{name}: {row.says}")
            return
    yield Row("imports", "ok", f"{len(names)} modules")


def _import(name: str) -> str:
    return importlib.import_module(name).__name__


def version_rows() -> Rows:
    """Every package that the installation's metadata asks for, against the versions that it takes."""
    from packaging.requirements import Requirement

    yield Row("python", "ok", f"{platform.python_version()} ({sys.platform}, {platform.machine()})")
    folder = Path(__file__).parent
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Row(DISTRIBUTION, "warn", f"run from {folder}, not installed", "pip install . in the clone")
        return
    yield Row(DISTRIBUTION, "ok", f"{distribution.version} ({folder})")
    for requirement in map(Requirement, distribution.requires or ()):
        extras = [
            extra
            for extra in ("", *EXTRAS)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        if extras:
            yield _version_row(requirement.name, requirement.specifier, extras[0])


def _version_row(name: str, wanted: Any, extra: str) -> Row:
    fix = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            return Row(name, "ok", f"not installed, and not needed by most runs; to have it: {fix}")
        return Row(name, "failed", f"not installed; it takes {wanted}", fix)
    if not wanted.contains(version, prereleases=True):
        return Row(name, "warn" if extra else "failed", f"{version}, but it takes {wanted}", fix)
    return Row(name, "ok", version)
