"""Typed reading of JSON that may be wrong: every complaint names the place, what was expected and what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sdc.engines.errors import BundleError


@dataclass(frozen=True)
class JsonValue:
    """A value and the place where it stands, e.g. ``sdc.json: targets.cpu.backend``."""

    value: Any
    place: str

    def refuse(self, expected: str) -> NoReturn:
        """Raise the error for a value that is not what was expected."""
        found = json.dumps(self.value)
        shown = found if len(found) <= 60 else found[:57] + "..."
        raise BundleError(f"{self.place}: expected {expected}, found {shown}", hint="export the bundle again")

    def member(self, key: str) -> JsonValue:
        """The value of a required key."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        if key not in self.value:
            raise BundleError(f"{self.place}: the key {key!r} is missing", hint="export the bundle again")
        return JsonValue(self.value[key], f"{self.place}.{key}")

    def members(self) -> Iterator[tuple[str, JsonValue]]:
        """Keys and values of an object, in file order."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return ((key, JsonValue(value, f"{self.place}.{key}")) for key, value in self.value.items())

    def elements(self) -> Iterator[JsonValue]:
        """The values of a list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        return (JsonValue(value, f"{self.place}[{index}]") for index, value in enumerate(self.value))

    def text(self, expected: str = "a non-empty string") -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.refuse(expected)
        return self.value

    def integer(self, minimum: int) -> int:
        """A whole number; booleans are none."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < minimum:
            self.refuse(f"an integer of at least {minimum}")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            self.refuse("a number")
        return float(self.value)

    def flag(self) -> bool:
        """A boolean."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value


def read_json(path: Path) -> JsonValue:
    """Parse a JSON file; NaN, infinities and keys that occur twice are refused.

    Raises:
        BundleError: the file cannot be read or is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return value

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}", hint="export the bundle again") from error
    return JsonValue(value, path.name)
