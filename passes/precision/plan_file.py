"""A precision plan as a file: one line for each layer, to be read and edited by people."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from sdc.engines.errors import InputError
from sdc.passes.precision.formats import BLOCK_SIZES, FLOATING, Format
from sdc.passes.precision.layer_roles import Role
from sdc.passes.precision.plan import PlannedLayer, PrecisionPlan

_SCHEMA = 1

_COLUMNS = ("name", "precision", "role", "shape", "multiply_adds", "reason")

_Word = TypeVar("_Word", bound=StrEnum)

_HEAD = f"""\
# Which precision each layer has. Edit `precision` and pass this file back: sdc export --precision FILE
# A layer is one of {", ".join(Format)}. int8 and fp8 quantise activations too, w8 and w4 the weights alone.
# `default` ({", ".join(sorted(FLOATING))}) holds for everything that is no layer; w4 has one scale for `block_size`
# ({", ".join(map(str, BLOCK_SIZES))}) weights of a row. The plan belongs to one graph, and is refused for any other.
"""


def text_from_plan(plan: PrecisionPlan) -> str:
    """TOML; `plan_from_text` is the inverse."""
    rows = [
        (
            f"name = {_quoted(layer.name)}",
            f"precision = {_quoted(layer.format)}",
            f"role = {_quoted(layer.role)}",
            f"shape = {list(layer.shape)}",
            f"multiply_adds = {layer.macs}",
            f"reason = {_quoted(layer.reason)}",
        )
        for layer in plan.layers
    ]
    widths = [max((len(cell) for cell in column), default=0) for column in zip(*rows, strict=True)]
    lines = [
        "  { "
        + ", ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + f", {row[-1]} }},"
        for row in rows
    ]
    head = [
        f"schema = {_SCHEMA}",
        f"graph = {_quoted(plan.graph_digest)}",
        f"default = {_quoted(plan.default)}",
        f"block_size = {plan.block_size}",
    ]
    return "\n".join([_HEAD, *head, "", "layers = [", *lines, "]", ""])


def plan_from_text(text: str, *, origin: str) -> PrecisionPlan:
    """Read a plan.

    Args:
        text: TOML.
        origin: what to call it in errors.

    Raises:
        InputError: it is no TOML, of another schema, an entry is missing, unknown or of the wrong type, a precision is
            unknown, or a layer is named twice.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{origin} is no TOML: {error}") from error
    if values.get("schema") != _SCHEMA:
        raise InputError(
            f"{origin}: expected a precision plan of schema {_SCHEMA}, found {values.get('schema')!r}",
            hint="edit the plan of a bundle that this version of sdc wrote",
        )
    rows = _entry(values, "layers", list, origin)
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{origin}: every entry of layers has to be a table", hint="{ name = ..., precision = ... }")
    layers = tuple(_layer_from_row(row, origin) for row in rows)
    (name, count), *_ = Counter(layer.name for layer in layers).most_common(1) or [("", 0)]
    if count > 1:
        raise InputError(f"{origin} names the layer {name!r} {count} times", hint="leave one line for each layer")
    return PrecisionPlan(
        graph_digest=_entry(values, "graph", str, origin),
        default=_word(Format, _entry(values, "default", str, origin), f"{origin}: default"),
        block_size=_entry(values, "block_size", int, origin),
        layers=layers,
    )


def read_plan(path: Path) -> PrecisionPlan:
    """Likewise, from a file.

    Raises:
        InputError: the file cannot be read, or holds no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the precision plan {path}: {error}") from error
    return plan_from_text(text, origin=str(path))


def _layer_from_row(row: Mapping[str, Any], origin: str) -> PlannedLayer:
    name = _entry(row, "name", str, origin)
    place = f"{origin}: layer {name!r}"
    if unknown := sorted(set(row) - set(_COLUMNS)):
        raise InputError(f"{place} has an unknown entry {unknown[0]!r}", hint=f"there are {', '.join(_COLUMNS)}")
    shape = _entry(row, "shape", list, place)
    if not all(isinstance(size, int) for size in shape):
        raise InputError(f"{place}: shape has to be a list of integers")
    return PlannedLayer(
        name=name,
        role=_word(Role, _entry(row, "role", str, place), f"{place}: role"),
        shape=tuple(shape),
        macs=_entry(row, "multiply_adds", int, place),
        format=_word(Format, _entry(row, "precision", str, place), f"{place}: precision"),
        reason=_entry(row, "reason", str, place),
    )


def _entry(values: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    if not isinstance(values.get(key), kind):
        raise InputError(f"{place}: expected {key} as {kind.__name__}, found {values.get(key)!r}")
    return values[key]


def _word(kind: type[_Word], word: str, place: str) -> _Word:
    try:
        return kind(word)
    except ValueError:
        raise InputError(f"{place} is {word!r}", hint=f"choose one of {', '.join(kind)}") from None


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are among TOML's."""
    return json.dumps(str(text), ensure_ascii=False)
