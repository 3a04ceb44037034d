from pathlib import Path

import pytest

from sdc.engines.environment import (
    cache_folder,
    kernels_beyond_attention,
    kernels_may_round_to_bytes,
    kernels_may_use_amx,
    kernels_wanted,
)
from sdc.engines.errors import InputError


def test_the_cache_folder_is_the_chosen_one_then_the_users(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    monkeypatch.setenv("SDC_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")
    monkeypatch.setenv("SDC_CACHE", "")
    assert cache_folder() == Path("/users/cache/sdc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/sdc")


@pytest.mark.parametrize("local", ["/users/local", None])
def test_the_cache_folder_on_windows(monkeypatch, local):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.delenv("SDC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/users/someone")
    if local is None:
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
    else:
        monkeypatch.setenv("LOCALAPPDATA", local)
    assert cache_folder() == Path(local or "/users/someone/AppData/Local") / "sdc"


@pytest.mark.parametrize(
    ("value", "wanted", "in_bytes", "amx", "norms"),
    [
        (None, True, True, True, True),
        ("", True, True, True, True),
        ("1", True, True, True, True),
        ("0", False, True, True, True),
        ("bf16", True, False, True, True),
        ("avx512", True, True, False, True),
        ("avx512, bf16", True, False, False, True),
        ("attention", True, True, True, False),
    ],
)
def test_kernels_are_wanted_unless_switched_off(monkeypatch, value, wanted, in_bytes, amx, norms):
    if value is None:
        monkeypatch.delenv("SDC_KERNELS", raising=False)
    else:
        monkeypatch.setenv("SDC_KERNELS", value)
    assert kernels_wanted() is wanted
    assert kernels_may_round_to_bytes() is in_bytes
    assert kernels_may_use_amx() is amx
    assert kernels_beyond_attention() is norms


def test_a_word_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("SDC_KERNELS", "bf16,off")
    with pytest.raises(InputError, match=r"\$SDC_KERNELS says 'off', .*; use 0, 1, attention, avx512 or bf16,"):
        kernels_wanted()
