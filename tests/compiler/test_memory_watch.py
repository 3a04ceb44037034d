"""A limit of what an export holds: seen while it runs, told with the stage, and nothing half-made is left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from sdc.compiler.workshop.cache import StageCache
from sdc.compiler.workshop.memory_watch import MemoryWatch, Resident, resident_from_status, resident_tree
from sdc.compiler.workshop.progress import Silent, StageLog
from sdc.compiler.workshop.worker import Worker
from sdc.compiler.workshop.workshop import Workshop
from sdc.engines.errors import ExportError, InputError

SIZE_BYTES = 300 * 2**20
SLACK_BYTES = 100 * 2**20
"""Memory that this process and an idle worker may take or give back meanwhile."""
PATIENCE_SECONDS = 60.0
KEPT: list[np.ndarray] = []


def hold(size_bytes: int, folder: Path) -> int:
    """Hold so much until `drop`: whoever looks afterwards sees it."""
    (folder / "begun").write_text("")
    KEPT.append(np.ones(size_bytes, np.uint8))
    return len(KEPT)


def drop() -> None:
    KEPT.clear()


def hold_for_ever(size_bytes: int, folder: Path) -> None:
    """Only its end can end it."""
    (folder / "begun").write_text("")
    KEPT.append(np.ones(size_bytes, np.uint8))
    threading.Event().wait(PATIENCE_SECONDS)


def refuse(folder: Path) -> None:
    raise InputError(f"{folder.name} is not wanted")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    """Its worker runs, so that what it holds by itself is known."""
    with Worker(log_path=tmp_path / "log") as worker:
        worker.call(abs, 1)
        yield Workshop(StageCache(tmp_path / "cache"), worker, StageLog(Silent()))


def limited(shop: Workshop, watch: MemoryWatch) -> Workshop:
    return Workshop(shop.cache, shop.worker, shop.stages, watch)


def test_a_stage_that_stays_below_is_told_with_what_it_held(shop: Workshop) -> None:
    before = resident_tree().held_bytes
    with MemoryWatch(before + SIZE_BYTES + SLACK_BYTES, shop.worker.kill) as watch:
        limited(shop, watch).produce("large", "large", "key", hold, SIZE_BYTES)
        shop.worker.call(drop)
        limited(shop, watch).produce("small", "small", "key", hold, 0)
    large, small = shop.stages.records
    assert large.held_bytes is not None
    assert small.held_bytes is not None
    assert large.held_bytes == pytest.approx(before + SIZE_BYTES, abs=SLACK_BYTES)
    assert small.held_bytes == pytest.approx(before, abs=SLACK_BYTES), "each stage begins anew"


def test_a_stage_that_needs_more_is_ended_and_leaves_nothing(shop: Workshop, tmp_path: Path) -> None:
    limit = resident_tree().held_bytes + SIZE_BYTES // 2
    process = psutil.Process(shop.worker.call(os.getpid).value)
    with MemoryWatch(limit, shop.worker.kill) as watch:
        limited(shop, watch).produce("export small", "export", "key", hold, 0)
        with pytest.raises(ExportError, match="the stage 'build unet for cpu' needs more memory than") as caught:
            limited(shop, watch).produce("build unet for cpu", "build", "key", hold_for_ever, SIZE_BYTES)
    assert "leave out this target" in str(caught.value)
    assert not process.is_running()
    assert shop.cache.find("export", "key") is not None, "what was done before stays"
    assert shop.cache.find("build", "key") is None
    assert [path for path in (tmp_path / "cache").rglob("begun") if "export" not in path.parts] == []
    assert shop.produce("build unet for cpu", "build", "key", hold, 0).result == 1, "a new worker does it"


def test_other_errors_stay_what_they_are(shop: Workshop) -> None:
    with MemoryWatch(2**60, shop.worker.kill) as watch, pytest.raises(InputError, match="is not wanted"):
        limited(shop, watch).produce("export unet", "export", "key", refuse)


def test_pages_of_files_are_not_held() -> None:
    status = "Name:\tx\nVmHWM:\t99 kB\nRssAnon:\t  12 kB\nRssFile:\t 34 kB\nRssShmem:\t 5 kB\n"
    assert resident_from_status(status) == Resident(17 * 1024, 34 * 1024)
    assert resident_from_status("Name:\tended\n") == Resident()
