"""What this process has in memory of a file that it maps; on Linux."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(path: Path) -> int:
    """Of all that this process has mapped of a file; proc(5), smaps."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            inside = rest[-1] == str(path)
        elif inside and name == "Rss:":
            found += 1024 * int(rest[0])
    return found
