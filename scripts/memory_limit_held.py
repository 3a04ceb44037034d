"""Draws pictures in a control group of Linux that may not take more memory than a limit, with and without our measures.

    python scripts/memory_limit_held.py build/sd15-int8 --limit 1.5GiB --batch 4

The kernel ends a process that wants more (it takes pages of files back first). So the run without ``--memory-limit``
has to die where one with it draws its pictures: else the limit would prove nothing. The group is made below the one
that this process is in, which needs the right to do so (root, and cgroup v1, or v2 where the parent delegates the
memory controller); it is removed afterwards. Pages of files that others read before count where they were read first.

Source: Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdc.compiler.byte_sizes import gibibytes, parse_bytes
from sdc.compiler.text_table import markdown_row
from sdc.engines.errors import InputError

ROOT = Path("/sys/fs/cgroup")
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
"""A shell that enters the group and becomes the command."""
SDC = "import sys; from sdc.compiler.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Group:
    """A control group.

    Attributes:
        folder: of its files.
        limit: names of the files that the limit is written into; those that are missing are left out.
        peak: name of the file with the most that it took.
    """

    folder: Path
    limit: tuple[str, ...]
    peak: str


def main() -> None:
    """Run both and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit", type=parse_bytes, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, metavar="PX")
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    print(markdown_row("run", "limit", "group's peak", "ended"), markdown_row(*["---"] * 4), sep="\n")
    for measures in ([], ["--memory-limit", f"{options.limit}B"]):
        with limited_group(options.limit) as group, tempfile.TemporaryDirectory() as folder:
            arguments = ["--target", "cpu", "--prompt", "a photo", "--seed", "0", "--steps", str(options.steps)]
            arguments += ["--batch", str(options.batch), "--height", str(options.size), "--width", str(options.size)]
            command = [sys.executable, "-c", SDC, "run", str(options.bundle), *arguments, *measures]
            done = subprocess.run(
                ["sh", "-c", ENTER, str(group.folder), *command, "--out", f"{folder}/a.png"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            pictures = len(list(Path(folder).glob("*.png")))
            peak = int((group.folder / group.peak).read_text())
        said = [line for line in done.stderr.splitlines() if line.startswith("memory:")]
        how = "killed" if done.returncode == -9 else f"code {done.returncode}"
        name = "with --memory-limit" if measures else "without"
        print(markdown_row(name, gibibytes(options.limit), gibibytes(peak), f"{how}, {pictures} pictures"), flush=True)
        sys.stderr.writelines(f"{line}\n" for line in said)


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Group]:
    """A group below this process's own, without swap, for the length of a block.

    Raises:
        InputError: this process may not make one.
    """
    group = _describe(_own_memberships())
    try:
        group.folder.mkdir()
        for name in group.limit:
            if (group.folder / name).exists():
                (group.folder / name).write_text("0" if name == "memory.swap.max" else str(limit_bytes))
    except OSError as error:
        raise InputError(f"cannot limit memory in {group.folder}: {error}", hint="run it as root on Linux") from error
    try:
        yield group
    finally:
        group.folder.rmdir()


def _own_memberships() -> dict[str, str]:
    """Path by controller; "" is cgroup v2's. Source: cgroups(7), /proc/self/cgroup."""
    rows = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return {controller: path for _, controllers, path in rows for controller in controllers.split(",")}


def _describe(memberships: dict[str, str]) -> Group:
    if "memory" in memberships:
        folder = ROOT / "memory" / memberships["memory"].lstrip("/") / "sdc-memory-limit"
        limits = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        return Group(folder, limits, "memory.max_usage_in_bytes")
    folder = ROOT / memberships.get("", "").lstrip("/") / "sdc-memory-limit"
    return Group(folder, ("memory.max", "memory.swap.max"), "memory.peak")


if __name__ == "__main__":
    main()
