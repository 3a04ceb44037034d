"""One model's networks by every exporter: canonical and fused sites, and the differences to the exporter's own graph.

python scripts/exporter_matrix.py --model tiny
python scripts/exporter_matrix.py --model sd15 --weights random --components unet vae_decoder text_encoder
python scripts/exporter_matrix.py --model sd15 --weights random --exporters --graphs sd15-by-optimum

Graphs of other tools stand in folders as optimum writes them, ``unet/model.onnx``; optimum itself needs an environment
of its own (`scripts/save_checkpoint.py` writes random weights as it can read them). Ends with status 1 if the canonical
sites of a network depend on the exporter, a site of GroupNorm and SiLU or an attention is not fused, or a float32 graph
is further than 1e-5 from its source. Temporary files take up to twice the weights' size, in TMPDIR.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdc.compiler.load import load_checkpoint
from sdc.compiler.stages import Source, open_source
from sdc.compiler.text_table import markdown_row
from sdc.compiler.trace.exporters import EXPORTERS, export_checkpoint
from sdc.compiler.trace.interfaces import component_spec
from sdc.compiler.trace.raised import COUNTED, Raised, raise_and_compare, several_sizes
from sdc.compiler.workshop.worker import Worker
from sdc.engines.specs import COMPONENTS, ComponentSpec

TOLERANCE = 1e-5
"""Of float32 graphs: rewriting changes the order of sums only."""

Rows = dict[tuple[str, str], Raised]


def main() -> int:
    """Export, raise, fuse, compare, print."""
    options = arguments()
    configs = open_source(Source(options.model, options.weights)).configs
    rows: Rows = {}
    print(markdown_row("component", "exporter", *HEADINGS), markdown_row(*["---"] * (2 + len(HEADINGS))), sep="\n")
    for component in options.components:
        spec = component_spec(component, configs)
        vocabulary = configs["text_encoder"]["vocab_size"]
        for label in options.exporters:
            with tempfile.TemporaryDirectory(prefix="sdc-exports-") as temporary:
                folder = (options.keep or Path(temporary)) / label / component
                path = in_child(export_by, label, options.model, options.weights, spec, folder)
                rows[component, label] = in_child(raise_and_compare, path, spec, several_sizes(spec), vocabulary)
            print(table_row(component, label, rows[component, label]), flush=True)
        for folder in options.graphs:
            path = folder / component / "model.onnx"
            rows[component, folder.name] = in_child(raise_and_compare, path, spec, several_sizes(spec), vocabulary)
            print(table_row(component, folder.name, rows[component, folder.name]), flush=True)
    faults = list(find_faults(rows))
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS)
    parser.add_argument("--exporters", nargs="*", choices=sorted(EXPORTERS), default=list(EXPORTERS))
    parser.add_argument("--graphs", nargs="+", type=Path, default=[], metavar="FOLDER", help="what optimum exported")
    parser.add_argument("--keep", type=Path, help="folder for the exports; without it they are deleted")
    return parser.parse_args()


def in_child(function: Any, *given: Any) -> Any:
    """Call in a process of its own, so that the memory of an export is gone before the next one."""
    with Worker(log_path=Path("/dev/null")) as worker:
        return worker.call(function, *given).value


def export_by(label: str, model: str, weights: Any, spec: ComponentSpec, folder: Path) -> Path:
    """Path of the graph."""
    return export_checkpoint(EXPORTERS[label], load_checkpoint(model, weights=weights), spec, folder)


HEADINGS = (
    *("nodes", *COUNTED, "GroupNorm+SiLU fused", "attention fused", "nodes, fused"),
    *("difference, canonical", "difference, fused"),
)


def table_row(component: str, exporter: str, raised: Raised) -> str:
    """One line of the Markdown table."""
    fused, sites = raised.norms_with_silu
    return markdown_row(
        *(component, exporter, f"{raised.source_nodes:,}", *map(str, raised.sites.values()), f"{fused} of {sites}"),
        *(f"{raised.fused_attention}", f"{raised.fused_nodes:,}"),
        *(f"{raised.canonical_difference:.1e}", f"{raised.fused_difference:.1e}"),
    )


def find_faults(rows: Mapping[tuple[str, str], Raised]) -> list[str]:
    """What the exporters do not agree in, and what is not equal to its source."""
    faults = []
    first: dict[str, Raised] = {}
    for (component, label), row in rows.items():
        wanted = first.setdefault(component, row)
        if row.sites != wanted.sites:
            faults.append(f"{component} of {label}: sites {row.sites}, of another exporter {wanted.sites}")
        if row.norms_with_silu[0] != row.norms_with_silu[1] or row.fused_attention != row.sites["Attention"]:
            faults.append(f"{component} of {label}: sites are not fused")
        for difference in (row.canonical_difference, row.fused_difference):
            if not row.half and not difference <= TOLERANCE:
                faults.append(f"{component} of {label}: {difference:.1e} from its source")
    return faults


if __name__ == "__main__":
    sys.exit(main())
