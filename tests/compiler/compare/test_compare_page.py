"""The HTML page stands alone, its pictures decode, and its figures are those of the JSON."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from whole_bundle import write_whole_bundle

from sdc.compiler.compare.ablation import Ablation, AblationRow
from sdc.compiler.compare.ablation_page import ablation_page
from sdc.compiler.compare.compare import compare
from sdc.compiler.compare.comparison import Comparison
from sdc.compiler.compare.comparison_page import comparison_page
from sdc.compiler.compare.execution import Execution
from sdc.compiler.compare.html_parts import Cell, Column, page, table, write_page
from sdc.compiler.compare.outputs import Timing
from sdc.compiler.compare.picture_pairs import difference_gain
from sdc.compiler.compare.svg_plot import Series, line_plot
from sdc.compiler.evaluate.settings import Settings
from sdc.engines.errors import InputError

PAIRS = 3
VOID = {"meta", "img", "br", "link", "line", "circle", "polyline", "path"}


class Page(HTMLParser):
    """What a browser finds: tags that balance, references, and tables by their name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.text = ""
        self._table = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            if values.get(name):
                self.references.append(str(values[name]))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = str(values["id"])
            assert self._table not in self.tables
            self.tables[self._table], self.heads[self._table] = [], []
        elif tag == "tr" and "tbody" in self.open:
            self.tables[self._table].append([])
        elif tag == "th":
            self.heads[self._table].append("")
        elif tag == "td":
            self.tables[self._table][-1].append(("", values.get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            text, value = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (text + data, value)
        elif "th" in self.open:
            self.heads[self._table][-1] += data

    def figures(self, name: str) -> list[list[float | None]]:
        """Exact values of a table by row, without the first column."""
        return [[None if value is None else float(value) for _, value in row[1:]] for row in self.tables[name]]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("page")
    first = write_whole_bundle(folder / "a <b>", fused=False)
    second = write_whole_bundle(folder / "second", noise=0.05)
    settings = Settings(samples=PAIRS, steps=4, target="ort-cpu", threads=1)
    return compare(first, second, settings, rounds=2, prompts=["a <i>cat</i> & dog"])


@pytest.fixture(scope="module")
def text(comparison: Comparison) -> str:
    return comparison_page(comparison)


@pytest.fixture(scope="module")
def found(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def values(comparison: Comparison) -> dict[str, Any]:
    return comparison.to_json()


def test_nothing_is_fetched(text: str, found: Page) -> None:
    assert len(found.references) == 3 * PAIRS
    assert all(each.startswith("data:image/png;base64,") for each in found.references)
    rest = re.sub(r'"data:image/png;base64,[\w+/=]*"', "", text)  # any letters can be in a picture
    assert not re.search(r"https?://|//\w|@import|url\(|fetch\(|XMLHttpRequest|<link|<iframe|<script[^>]* src", rest)
    assert "default-src 'none'" in text


def test_what_users_wrote_is_escaped(text: str, found: Page) -> None:
    assert "<i>cat" not in text
    assert "a <i>cat</i> & dog" in found.text
    assert "a <b>" in found.text


def test_pictures_are_those_that_were_compared(comparison: Comparison, found: Page) -> None:
    assert comparison.pairs is not None
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2])))) for each in found.references
    ]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    for index in range(PAIRS):
        first, second, difference = pictures[3 * index : 3 * index + 3]
        for picture, made in ((first, comparison.pairs.first), (second, comparison.pairs.second)):
            np.testing.assert_allclose(picture / 255, made[index].transpose(1, 2, 0), atol=0.5 / 255 + 1e-6)
        apart = np.abs(comparison.pairs.first - comparison.pairs.second)[index].max(axis=0)
        brightness = difference.astype(int).sum(axis=2)
        assert brightness[apart == apart.max()].min() > brightness[apart == apart.min()].max()


def test_figures_are_those_of_the_json(values: dict[str, Any], found: Page) -> None:
    components = values["components"]
    for row, figures, each in zip(found.tables["graphs"], found.figures("graphs"), components, strict=True):
        assert row[0][0] == each["name"]
        wanted = [each[side][name] for name in ("nodes", "kernels", "file_bytes") for side in ("first", "second")]
        assert [figures[i] for i in (0, 1, 3, 4, 6, 7)] == wanted
        assert figures[2] == (wanted[1] - wanted[0]) / wanted[0]
    for figures, each in zip(found.figures("costs"), components, strict=True):
        names = ("written_bytes", "largest_bytes", "peak_memory_bytes")
        sides = [each[side][name] for name in names for side in ("first", "second")]
        timing = each["timing"]
        assert figures == [*sides, timing["first_seconds"], timing["second_seconds"], timing["ratio"]]
    outputs = [output for each in components for output in each["outputs"]]
    for figures, output in zip(found.figures("outputs"), outputs, strict=True):
        assert figures[1:] == [output[name] for name in ("largest", "mean", "relative_rms", "scale")]
    names = ("timestep", "epsilon", "drift", "first_seconds", "second_seconds")
    steps = values["denoising"]["steps"]
    assert found.figures("steps") == [[step[name] for name in names] for step in steps]
    assert len(steps) == 4
    for psnr, ssim in zip(values["pictures"]["psnr_db"], values["pictures"]["ssim"], strict=True):
        assert f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" in found.text


