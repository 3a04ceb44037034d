"""Canonical and fused sites of one model's networks by exporter, with the passes' time and memory.

python scripts/exporter_matrix.py --model tiny
python scripts/exporter_matrix.py --model sd15 --weights random --components unet --keep exports
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sdc.compiler.load import load_checkpoint
from sdc.compiler.stages import Source, open_source
from sdc.compiler.text_table import format_table
from sdc.compiler.trace.exporters import EXPORTERS, export_checkpoint, raise_and_count
from sdc.compiler.trace.interfaces import component_spec


def main() -> None:
    """Export, raise, fuse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    parser.add_argument("--components", nargs="+", default=["text_encoder", "unet", "vae_decoder", "vae_encoder"])
    parser.add_argument("--exporters", nargs="+", choices=sorted(EXPORTERS), default=sorted(EXPORTERS))
    parser.add_argument("--keep", type=Path, help="folder for the exports; without it they are deleted")
    options = parser.parse_args()
    configs = open_source(Source(options.model, options.weights)).configs
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for component in options.components:
            spec = component_spec(component, configs)
            for name in options.exporters:
                checkpoint = load_checkpoint(options.model, weights=options.weights)
                folder = (options.keep or Path(temporary)) / name / component
                path = export_checkpoint(EXPORTERS[name], checkpoint, spec, folder)
                rows.append({"component": component, "exporter": name} | raise_and_count(path, spec))
    print(format_table(list(rows[0]), [list(row.values()) for row in rows], words=["exporter"]))


if __name__ == "__main__":
    main()
