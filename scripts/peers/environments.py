"""Virtual environments for the peers, made from PyPI once and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from peers.sides import ENVIRONMENTS, OWN, Environment

DONE = "requirements.txt"
"""In the folder of an environment that is complete: what it was made from."""

LAST_LINES = 12


class SetUpError(Exception):
    """Something that a side needs could not be made; the text is for the side's row."""


def python_of(name: str, folder: Path, *, run: Callable[[list[str], Path, dict[str, str]], None]) -> Path:
    """The interpreter of an environment, which is made unless it is there with the same requirements.

    Args:
        name: of `ENVIRONMENTS`, or the script's own.
        folder: where all environments lie.
        run: runs a command, its output into a log file, with variables of its own.

    Raises:
        SetUpError: pip failed.
    """
    if name == OWN:
        return Path(sys.executable)
    environment = ENVIRONMENTS[name]
    place = folder / name
    python = place / "bin" / "python"
    if (place / DONE).exists() and (place / DONE).read_text(encoding="utf-8") == written(environment):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(place)], log, {})
    install = [str(python), "-m", "pip", "install", *environment.arguments, *environment.requirements]
    run(install, log, dict(environment.variables))
    (place / DONE).write_text(written(environment), encoding="utf-8")
    return python


def written(environment: Environment) -> str:
    """All that makes the environment what it is."""
    variables = [f"# {name}={value}" for name, value in environment.variables.items()]
    return "\n".join([*variables, *(f"# pip {each}" for each in environment.arguments), *environment.requirements, ""])


def versions_of(python: Path) -> dict[str, str]:
    """What is installed, by name."""
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=False
    )
    return dict(line.split("==", 1) for line in listed.stdout.splitlines() if "==" in line)


def run_logged(command: list[str], log: Path, variables: dict[str, str]) -> None:
    """Run a command with its output at the end of a file.

    Raises:
        SetUpError: its status is not 0; the text ends with its last lines.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        status = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, **variables}, check=False)
    if status.returncode:
        raise SetUpError(f"status {status.returncode}: {last_lines(log)}")


def last_lines(log: Path) -> str:
    """The end of a log, on one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " / ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())
