"""Which pictures an evaluation makes."""

from __future__ import annotations

import numpy as np
import pytest

from sdc.compiler.evaluate.settings import SEEDS_A_RUN, TRIPLES, Settings, prompt_triples
from sdc.compiler.evaluate.verdicts import is_held_out
from sdc.compiler.tiny.captions import BACKGROUNDS, GARMENTS, HELD_OUT
from sdc.engines.errors import InputError


def test_prompts_meet_every_triple_once_in_each_cycle() -> None:
    triples = prompt_triples(2 * TRIPLES)
    assert len(np.unique(triples[:TRIPLES], axis=0)) == TRIPLES
    np.testing.assert_array_equal(triples[:TRIPLES], triples[TRIPLES:])
    assert len(np.unique(triples[:20, 0])) == len(GARMENTS)
    assert is_held_out(triples[:TRIPLES]).sum() == len(HELD_OUT) * len(BACKGROUNDS)


def test_runs_of_neighbouring_seeds_share_no_picture() -> None:
    first, second = (Settings(samples=50, seed=seed).picture_seeds() for seed in (0, 1))
    assert not set(first) & set(second)
    assert second[0] == SEEDS_A_RUN
    assert max(Settings(samples=50, seed=4096 * 7 + 3).picture_seeds()) < 1 << 32


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"samples": SEEDS_A_RUN + 1}, {"batch": 0}])
def test_settings_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Settings(**arguments)  # type: ignore[arg-type]
