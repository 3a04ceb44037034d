import numpy as np
import pytest

from sdc.engines.errors import InputError
from sdc.engines.sessions.feeds import check_feeds


def test_gives_feeds_in_the_order_of_the_interface_without_copying(small_unet):
    feeds = small_unet.feeds()
    checked = check_feeds(small_unet.component.spec, dict(reversed(feeds.items())))
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
        check_feeds(small_unet.component.spec, change(small_unet.feeds()))
