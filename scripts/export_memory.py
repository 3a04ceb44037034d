"""Memory that `sdc export` takes, stage by stage: a Markdown table.

    python scripts/export_memory.py --model sd15 --weights random --precision fp16 --target rtx

It takes the arguments of `sdc export`. Nothing is in the cache at first: cache and bundle are in a folder of their own,
which is removed. Two figures, since neither says all:

- tree: what cannot be given back without swapping, anonymous and shared memory, of this process (which does what
  `sdc export` does) and all processes below it together, sampled. Pages of files that are mapped are not counted, as
  the kernel takes them back when it needs memory.
- process: the largest resident set of the one process that did the work, pages of files included, from the kernel's
  own high-water mark, so nothing between two samples is missed.

Source: Linux, proc(5): ``RssAnon``, ``RssShmem``, ``RssFile`` and ``VmHWM`` of /proc/PID/status. The mark is reset
before each stage, and with it what getrusage(2) tells, so the last row has the largest of the stages.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sdc.compiler.byte_sizes import gibibytes
from sdc.compiler.cli.export import add_arguments, request_from_arguments
from sdc.compiler.compile import export_bundle
from sdc.compiler.text_table import markdown_row
from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.memory_watch import MemoryWatch, Resident
from sdc.compiler.workshop.progress import StageRecord


class TreeMemory:
    """Progress of an export that keeps the most that all its processes held in each stage.

    Args:
        watch: samples them.
    """

    def __init__(self, watch: MemoryWatch) -> None:
        self.stages: list[tuple[StageRecord, Resident]] = []
        self._watch = watch

    def begin(self, name: str) -> None:
        """A stage begins: what was seen before is not its own."""
        print(name, file=sys.stderr)
        self._watch.begin()

    def advance(self, done: int, total: int) -> None:
        """Nothing."""

    def end(self, record: StageRecord) -> None:
        """A stage is over."""
        self.stages.append((record, self._watch.largest))


def main() -> None:
    """Export, and print a row for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-memory-", dir=os.environ.get("SDC_CACHE")) as folder:
        request = replace(request_from_arguments(options), out=Path(folder, "bundle"))
        with MemoryWatch() as watch:
            memory = TreeMemory(watch)
            export_bundle(request, cache=StageCache(Path(folder, "cache")), progress=memory)
    print_table(memory.stages)


def print_table(stages: list[tuple[StageRecord, Resident]]) -> None:
    """The stages, and the largest of all."""
    peak = max(tree.held_bytes for _, tree in stages)
    print(markdown_row("stage", "seconds", "tree", "and pages of files", "process"))
    print(markdown_row(*["---"] * 5))
    for record, tree in stages:
        name = f"**{record.name}**" if tree.held_bytes == peak else record.name
        sizes = map(gibibytes, (tree.held_bytes, tree.file_bytes, record.peak_memory_bytes))
        print(markdown_row(name, f"{record.seconds:.0f}", *sizes))
    largest = max(record.peak_memory_bytes for record, _ in stages)
    seconds = sum(record.seconds for record, _ in stages)
    print(markdown_row("all", f"{seconds:.0f}", gibibytes(peak), "", gibibytes(largest)))


if __name__ == "__main__":
    main()
