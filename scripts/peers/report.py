"""Tables of the figures, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from peers.sides import COMPONENTS, ROOFLINES, SIDES, Side
from peers.store import Measurement, Store
from sdc.compiler.text_table import markdown_row

TITLES = {
    "unet": "UNet step, batch 2",
    "vae_decoder": "VAE decoder",
    "text_encoder": "Text encoder, batch 2",
    "picture": "Whole picture",
    "start": "From the start of the process to the first denoising step",
}
SAME_ROUNDS = 1
"""Rounds that two sides must share to be compared."""


def report(store: Store) -> str:
    """All tables."""
    parts = [roofline_table(store)]
    for threads in thread_counts(store):
        for component in COMPONENTS:
            if any(True for side in SIDES for _ in store.of(side.key, component, threads)):
                parts.append(component_table(store, component, threads))
    parts.append(failure_table(store))
    return "\n\n".join(part for part in parts if part) + "\n"


def thread_counts(store: Store) -> list[int]:
    """In the order in which they were measured."""
    return list(dict.fromkeys(each.threads for each in store.measurements))


def component_table(store: Store, component: str, threads: int) -> str:
    """A row for each side, and for each that has failed."""
    sides = [side for side in SIDES if component in side.components]
    found = {side.key: counted(store, side, component, threads) for side in sides}
    headings = (
        *("side", "s", "quartiles", "× roofline", "to the best peer of its precision", "to the best peer"),
        *("peak memory, GiB", "relative error", "rounds (disturbed)"),
    )
    lines = [f"{TITLES[component]}, {threads} threads", "", markdown_row(*headings), markdown_row(*["---"] * 9)]
    for side in sides:
        if found[side.key]:
            lines.append(row(store, side, component, found, sides))
        elif (reason := store.failure(side.key, component)) is not None:
            lines.append(markdown_row(side.title, f"failed: {short(reason, most=60)}", *[""] * 7))
    return "\n".join(lines)


def counted(store: Store, side: Side, component: str, threads: int) -> list[Measurement]:
    """Rounds that count; the first start is from cold files, and does not."""
    return [each for each in store.of(side.key, component, threads) if component != "start" or each.round > 0]


def row(store: Store, side: Side, component: str, found: dict[str, list[Measurement]], sides: Sequence[Side]) -> str:
    """One side's figures."""
    mine = found[side.key]
    low, middle, high = np.quantile([each.median for each in mine], (0.25, 0.5, 0.75))
    alike = best_peer([each for each in sides if each.precision == side.precision], found)
    any_peer = best_peer(sides, found)
    disturbed = sum(each.disturbed for each in mine)
    error = None if side.draws_otherwise else store.errors.get(side.key, {}).get(component)
    ideal = None if side.draws_otherwise else ideal_seconds(store, side, component, mine[0].threads)
    return markdown_row(
        side.title,
        written(middle),
        f"{written(low)} to {written(high)}",
        "" if ideal is None else f"{middle / ideal:.2f}",
        ratio_cell(mine, found, alike),
        ratio_cell(mine, found, any_peer),
        f"{np.median([each.peak_bytes for each in mine]) / 2**30:.2f}",
        "" if error is None else f"{error:.2e}" if error < 0.001 else f"{error:.4f}",
        f"{len(mine)}{f' ({disturbed})' if disturbed else ''}",
    )


def best_peer(sides: Iterable[Side], found: dict[str, list[Measurement]]) -> str | None:
    """The peer with the smallest median."""
    medians = {
        side.key: float(np.median([each.median for each in found[side.key]]))
        for side in sides
        if not side.ours and found[side.key]
    }
    return min(medians, key=lambda key: medians[key]) if medians else None


def ratio_cell(mine: Sequence[Measurement], found: dict[str, list[Measurement]], other: str | None) -> str:
    """Median and quartiles over the rounds that both have."""
    ratios = ratios_by_round(mine, found[other]) if other is not None else []
    if len(ratios) < SAME_ROUNDS:
        return ""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratios_by_round(mine: Iterable[Measurement], theirs: Iterable[Measurement]) -> list[float]:
    """This side's time to the other's in each round that both have."""
    others = {each.round: each.median for each in theirs}
    return [each.median / others[each.round] for each in mine if each.round in others]


def roofline(store: Store, precision: str, threads: int) -> tuple[float, Side] | None:
    """Operations a second of the fastest product of matrices, and whose it is."""
    rates = {}
    for side in ROOFLINES:
        measured = list(store.of(side.key, f"gemm-{precision}", threads))
        if measured:
            rates[side.key] = float(np.median([(each.flops or 0) / each.median for each in measured]))
    if not rates:
        return None
    best = max(ROOFLINES, key=lambda side: rates.get(side.key, 0.0))
    return rates[best.key], best


def ideal_seconds(store: Store, side: Side, component: str, threads: int) -> float | None:
    """Time of all operations at the roofline of the side's precision; None where it is not known."""
    found = roofline(store, side.precision, threads)
    flops = component_flops(store, component)
    return None if found is None or flops is None else flops / found[0]


def component_flops(store: Store, component: str) -> float | None:
    """Operations of one call; a picture has its steps, one decoder and one text encoder."""
    if component != "picture":
        return store.flops.get(component)
    parts = [store.flops.get(name) for name in ("unet", "vae_decoder", "text_encoder")]
    if any(part is None for part in parts):
        return None
    unet, decoder, text = (part or 0.0 for part in parts)
    return unet * store.settings["steps"] + decoder + text


def roofline_table(store: Store) -> str:
    """What the machine does at best."""
    lines = []
    for threads in thread_counts(store):
        for precision in ("fp32", "bf16", "int8"):
            for side in ROOFLINES:
                rates = [
                    (each.flops or 0) / each.median / 1e12 for each in store.of(side.key, f"gemm-{precision}", threads)
                ]
                if rates:
                    low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75))
                    cells = (side.title, precision, str(threads), f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
                    lines.append(markdown_row(*cells, str(len(rates))))
    if not lines:
        return ""
    headings = ("product of two 4096 × 4096 matrices", "precision", "threads", "TFLOP/s", "quartiles", "rounds")
    return "\n".join([markdown_row(*headings), markdown_row(*["---"] * 6), *lines])


def failure_table(store: Store) -> str:
    """Every failure."""
    rows = [
        markdown_row(side.title, component, short(reason))
        for side in (*SIDES, *ROOFLINES)
        for component, reason in store.failures.get(side.key, {}).items()
    ]
    return "\n".join([markdown_row("failed", "at", "reason"), markdown_row(*["---"] * 3), *rows]) if rows else ""


def short(reason: str, most: int = 300) -> str:
    """One line for a table."""
    line = " ".join(reason.replace("|", "/").split())
    return line if len(line) <= most else f"…{line[-most:]}"


def written(seconds: float) -> str:
    """Three digits that count."""
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"
