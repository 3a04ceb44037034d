"""`sdc optimize`: the passes of an export on anybody's ONNX file."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdc.compiler.build.built import save_onnx, weights_path
from sdc.compiler.inspect.onnx_file import weight_files
from sdc.engines.errors import InputError
from sdc.engines.targets import Target
from sdc.passes.base import PassReport, run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, low_rank_passes, lowering_passes

LOW_RANK_PHASE = "low rank"
"""Its skipped layers are in the report alone: they may be hundreds."""


@dataclass(frozen=True)
class Optimized:
    """What became of a file.

    Attributes:
        nodes_before: of the graph; likewise ``nodes_after``.
        phases: reports of the passes, by phase in order.
    """

    nodes_before: int
    nodes_after: int
    phases: dict[str, tuple[PassReport, ...]]

    @property
    def low_rank_text(self) -> str | None:
        """How many layers were split, and their weights before and after; None if no rank was lowered."""
        if LOW_RANK_PHASE not in self.phases:
            return None
        split = self.phases[LOW_RANK_PHASE][0]
        layers = (split.details or {"layers": {}})["layers"].values()
        before, after = (sum(each[f"weights_{when}"] for each in layers) for when in ("before", "after"))
        return (
            f"low rank: {split.matched} of {split.matched + len(split.skipped)} layers are two each, of {before:,} "
            f"weights {after:,} are left"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def optimize_file(source: Path, out: Path, target: Target | None, *, energy: float | None = None) -> Optimized:
    """Write the fused graph of `source` to `out`, its weights beside it in ``<out>_data``.

    Weights stay on disk until they are copied, so memory does not grow with them; factors of weights do not.

    Args:
        source: an ONNX file of opset 13 or later, with or without external weights.
        out: takes its place when it is complete; not the source.
        target: lower for its backend; None keeps the fused operators as model-local functions, which any ONNX runtime
            can run.
        energy: share of their energy that weights keep in a lower rank, as `low_rank_passes` says; None leaves them.

    Raises:
        InputError: `source` is no ONNX model, `out` cannot be written, or the energy is not between 0 and 1.
        PassError: a pass met a graph that it cannot handle.
    """
    low_rank = None if energy is None else low_rank_passes(energy)
    weights = weight_files(source)  # all are there
    if out.resolve() == source.resolve():
        raise InputError(f"{out} is the file to optimise", hint="choose another -o")
    if weights_path(out).resolve() in {file.resolve() for file in weights}:
        raise InputError(
            f"the weights of {out} would take the place of {weights_path(out)}, which holds those of {source}",
            hint="choose another -o",
        )
    if out.is_dir():
        raise InputError(f"{out} is a folder", hint=f"name a file, for example {out / 'model.onnx'}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no such folder", hint="make the folder first")
    model = ir.load(source)
    nodes_before = len(model.graph)
    phases = {
        "canonical": tuple(run_passes(canonical_passes(), model)),
        "fusion": tuple(run_passes(fusion_passes(), model)),
    }
    if low_rank is not None:
        phases[LOW_RANK_PHASE] = tuple(run_passes(low_rank, model))
    if target is not None:
        phases["lowering"] = tuple(run_passes(lowering_passes(target.backend), model))
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.partial-") as folder:
        save_onnx(model, Path(folder, out.name))
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights first: no graph without its weights
            file.replace(out.absolute().parent / file.name)
    return Optimized(nodes_before, len(model.graph), phases)