def test_operators_and_kernels_of_every_component(values: dict[str, Any], found: Page) -> None:
    for each in values["components"]:
        rows = {row[0][0]: [value for _, value in row[1:3]] for row in found.tables[f"operators-{each['name']}"]}
        assert rows == {name: [str(count) for count in counts] for name, counts in each["operators"].items()}
        kernels = found.figures(f"kernels-{each['name']}")
        assert [sum(row[side] or 0 for row in kernels) for side in (0, 1)] == [
            each[side]["kernels"] for side in ("first", "second")
        ]


def test_every_head_can_be_clicked(text: str, found: Page) -> None:
    heads = sum(len(each) for each in found.heads.values())
    assert heads == text.count('<button type="button">') > 30
    assert all(len(row) == len(found.heads[name]) for name, rows in found.tables.items() for row in rows)
    assert "aria-sort" in text


def drawings(text: str) -> Iterator[ElementTree.Element]:
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(drawing)


def test_plots_have_a_point_for_every_step(values: dict[str, Any], text: str) -> None:
    epsilon, drift, times = drawings(text)
    steps = values["denoising"]["steps"]
    titles = [each.text or "" for each in epsilon.iter("title")]
    assert titles == [f"epsilon, step {i + 1}: {step['epsilon']:.4g}" for i, step in enumerate(steps)]
    last = list(drift.iter("title"))[-1].text or ""
    assert last == f"drift, step 4: {values['denoising']['final_drift']:.4g}"
    assert len(list(times.iter("polyline"))) == 2


def points(drawing: str) -> list[tuple[float, float]]:
    return [
        (float(each.attrib["cx"]), float(each.attrib["cy"]))
        for each in ElementTree.fromstring(drawing).iter("circle")
        if each.find("title") is not None
    ]


def test_places_on_a_logarithmic_axis() -> None:
    """From 1e-6 to 1e-2, every power of ten takes an equal part of the height; zero has no place."""
    drawing = line_plot([Series("e", [1e-6, 1e-4, 0.0, 1e-2], "first")], logarithmic=True, label="e")
    (x0, low), (x1, middle), (x3, high) = points(drawing)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert high < middle < low


def test_places_on_an_even_axis() -> None:
    drawing = line_plot([Series("e", [0.0, 35.0, 70.0], "first")], logarithmic=False, label="e")
    (_, low), (_, middle), (_, high) = points(drawing)
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert ">80<" in drawing


def test_plots_of_little() -> None:
    assert "No difference" in line_plot([Series("e", [0.0, 0.0], "first")], logarithmic=True, label="e")
    assert len(points(line_plot([Series("e", [3e-7], "first")], logarithmic=True, label="e"))) == 1


def test_the_map_is_amplified_by_a_power_of_two() -> None:
    assert difference_gain(np.full((1, 4, 4), 0.11)) == 8
    assert difference_gain(np.zeros((1, 4, 4))) == 1
    assert difference_gain(np.full((1, 4, 4), 1.0)) == 1


def test_cells_are_escaped_and_exact() -> None:
    made = Page(table([Column("a<b", words=True), Column("c")], [["<x>", Cell("0.33", 1 / 3, bar=0.5)]], name="t"))
    assert made.heads["t"] == ["a<b", "c"]
    assert made.tables["t"][0][0] == ("<x>", None)
    assert float(made.tables["t"][0][1][1] or 0) == 1 / 3


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_page(tmp_path, page("x"))


def test_an_ablation_as_a_page() -> None:
    timing = Timing(0.5, 0.25, 0.5, 0.4, 0.6, 3)
    execution = Execution({"Conv": 2, "Add": 1}, 1000, 600)
    rows = (
        AblationRow((), 7, execution, 10**8, 0.0, 100.0, Timing(0.5, 0.5, 1.0, 1.0, 1.0, 3)),
        AblationRow(("canonical: idle", "fusion: fuse-x"), 5, execution, 10**8, 1e-7, 90.0, timing),
    )
    made = Page(ablation_page(Ablation("unet of <m>", {"x": (1, 2)}, rows, ("fusion: last",), None)))
    assert made.references == []
    assert [row[0][0] for row in made.tables["ablation"]] == ["as exported", "fusion: fuse-x"]
    assert made.figures("ablation")[1][:8] == [5, 3, 1000, 0.25, 0.5, 10**8, 1e-7, 90.0]
    assert made.tables["ablation"][1][-1][0] == "canonical: idle"
    assert "fusion: last" in made.text
    unrun = Page(ablation_page(Ablation("m", {}, (AblationRow((), 7),), (), "no GPU")))
    assert len(unrun.heads["ablation"]) == 3
    assert "Nothing was run: no GPU." in unrun.text
