import hashlib
import os
import time

import pytest

from sdc.engines import digests
from sdc.engines.digests import file_sha256


@pytest.fixture
def file(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 0.2)  # enough for this file system's clock
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a" * 1000)
    return path


def settle(path):
    """Wait until the file is old enough to be remembered."""
    time.sleep(max(0.0, path.stat().st_ctime + 0.25 - time.time()))


def records(cache):
    return list((cache / "digests").glob("*")) if cache.exists() else []


def test_reads_a_fresh_file_each_time_and_remembers_a_settled_one(file, cache):
    expected = hashlib.sha256(b"a" * 1000).hexdigest()
    assert file_sha256(file) == expected
    assert not records(cache)
    settle(file)
    assert file_sha256(file) == expected
    (record,) = records(cache)
    # A poisoned record shows that it is used for an unchanged file, and never when reading is asked for.
    record.write_text(record.read_text().replace(expected, "0" * 64))
    assert file_sha256(file) == "0" * 64
    assert file_sha256(file, remembered=False) == expected


def test_notices_a_changed_byte_though_size_and_modification_time_are_as_before(file, cache):
    settle(file)
    before = file.stat()
    first = file_sha256(file)
    assert records(cache)
    with file.open("r+b") as opened:
        opened.seek(500)
        opened.write(b"b")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest() != first


def test_a_damaged_record_is_ignored(file, cache):
    settle(file)
    expected = file_sha256(file)
    (record,) = records(cache)
    for content in (b"", b"[]", b'{"fingerprint": 3}', b"\xff"):
        record.write_bytes(content)
        assert file_sha256(file) == expected


def test_works_without_a_cache_folder(file, monkeypatch, tmp_path):
    (tmp_path / "occupied").write_text("a file where the cache folder should be")
    monkeypatch.setenv("SDC_CACHE", str(tmp_path / "occupied"))
    settle(file)
    assert file_sha256(file) == hashlib.sha256(b"a" * 1000).hexdigest()
