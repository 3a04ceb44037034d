"""TensorRT for RTX plans, as far as they can be read without a GPU, a driver or TensorRT itself.

The layout is not documented; this is what plans of version 1.7 were found to hold (version, size and compute
capabilities checked with plans for every capability alone and for several). First a header of little-endian numbers:

    0   "vtrt"
    16  uint64  size of the whole file
    24  4 bytes version of TensorRT, e.g. 1 7 1 116
    28  "vtrt"
    32  uint32  one bit for each compute capability, in the order of `COMPUTE_CAPABILITIES`

and further on the compiled network as text: "header {", "descriptors {", "main {" with a line for each kernel.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from pathlib import Path

from sdc.compiler.inspect.engine_file import EngineFile, most_frequent_first
from sdc.engines.errors import InputError
from sdc.engines.targets import COMPUTE_CAPABILITIES

MAGIC = b"vtrt"
HEADER_BYTES = 36
KNOWN_VERSION = (1, 7)
LARGEST_PROGRAM_BYTES = 256 * 2**20
"""Text beyond this is not looked at; SD 1.5's UNet has 20 MB."""

FULL_TENSORRT_MAGIC = b"ptrt"
"""Of plans of the full TensorRT, which have another header."""


def inspect_plan(path: Path) -> EngineFile:
    """Describe a plan.

    Raises:
        InputError: the file is no plan of TensorRT for RTX, or it is truncated.
    """
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise InputError(f"{path} is no TensorRT plan: it has {size} bytes", hint="copy or export it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, capabilities = _read_header(data[:HEADER_BYTES], path, size)
        program = _find_program(data)
    kernels, weights = _count_kernels(program), _sum_weights(program)
    notes = ["inputs and outputs can only be read on a GPU that the plan was built for"]
    if kernels:
        notes.append("corrltn is a convolution; names like FcAddSilu list the operators that one kernel fuses")
    else:
        notes.append(f"the kernels of a plan of TensorRT for RTX {version} cannot be read")
    return EngineFile(
        path=str(path),
        format="TensorRT plan",
        bytes=size,
        operators=kernels,
        weights=weights,
        properties={
            "built with": f"TensorRT for RTX {version}",
            "built for": ", ".join(capabilities) or f"GPUs that only TensorRT for RTX {version} can tell",
        },
        notes=tuple(notes),
    )


def _read_header(header: bytes, path: Path, size: int) -> tuple[str, tuple[str, ...]]:
    """Version of TensorRT and compute capabilities."""
    if header[:4] != MAGIC:
        if header[:4] == FULL_TENSORRT_MAGIC:
            raise InputError(f"{path} is a plan of the full TensorRT, which sdc cannot read", hint="use trtexec for it")
        raise InputError(f"{path} is no TensorRT plan: it begins with {header[:4]!r}", hint="copy or export it again")
    declared, major, minor, patch, build, _, bits = struct.unpack_from("<Q4B4sI", header, 16)
    version = f"{major}.{minor}.{patch}.{build}"
    if (major, minor) != KNOWN_VERSION:
        return version, ()
    if declared != size:
        raise InputError(
            f"{path} should have {declared:,} bytes, found {size:,}", hint="it is truncated: copy or export it again"
        )
    return version, tuple(name for bit, name in enumerate(COMPUTE_CAPABILITIES) if bits >> bit & 1)


def _find_program(data: mmap.mmap) -> str:
    """The text of the compiled network; empty if there is none where it is expected."""
    begin = data.find(b"header {\n  version")
    if begin < 0:
        return ""
    end = data.find(b"\0", begin, begin + LARGEST_PROGRAM_BYTES)
    return data[begin:end].decode(errors="replace") if end > 0 else ""


def _count_kernels(program: str) -> dict[str, int]:
    """Kernels of the section "main": generated ones by the operators that they fuse, others by their kind."""
    _, _, rest = program.partition("\nmain {")
    main = rest.partition("\nshape_main {")[0]
    counts: Counter[str] = Counter()
    for kind, name in re.findall(r"^  (\w+)=\{ ?(?:name=(\S+))?", main, re.MULTILINE):
        if kind in ("allocate", "deallocate", "shape_call"):
            continue
        counts[name.removeprefix("__myl_") if name.startswith("__myl_") else kind] += 1
    return most_frequent_first(counts)


def _sum_weights(program: str) -> dict[str, int]:
    """Bytes of constants by element type."""
    counts: Counter[str] = Counter()
    for size, kind in re.findall(r"^  tensor=\{.*? const_payload_size=(\d+) .*?type=(\w+)", program, re.MULTILINE):
        counts[kind] += int(size)
    return most_frequent_first(counts)
