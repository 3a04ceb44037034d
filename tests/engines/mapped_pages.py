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


def mapped_file(address: int) -> str:
    """Name of the file that is mapped at an address; empty if there is none. proc(5), maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *rest = line.split(maxsplit=5)
        begin, end = (int(each, 16) for each in addresses.split("-"))
        if begin <= address < end:
            return rest[-1] if len(rest) == 5 and rest[-1].startswith("/") else ""
    return ""
