import numpy as np
import pytest

from sdc.engines.errors import InputError
from sdc.engines.sessions.feeds import HeldFeeds


def test_gives_feeds_in_the_order_of_the_interface_without_copying(small_unet):
    feeds = small_unet.feeds()
    checked = HeldFeeds(small_unet.component.spec, {}).complete(dict(reversed(feeds.items())))
    assert list(checked) == ["sample", "timestep", "encoder_hidden_states"]
    assert all(checked[name] is feeds[name] for name in feeds)


def broken(**changes):
    return lambda feeds: {name: array for name, array in {**feeds, **changes}.items() if array is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(timestep=None), "timestep is missing"),
        (broken(smaple=np.zeros(1)), "smaple is unknown"),
        (broken(timestep=[1.0]), r"timestep: expected an array float32 \[1\], found list"),
        (broken(timestep=np.zeros(1)), r"timestep: expected float32 \[1\], found float64 \[1\]"),
        (broken(timestep=np.float32([[1]])), r"expected float32 \[1\], found float32 \[1, 1\]"),
        (broken(timestep=np.zeros(3, np.float32)), "timestep: axis 0 must be 1, found 3"),
        (broken(encoder_hidden_states=np.zeros((2, 5, 7), np.float32)), "B is 2 here and 3 in an earlier input"),
        (broken(sample=np.zeros((5, 3, 10, 14), np.float32)), "B must be from 1 to 4, found 5"),
        (broken(sample=np.zeros((0, 3, 10, 14), np.float32)), "B must be from 1 to 4, found 0"),
        (broken(sample=np.zeros((3, 3, 2, 14), np.float32)), "H must be from 4 to 32, found 2"),
        (broken(sample=np.zeros((3, 3, 10, 15), np.float32)), "W must be a multiple of 2, found 15"),
    ],
)
def test_refuses_what_the_interface_does_not_allow(small_unet, change, message):
    with pytest.raises(InputError, match=message):
        HeldFeeds(small_unet.component.spec, {}).complete(change(small_unet.feeds()))


def test_feeds_that_are_held_are_checked_once_and_the_others_against_them(small_unet):
    spec, feeds = small_unet.component.spec, small_unet.feeds()
    text = feeds.pop("encoder_hidden_states")
    held = HeldFeeds(spec, {"encoder_hidden_states": text})
    assert held.arrays["encoder_hidden_states"] is text
    for _ in range(2):
        assert list(held.complete(feeds)) == ["sample", "timestep"]
    with pytest.raises(InputError, match="encoder_hidden_states is unknown"):
        held.complete({**feeds, "encoder_hidden_states": text})
    with pytest.raises(InputError, match="timestep is missing"):
        held.complete({"sample": feeds["sample"]})
    with pytest.raises(InputError, match="sample: B is 2 here and 3 in an earlier input"):
        held.complete({**feeds, "sample": feeds["sample"][:2]})
    assert list(held.complete(feeds)) == ["sample", "timestep"], "a refused feed leaves no trace"


def test_refuses_to_hold_what_the_interface_does_not_allow(small_unet):
    with pytest.raises(InputError, match="B must be from 1 to 4, found 5"):
        HeldFeeds(small_unet.component.spec, {"encoder_hidden_states": np.zeros((5, 5, 7), np.float32)})
    with pytest.raises(InputError, match="smaple is unknown"):
        HeldFeeds(small_unet.component.spec, {"smaple": np.zeros(1)})
