"""Results are kept by content, and never trusted when they were damaged."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sdc.compiler.workshop.cache import StageCache, digest_of, digest_sources, versions_of


class Maker:
    """A stage that counts its calls."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.calls = 0
        self.content = content

    def __call__(self, folder: Path) -> Any:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_bytes(self.content)
        return {"nodes": 7, "list": [1, "two", None]}


@pytest.fixture
def stages(tmp_path: Path, cache: Path) -> StageCache:
    return StageCache(cache / "stages")


def test_a_result_is_made_once(stages: StageCache) -> None:
    make = Maker()
    first, was_cached = stages.produce("export", "key", make)
    assert not was_cached
    second, was_cached = stages.produce("export", "key", make)
    assert was_cached
    assert make.calls == 1
    assert first == second
    assert second.result == {"nodes": 7, "list": [1, "two", None]}
    assert set(second.files) == {"deep/model.bin"}
    assert (second.folder / "deep" / "model.bin").read_bytes() == b"weights"
    assert second.damage() is None


def test_another_key_or_stage_is_another_result(stages: StageCache) -> None:
    make = Maker()
    for stage, key in (("export", "a"), ("export", "b"), ("build", "a")):
        stages.produce(stage, key, make)
    assert make.calls == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"weightz"),
        lambda path: path.write_bytes(b"weigh"),
        lambda path: path.unlink(),
        lambda path: (path.parent.parent / "entry.json").write_text("{"),
        lambda path: (path.parent.parent / "entry.json").write_text("[]"),
        lambda path: (path.parent.parent / "entry.json").write_text('{"files": {"x": {"sha256": 1}}}'),
    ],
    ids=["changed", "cut", "missing", "half an index", "no index", "wrong index"],
)
def test_a_damaged_result_is_made_again(stages: StageCache, damage: Any) -> None:
    make = Maker()
    entry, _ = stages.produce("export", "key", make)
    damage(entry.folder / "deep" / "model.bin")
    again, was_cached = stages.produce("export", "key", make)
    assert not was_cached
    assert make.calls == 2
    assert again.damage() is None
    assert (again.folder / "deep" / "model.bin").read_bytes() == b"weights"


def test_a_failure_leaves_nothing(stages: StageCache) -> None:
    def fail(folder: Path) -> Any:
        (folder / "half").write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        stages.produce("export", "key", fail)
    assert [path for path in stages.root.rglob("*") if path.is_file()] == []
    assert stages.find("export", "key") is None


def test_two_that_want_the_same_make_it_once(stages: StageCache) -> None:
    make = Maker()
    started = threading.Event()

    def slow(folder: Path) -> Any:
        started.set()
        time.sleep(0.2)
        return make(folder)

    thread = threading.Thread(target=lambda: stages.produce("export", "key", slow))
    thread.start()
    started.wait(10)
    _, was_cached = stages.produce("export", "key", make)
    thread.join(10)
    assert was_cached
    assert make.calls == 1


def test_eviction_takes_what_was_not_used_for_longest(stages: StageCache) -> None:
    entries = [stages.produce("export", str(index), Maker(bytes(1000)))[0] for index in range(4)]
    for index, entry in enumerate(entries):
        os.utime(entry.folder, (1000.0 + index, 1000.0 + index))
    stages.find("export", "0")  # used just now
    now = time.time()
    assert stages.evict(10**6, now_seconds=now + 10**5) == 0
    removed = stages.evict(3000, now_seconds=now + 10**5)
    assert 2000 < removed < 4000
    assert [entry.folder.exists() for entry in entries] == [True, False, False, True]


def test_eviction_spares_what_may_be_in_use(stages: StageCache) -> None:
    entry, _ = stages.produce("export", "key", Maker(bytes(1000)))
    assert stages.evict(0, now_seconds=time.time()) == 0
    assert entry.folder.exists()


def test_digests_depend_on_values_and_not_on_order() -> None:
    assert digest_of({"a": 1, "b": [2, "x"]}) == digest_of({"b": [2, "x"], "a": 1})
    assert digest_of({"a": 1, "b": [2, "x"]}) != digest_of({"a": 1, "b": ["x", 2]})


def test_the_digest_of_sources_sees_every_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "small_package"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/deep.py"):
        (package / name).write_text("x = 1\n")
    (tmp_path / "single_module.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = digest_sources(["small_package", "single_module"])
    assert digest_sources(["small_package", "single_module"]) == before
    (package / "inner" / "deep.py").write_text("x = 2\n")
    after = digest_sources(["small_package", "single_module"])
    assert after != before
    (tmp_path / "single_module.py").write_text("y = 2\n")
    assert digest_sources(["small_package", "single_module"]) != after


def test_versions_say_what_is_not_installed() -> None:
    versions = versions_of(["numpy", "no-such-distribution"])
    assert versions["numpy"]
    assert versions["no-such-distribution"] == ""
