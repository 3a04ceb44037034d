"""What the runtime has to know of the CPU."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Source: Linux arch/x86/include/asm/cpufeatures.h."""


def multiplies_bytes_exactly(machine: str | None = None, cpuinfo: Path = CPUINFO) -> bool:
    """Whether products of uint8 and int8 are summed in 32 bits.

    x86 without VNNI has VPMADDUBSW alone, which adds pairs of products in 16 bits and saturates. Where the flags are
    not known, as on Windows, an x86 CPU counts as one of these.

    Args:
        machine: as `platform.machine` says it; None for this one.
        cpuinfo: Linux' file of that name.
    """
    if (machine or platform.machine()).lower() not in _X86:
        return True
    return not _VNNI.isdisjoint(cpu_flags(cpuinfo))


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Linux' names of what an x86 processor has; none where the operating system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
