"""What can go wrong around an export: requests that cannot be met, and disks that are full."""

from __future__ import annotations

import errno
import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdc.compiler.bundle.writer import check_output
from sdc.compiler.calibration.options import DEFAULT_CALIBRATION
from sdc.compiler.export_plan import ExportRequest, formats_on
from sdc.compiler.precision.capabilities import check_formats
from sdc.engines.environment import cache_folder
from sdc.engines.errors import ExportError, InputError, SdcError, TargetError
from sdc.engines.targets import BACKEND_MODULES, TENSORRT_RTX

STATUS = Path("/proc/self/status")
"""Tells what a process holds; its fields are in proc(5)."""
FULL_DISK_BYTES = 2**20
"""A disk with less room is taken for full: a library that failed on it need not have said so."""
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
"""What `numpy.ndarray.tofile` says of a write that was cut; it loses the error number."""


def check_request(request: ExportRequest) -> None:
    """Check what can be known before any work.

    Raises:
        InputError: options of calibration without one or that a target cannot run, a depth of DeepCache below 0, fewer
            than two shards, a limit of memory where nobody can tell what is held, or an output folder that holds
            something else.
        TargetError: the library that builds for a target is not installed, or the target does not run the precision.
    """
    if request.calibration != DEFAULT_CALIBRATION and not request.precision.calibrates:
        raise InputError(
            f"calibration options have no effect on {request.precision.name}",
            hint="add --precision int8, or leave them out",
        )
    if request.deepcache is not None and request.deepcache < 0:
        raise InputError(f"--deepcache {request.deepcache} is no depth", hint="choose 0 or more; 0 is the fastest")
    if request.shards is not None and request.shards < 2:
        raise InputError(f"--shards {request.shards} leaves nothing to cut", hint="choose 2 or more, or leave it out")
    if request.memory_limit_bytes is not None and not STATUS.exists():
        raise InputError(f"--memory-limit of an export needs {STATUS}, which Linux has", hint="leave it out")
    check_output(request.out)
    for target in request.targets:
        check_formats(target, formats_on(target, request.precision))
        request.calibration.rule_for(target)
        module = BACKEND_MODULES[target.backend]
        if importlib.util.find_spec(module) is None:
            extra = "tensorrt" if target.backend == TENSORRT_RTX else "compile"
            raise TargetError(
                f"the target {target.name!r} needs the package {module}, which is not installed",
                hint=f"pip install 'sdc[{extra}]', or choose other targets with --target",
            )


@contextmanager
def explaining_full_disk(*folders: Path) -> Iterator[None]:
    """Turn an error of the system in the block into one that names the place and says what to do.

    Args:
        folders: where the block writes.

    Raises:
        ExportError: there was no room; whatever a library made of it.
        InputError: writing was not allowed.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno in OUT_OF_SPACE or SHORT_WRITE.search(str(error)):
            raise _full_disk(error.filename or folders[0]) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"cannot write {error.filename}: {error.strerror}", hint="choose another --out") from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{error.filename} is a file, expected a folder", hint="choose another --out") from error
        raise
    except (SdcError, RuntimeError) as error:
        for folder in folders:
            if folder.exists() and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
                raise _full_disk(folder) from error
        raise


def _full_disk(place: object) -> ExportError:
    return ExportError(
        f"no space is left for {place}; nothing was changed",
        hint=f"make room, or move the cache ({cache_folder()}) by setting SDC_CACHE",
    )
