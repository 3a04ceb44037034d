"""The result of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdc.compiler.compare.denoising import Denoising
from sdc.compiler.compare.execution import Execution
from sdc.compiler.compare.outputs import OutputDifference, Timing
from sdc.compiler.compare.pictures import PictureComparison, PicturePairs
from sdc.compiler.plain_json import finite_json


@dataclass(frozen=True)
class ComponentSide:
    """One component on one side.

    Attributes:
        nodes: of the graph.
        file_bytes: size of the engine's files.
        execution: what the backend executed; None if it was not run.
        peak_memory_bytes: of a process of its own that loads and runs the engine; None if it was not run.
    """

    nodes: int
    file_bytes: int
    execution: Execution | None
    peak_memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        execution = self.execution
        return {
            "nodes": self.nodes,
            "file_bytes": self.file_bytes,
            "kernels": None if execution is None else execution.count,
            "kernels_by_kind": None if execution is None else dict(execution.kernels),
            "written_bytes": None if execution is None else execution.written_bytes,
            "largest_bytes": None if execution is None else execution.largest_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class ComponentComparison:
    """One component on both sides.

    Attributes:
        name: of the component.
        first: what it is on the first side; likewise ``second``.
        operators: by operator, how many nodes each side has, where they differ or not.
        outputs: how far the outputs lie apart; empty if they could not be computed or compared.
        timing: None if they could not be run.
        not_run: why not; None if they were.
        not_compared: why outputs were not compared though both sides were run; None if they were.
    """

    name: str
    first: ComponentSide
    second: ComponentSide
    operators: Mapping[str, tuple[int, int]]
    outputs: tuple[OutputDifference, ...]
    timing: Timing | None
    not_run: str | None
    not_compared: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "operators": {name: list(counts) for name, counts in self.operators.items()},
            "outputs": [asdict(output) for output in self.outputs],
            "timing": self.timing and asdict(self.timing),
            "not_run": self.not_run,
            "not_compared": self.not_compared,
        }


@dataclass(frozen=True)
class Comparison:
    """All that `sdc compare` says.

    Attributes:
        first: description of the first side; likewise ``second``.
        components: those that both sides have.
        denoising: step by step; None without pictures.
        pictures: None if none were made.
        pairs: the pictures themselves; they are not in the JSON form.
        notes: what was not compared, and why.
    """

    first: str
    second: str
    components: tuple[ComponentComparison, ...]
    denoising: Denoising | None
    pictures: PictureComparison | None
    pairs: PicturePairs | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null."""
        value = finite_json(
            {
                "first": self.first,
                "second": self.second,
                "components": [component.to_json() for component in self.components],
                "denoising": self.denoising and asdict(self.denoising),
                "pictures": self.pictures and asdict(self.pictures),
                "notes": list(self.notes),
            }
        )
        assert isinstance(value, dict)
        return value
