"""What elastic channels win back: `tiny` made smaller on six garments, then restored for all ten.

    python scripts/elastic_table.py --data /usr/share/datasets/fashion-mnist --out build/elastic --threads 1

1. Channels go, and the network recovers, on pictures of six garments only; some of the channels stay, switched off.
2. `sdc compress restore` looks at prompts of all ten and switches on those that pay; as `sdc lora` does, it makes a new
   bundle with them, and then one without them again.

The table has the pictures of each bundle, of all ten garments and with the same seeds; below it is what restoring
found, and whether the last bundle is the first to the byte. All bundles are in float32 for the target cpu. What is in
the folder already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tables.figures import HEADINGS, add_arguments, drawing, figure_cells, print_headings
from tables.networks import compressed, exported

from sdc.compiler.compile import export_bundle
from sdc.compiler.compress.restore import restore
from sdc.compiler.compress.settings import settings_for
from sdc.compiler.distill.pictures import TinyPictures
from sdc.compiler.evaluate.settings import JUDGED_MODEL, prompts_of_model
from sdc.compiler.load import load_checkpoint
from sdc.compiler.lora import LoraChange, request_with_loras
from sdc.compiler.text_table import markdown_row
from sdc.compiler.tiny.captions import GARMENTS
from sdc.engines.bundle import open_bundle

LEARNT = ("t-shirt", "trouser", "pullover", "sandal", "sneaker", "bag")


def main() -> None:
    """Compress, restore, undo, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Debian's dataset-fashion-mnist")
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks")
    parser.add_argument("--parameters", type=float, default=0.41, help="share that goes, in one round")
    parser.add_argument("--elastic", type=float, default=0.05, help="share of channels that stay, switched off")
    parser.add_argument("--recover-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=80, help="that are restored for")
    add_arguments(parser)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = replace(
        settings_for(JUDGED_MODEL),
        parameters=options.parameters,
        budgets="uniform",
        elastic=options.elastic,
        rounds=1,
        recover_steps=options.recover_steps,
        batch=options.batch,
    )
    pictures = TinyPictures(options.data, seed=settings.seed, garments=[GARMENTS.index(name) for name in LEARNT])
    folder, report = compressed("six-garments", settings, pictures, options.out)
    smaller = exported(str(folder), options.out / "smaller")
    restored, undone, lora = (options.out / name for name in ("restored", "undone", "restored.safetensors"))
    prompts = prompts_of_model(JUDGED_MODEL, options.prompts)
    request = [load_checkpoint(str(folder)).digest("unet"), prompts]
    found, restored_for = options.out / "found.txt", options.out / "found.json"
    if not (found.exists() and restored_for.exists() and json.loads(restored_for.read_text()) == request):
        for old in (restored, undone):
            shutil.rmtree(old, ignore_errors=True)
        lora.unlink(missing_ok=True)
        restoration = restore(smaller, prompts, out=restored, lora=lora, tell=tell)
        if not restoration.chosen:
            raise SystemExit(restoration.to_text())
        restored_for.write_text(json.dumps(request))
        found.write_text(restoration.to_text())
    if not restored.exists():
        export_bundle(request_with_loras(smaller, LoraChange(add=(f"{lora}:1",)), restored))
    if not undone.exists():
        export_bundle(request_with_loras(restored, LoraChange(remove=(str(lora),)), undone))
    print_headings("`tiny`", *HEADINGS)
    for name, bundle in {
        "all channels": exported(JUDGED_MODEL, options.out / "whole"),
        f"{100 * report['removed_share']:.1f} % fewer parameters, learnt from six garments": smaller,
        "with the channels that pay": restored,
    }.items():
        cells = figure_cells(bundle, drawing(options), options.seeds, options.out / "figures")
        print(markdown_row(name, *cells), flush=True)
    same = open_bundle(undone).manifest.files == open_bundle(smaller).manifest.files
    print(f"\n{found.read_text()}undone: {'the same bytes' if same else 'OTHER BYTES'}")


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
