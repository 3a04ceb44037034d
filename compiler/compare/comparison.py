"""The result of a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sdc.compiler.compare.outputs import OutputDifference, Timing
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.plain_json import finite_json


@dataclass(frozen=True)
class ComponentComparison:
    """One component on both sides.

    Attributes:
        name: of the component.
        first_nodes: of the first side's graph; likewise ``second_nodes``.
        first_bytes: size of the first side's files; likewise ``second_bytes``.
        operators: by operator, how many nodes each side has, where they differ or not.
        outputs: how far the outputs lie apart; empty if they could not be computed.
        timing: None if they could not be run.
        not_run: why not; None if they were.
    """

    name: str
    first_nodes: int
    second_nodes: int
    first_bytes: int
    second_bytes: int
    operators: dict[str, tuple[int, int]]
    outputs: tuple[OutputDifference, ...]
    timing: Timing | None
    not_run: str | None


@dataclass(frozen=True)
class PictureComparison:
    """Pictures of both sides at equal prompts and seeds.

    Attributes:
        psnr_db: of each pair, at most ``PSNR_CEILING_DB``.
        settings: how they were made.
    """

    psnr_db: tuple[float, ...]
    settings: Settings


@dataclass(frozen=True)
class Comparison:
    """All that `sdc compare` says; ``first`` and ``second`` describe the sides."""

    first: str
    second: str
    components: tuple[ComponentComparison, ...]
    pictures: PictureComparison | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null."""
        value = finite_json(asdict(self))
        assert isinstance(value, dict)
        return value
