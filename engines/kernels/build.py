"""Builds the C++ kernels at first use, into the user's cache folder.

Not when sdc is installed: they are linked with the TBB inside of the openvino package, so that they run on OpenVINO's
own threads, and pip builds packages where openvino is not there yet; and sdc's wheel has to install without a compiler.
A library is kept under the digest of all that it was made of: sources, command, versions of compiler and openvino. Its
own digest lies beside it, as loading a damaged one can end the process; if it cannot be built, what the compiler said.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdc.engines.digests import file_sha256
from sdc.engines.environment import cache_folder
from sdc.engines.processor import CPUINFO, cpu_flags

log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
SOURCES = (
    "attention.cpp",
    "attention_avx512.cpp",
    "attention_avx512_int8.cpp",
    "attention_amx.cpp",
    "attention_amx_pack.cpp",
    "convolution.cpp",
    "convolution_amx.cpp",
    "convolution_filter.cpp",
    "group_norm.cpp",
    "group_norm_avx512.cpp",
    "images.cpp",
    "tiles_amx.cpp",
)
HEADERS = (
    "attention.h",
    "attention_amx.h",
    "avx512.h",
    "convolution.h",
    "group_norm.h",
    "images.h",
    "isolated.h",
    "softmax_avx512.h",
    "tiles.h",
    "tiles_amx.h",
    "workspace.h",
)

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
"""Source: Linux arch/x86/include/asm/cpufeatures.h."""
_LIBRARY = "libsdc_kernels.so"
_FAILURE = "failure.txt"
_TIMEOUT_SECONDS = 300
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)
"""Of a search or a build; RuntimeError: a user without a home folder."""


@dataclass(frozen=True)
class Toolchain:
    """What kernels are built with here.

    Attributes:
        compiler: path of a C++ compiler.
        openvino: folder of the package.
    """

    compiler: str
    openvino: Path

    def command(self, output: Path, *, flags: tuple[str, ...] = ()) -> list[str]:
        """The command that writes a shared library.

        Args:
            output: path of the library.
            flags: more of the compiler's options.
        """
        libraries = self.openvino / "libs"
        sources = [str(SOURCE_FOLDER / name) for name in SOURCES]
        tbb = [f"-L{libraries}", f"-l:{_tbb(self.openvino).name}", f"-Wl,-rpath,{libraries}"]
        include = f"-I{self.openvino / 'include'}"
        return [self.compiler, *_FLAGS, *flags, include, *sources, "-o", str(output), *tbb]

    def digest(self) -> str:
        """The hexadecimal SHA-256 of all that a library is made of."""
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        made_of = {
            "command": self.command(Path("output")),
            "compiler": version.stdout,
            "openvino": importlib.metadata.version("openvino"),
            "sources": {name: (SOURCE_FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)},
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def folder(self) -> Path:
        """Where what is built lies."""
        return cache_folder() / "kernels" / self.digest()


def find_toolchain(cpuinfo: Path = CPUINFO) -> Toolchain | str:
    """What kernels can be built with here, or in one line why they cannot be built or would not run.

    Args:
        cpuinfo: Linux' file of that name.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    flags = cpu_flags(cpuinfo)
    if missing := sorted(_NEEDED - flags):
        return f"the processor has no {', '.join(missing)}"
    package = importlib.util.find_spec("openvino")
    if package is None or package.origin is None:
        return "openvino is not installed"
    openvino = Path(package.origin).parent
    if not (openvino / "include" / "tbb").is_dir() or not _tbb(openvino).is_file():
        return f"the openvino package has no TBB to build with ({openvino})"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(_COMPILERS)}) on the PATH"
    return Toolchain(compiler, openvino)


def build_kernels(cpuinfo: Path = CPUINFO) -> Path | str:
    """The library of kernels for this machine, built if it is not there yet; or in one line why there is none."""
    toolchain = find_toolchain(cpuinfo)
    if isinstance(toolchain, str):
        return toolchain
    try:
        folder = toolchain.folder()
        library = folder / _LIBRARY
        if _is_whole(library):
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            return library if _is_whole(library) else _compile(toolchain, library)
    except _FAILURES as error:
        return f"they could not be built: {error}"


def missing_to_build(cpuinfo: Path = CPUINFO) -> str | None:
    """What `build_kernels` fails for, or failed for when it was last tried; builds nothing. None for nothing."""
    toolchain = find_toolchain(cpuinfo)
    if isinstance(toolchain, str):
        return toolchain
    try:
        return (toolchain.folder() / _FAILURE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except _FAILURES as error:
        return f"they could not be built: {error}"


def is_built() -> bool:
    """Whether the library for this machine is there already."""
    toolchain = find_toolchain()
    try:
        return isinstance(toolchain, Toolchain) and _is_whole(toolchain.folder() / _LIBRARY)
    except _FAILURES:
        return False


def _compile(toolchain: Toolchain, library: Path) -> Path | str:
    """Build beside the library's place, then rename into it."""
    log.warning("building CPU kernels with %s, once; it takes some 20 seconds", toolchain.compiler)
    failure = library.parent / _FAILURE
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        command = toolchain.command(output)
        # In a session of its own: an interrupt of ours, which may come while another thread builds, is none of its.
        built = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, start_new_session=True
        )
        if built.returncode != 0:
            lines = (built.stderr or built.stdout).splitlines()
            said = next((line for line in lines if "error" in line), f"exit status {built.returncode}")
            reason = f"{toolchain.compiler} failed: {said.strip()[:300]}"
            failure.write_text(reason, encoding="utf-8")
            return reason
        output.replace(library)
    _digest_file(library).write_text(file_sha256(library, remembered=False), encoding="utf-8")
    failure.unlink(missing_ok=True)
    return library


def _is_whole(library: Path) -> bool:
    """Whether a library is there and as it was built."""
    try:
        return file_sha256(library, remembered=False) == _digest_file(library).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _tbb(openvino: Path) -> Path:
    return openvino / "libs" / "libtbb.so.12"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock among processes; the second of two that build at once finds the first one's library."""
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
