"""What the runtime has to know of the CPU."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_X86 = frozenset({"x86_64", "amd64", "i386", "i686"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
"""Source: Linux arch/x86/include/asm/cpufeatures.h."""
MOST_WEIGHT_BITS = 8
WEIGHT_BITS = "weight_bits"
"""Option of an engine: how many of the 8 bits weights use where bytes are multiplied; 0 if they are not."""


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


def exact_weight_bits() -> int:
    """How many bits int8 weights may have so that this processor's products with activations of 8 bits are exact.

    Without VNNI 7: two products of 255 and at most 64 stay below 2^15.
    """
    return MOST_WEIGHT_BITS if multiplies_bytes_exactly() else MOST_WEIGHT_BITS - 1


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Linux' names of what an x86 processor has; none where the operating system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
