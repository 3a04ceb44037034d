"""What fusion passes share: they count their candidates and refuse a graph in which they should have found some."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes import domain
from sdc.passes.base import Skipped

log = logging.getLogger(__name__)


def count_fused(model: ir.Model, *operators: str) -> int:
    """Nodes of the main graph that are one of `operators` of domain `sdc`."""
    return sum(node.domain == domain.DOMAIN and node.op_type in operators for node in model.graph)


def check_fused(name: str, sites: int, skipped: Sequence[Skipped], *, required: bool) -> None:
    """Say which candidates a fusion missed and why.

    Args:
        name: the pass's name.
        sites: fused sites of the graph, those of an earlier run among them.
        skipped: candidates left alone.
        required: whether the network is known to hold such sites.

    Raises:
        PassError: sites are required and none was fused.
    """
    reasons = "; ".join(f"{each.site}: {each.reason}" for each in skipped)
    if required and sites == 0:
        found = f"missed {len(skipped)}: {reasons}" if skipped else "the graph holds nothing that looks like one"
        raise PassError(
            f"{name}: expected at least one site, fused none ({found})",
            hint="the graph spells them in a way that no pass knows: turn fusion off (--no-fuse), and report the graph",
        )
    if skipped:
        log.warning("%s: fused %d of %d sites, missed %s", name, sites, sites + len(skipped), reasons)
