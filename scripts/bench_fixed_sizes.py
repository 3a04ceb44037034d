"""Engines for OpenVINO compiled for one size, as a session does at first, beside the same compiled for any size.

    python scripts/bench_fixed_sizes.py build/tiny-int8 --rounds 300 --reference build/tiny-fp32

Calls in turn, at the sizes that engines are tuned for, with random inputs. Prints medians, the ratio, how far the
results are from each other, and from those of a reference.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from unet_steps import ratio_text

from sdc.compiler.compare.outputs import compare_outputs, draw_feeds, seconds_in_turn
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import open_bundle
from sdc.engines.session import Session

HEADINGS = (
    *("component", "any size, ms", "one size, ms", "ratio (quartiles)", "between the two"),
    *("reference to any size", "reference to one size"),
)


def main() -> None:
    """Parse the command line, and print a row for each component."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, help="bundle that errors are measured to")
    parser.add_argument("--target", default="cpu", help="one of OpenVINO's")
    parser.add_argument("--components", nargs="+", default=["unet", "text_encoder", "vae_decoder"])
    parser.add_argument("--threads", type=int, help="OpenVINO's choice if missing")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS)), sep="\n")
    for component in options.components:
        print(markdown_row(component, *measure(component, options)), flush=True)


def measure(component: str, options: argparse.Namespace) -> list[str]:
    """The cells of a row after the first."""
    with ExitStack() as stack:

        def load(folder: Path) -> Session:
            bundle = open_bundle(folder)
            target = bundle.choose_target(options.target)
            return stack.enter_context(bundle.load_session(component, target, threads=options.threads))

        any_size, one_size = load(options.bundle), load(options.bundle)
        spec = one_size.spec
        feeds = draw_feeds(spec, seed=0)
        sizes = spec.dimensions.values()
        bound = "minimum" if any(size.minimum < size.optimum for size in sizes) else "maximum"
        other = {name: replace(size, optimum=getattr(size, bound)) for name, size in spec.dimensions.items()}
        any_size.run(draw_feeds(replace(spec, dimensions=other), seed=0))  # so that `feeds` are its second size
        sessions = (any_size, one_size)
        results = [session.run(feeds) for session in sessions]
        pairs = [results]
        if options.reference is not None:
            exact = load(options.reference).run(feeds)
            pairs += [[exact, each] for each in results]
        errors = [max(each.relative_rms for each in compare_outputs(*pair)) for pair in pairs]
        seconds = seconds_in_turn([partial(session.run, feeds) for session in sessions], rounds=options.rounds)
    times = [f"{1000 * each:.2f}" for each in np.median(seconds, axis=0)]
    return [
        *times,
        ratio_text(seconds[:, 1], seconds[:, 0]),
        *(f"{error:.2g}" for error in errors),
        *["—"] * (3 - len(errors)),
    ]


if __name__ == "__main__":
    main()
