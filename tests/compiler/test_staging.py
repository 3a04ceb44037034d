"""A folder appears whole or not at all, whoever is interrupted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdc.compiler.workshop.staging import exclusive, staged_folder
from sdc.engines.errors import InputError


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def put(final: Path, content: str) -> None:
    with exclusive(final), staged_folder(final, durable=True) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(content)


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    put(final, "first")
    put(final, "second")
    assert [path.name for path in final.rglob("*")] == ["deep", "file"]
    assert (final / "deep" / "file").read_text() == "second"
    assert hidden(tmp_path) == []


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    with exclusive(final), staged_folder(final, durable=False) as folder:
        (folder / "file").write_text("content")
        assert not final.exists()
    assert (final / "file").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), SystemExit(3)])
def test_the_old_folder_survives_a_failure(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "bundle"
    put(final, "good")

    def fail() -> None:
        with exclusive(final), staged_folder(final, durable=True) as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (final / "deep" / "file").read_text() == "good"
    assert hidden(tmp_path) == []


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        put(tmp_path / "bundle", "content")
    finally:
        os.umask(previous)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750


def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    put(final, "good")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sdc.compiler.workshop.staging import exclusive, staged_folder\n"
        "final = Path(sys.argv[1])\n"
        "with exclusive(final), staged_folder(final, durable=True) as folder:\n"
        "    (folder / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(final)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (final / "deep" / "file").read_text() == "good"
    assert len(hidden(tmp_path)) == 2, "the lock and the half folder"
    with exclusive(final):
        assert not list(tmp_path.glob("*.partial-*"))
    assert (final / "deep" / "file").read_text() == "good"
    assert hidden(tmp_path) == []


def test_a_replacement_that_was_killed_between_its_two_renamings_is_undone(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    put(final, "good")
    final.rename(tmp_path / ".bundle.previous")
    with exclusive(final):
        assert (final / "deep" / "file").read_text() == "good"
    assert hidden(tmp_path) == []


def test_the_previous_folder_is_removed_when_the_replacement_was_complete(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    put(final, "old")
    final.rename(tmp_path / ".bundle.previous")
    (final / "deep").mkdir(parents=True)
    (final / "deep" / "file").write_text("new")
    with exclusive(final):
        assert (final / "deep" / "file").read_text() == "new"
    assert hidden(tmp_path) == []


def test_leftovers_of_another_folder_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".bundle-2.partial-x"
    other.mkdir()
    with exclusive(tmp_path / "bundle"):
        pass
    assert other.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files, from anyone")
@pytest.mark.parametrize("place", ["/proc/bundle", "/proc/deep/bundle"])
def test_a_place_that_takes_no_files_is_not_waited_for(place: str) -> None:
    with (
        pytest.raises(InputError, match=f"{place} cannot be written: .*; choose another place"),
        exclusive(Path(place)),
    ):
        pytest.fail("held")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    final, inside, waited = tmp_path / "bundle", 0, threading.Event()
    most = 0
    lock = threading.Lock()

    def hold() -> None:
        nonlocal inside, most
        for _ in range(20):
            with exclusive(final, on_wait=waited.set):
                with lock:
                    inside += 1
                    most = max(most, inside)
                threading.Event().wait(0.001)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert waited.is_set()
