"""`sdc plan`: figures by hand, what bundles carry, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from whole_bundle import carry_memory_report, write_whole_bundle

from sdc.compiler.cli import main
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.memory.graph_json import graph_from_json, json_from_graph
from sdc.compiler.stages import Source, export_stage, fused_component, open_source
from sdc.compiler.trace.interfaces import component_spec
from sdc.engines.checked_json import JsonValue
from sdc.engines.errors import BundleError
from sdc.engines.specs import COMPONENTS
from sdc.passes.base import run_passes
from sdc.passes.memory.buffers import BufferGraph
from sdc.passes.memory.from_graph import buffers_from_graph
from sdc.passes.memory.plan import plan_memory
from sdc.passes.pipeline import BACKENDS, ORT_CUDA, lowering_passes, precision_passes

ENGINES = {
    # weights, inputs, naive, shared, lower bound; buffers in multiples of 64 bytes
    # The prompt and the negative one.
    "text_encoder": (300 * 6 * 4 + 8, 2 * 77 * 8, 3712 + 64, 3712 + 64, 3712 + 64),
    # Two images of 2,048 bytes, the text's and the timestep's part meet at the first Add.
    "unet": (700, 2048 + 4 + 2 * 77 * 6 * 4, 4 * 2048 + 3 * 64, 2 * 2048 + 2 * 64, 2 * 2048 + 2 * 64),
    "vae_decoder": (4 * 3 * 16 * 4, 1024, 12288, 12288, 12288),
    "vae_encoder": (8 * 3 * 16 * 4, 12288, 2048, 2048, 2048),
}
"""Of one picture of 32x32 pixels with guidance."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_bundle(tmp_path_factory.mktemp("plan") / "small", targets=("ort-cpu", "cpu"))


def planned(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> dict[str, Any]:
    assert main(["plan", str(bundle), "--json", "-", *arguments]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def refused(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: str) -> str:
    assert main(["plan", str(bundle), *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def graphs_of(bundle: Path) -> dict[str, BufferGraph]:
    return {name: buffers_from_graph(ir.load(bundle / name / "model.onnx")) for name in ENGINES}


def test_figures_by_hand(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = planned(capsys, bundle, "--target", "ort-cpu")["targets"]
    names = ("weight_bytes", "input_bytes", "naive_bytes", "shared_bytes", "lower_bound_bytes")
    assert {name: tuple(engine[each] for each in names) for name, engine in plan["engines"].items()} == ENGINES
    text, unet, decoder = plan["stages"]
    # The table that Gather reads stays in its file; ONNX Runtime's arena has multiples of 256 bytes, and its own table.
    table = (1 << 20) // 32
    assert text["total_bytes"] == 8 + text["graph_bytes"] + (3840 + 256 + table) + 1232
    assert (unet["loaded"], unet["weight_bytes"]) == (["text_encoder", "unet"], 8 + 700)
    assert (
        unet["activation_bytes"] == 4096 + (4096 + 2 * 256) + 2 * table
    )  # an engine's memory is kept while it is loaded
    assert decoder["picture_bytes"] == 3 * 32 * 32 * 4
    activations = 4096 + 4608 + 12288 + 3 * table
    assert decoder["total_bytes"] == (8 + 700 + 768) + decoder["graph_bytes"] + activations + 1024 + 12288
    assert (plan["peak_stage"], plan["peak_bytes"]) == ("vae_decoder", decoder["total_bytes"])
    assert plan["one_arena_bytes"] == decoder["total_bytes"] - (4096 + 4608 + 2 * table)
    of_decoder = plan["engines"]["vae_decoder"]["graph_bytes"]
    assert decoder["released_bytes"] == 768 + of_decoder + (12288 + table) + 1024 + 12288
    assert plan["process_bytes"] is None


def test_sizes_grow_with_pictures_and_guidance(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = planned(
        capsys, bundle, "--target", "ort-cpu", "--height", "48", "--width", "64", "--batch", "3", "--guidance", "1"
    )["targets"]
    assert plan["engines"]["text_encoder"]["sizes"] == {"B": 1}
    assert plan["engines"]["unet"]["sizes"] == {"B": 3, "H": 12, "W": 16}
    image = 3 * 4 * 12 * 16 * 4
    assert plan["engines"]["unet"]["shared_bytes"] == 2 * image + 128
    assert plan["engines"]["vae_decoder"]["shared_bytes"] == 3 * 3 * 48 * 64 * 4


def test_the_text_names_every_engine_and_the_peak(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bundle), "--target", "ort-cpu", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("target ort-cpu: 2 pictures of 32x32 px, guidance 5\n")
    row = next(line for line in text.splitlines() if line.startswith("unet "))
    assert " ".join(row.split()) == "unet B=4 H=8 W=8 0.7 kB 0.7 kB 11.5 kB 16.6 kB 8.3 kB 8.3 kB 8.3 kB"
    (plan,) = planned(capsys, bundle, "--target", "ort-cpu", "--batch", "2")["targets"]
    assert f"peak {megabytes(plan['peak_bytes'])}, in vae_decoder, if engines stay loaded; " in text
    assert f"with one arena for all that stay {megabytes(plan['one_arena_bytes'])}" in text
    assert "the process" not in text, "what ONNX Runtime itself takes is not known"


def test_a_report_draws_every_buffer(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, values = tmp_path / "plan.html", tmp_path / "plan.json"
    assert main(["plan", str(bundle), "--target", "ort-cpu", "--report", str(page), "--json", str(values)]) == 0
    text = page.read_text()
    (plan,) = json.loads(values.read_text())["targets"]
    assert text.count("<rect ") == sum(len(engine["arena"]) for engine in plan["engines"].values())
    assert "steps 3 to 5</title>" in text  # the UNet's convolution
    assert text.count("<svg ") == len(ENGINES)


def test_what_a_bundle_carries_says_the_same_as_its_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_whole_bundle(tmp_path / "small", targets=("ort-cpu", "cpu"))
    expected = planned(capsys, bundle, "--target", "ort-cpu")["targets"][0]
    graphs = graphs_of(bundle)
    carried = {name: dict.fromkeys(("ort-cpu", "cpu"), json_from_graph(graph)) for name, graph in graphs.items()}
    carry_memory_report(bundle, carried)
    both = planned(capsys, bundle)["targets"]
    assert [each["target"] for each in both] == ["ort-cpu", "cpu"]
    assert both[0] == expected
    assert [each["weight_bytes"] for each in both[1]["engines"].values()] == [
        each["weight_bytes"] for each in expected["engines"].values()
    ]
    # It is what the bundle carries that is read, not the graph beside it.
    wider = replace(graphs["unet"], weight_bytes=graphs["unet"].weight_bytes + 1000)
    carried["unet"]["ort-cpu"] = json_from_graph(wider)
    carry_memory_report(bundle, carried)
    assert planned(capsys, bundle)["targets"][0]["engines"]["unet"]["weight_bytes"] == ENGINES["unet"][0] + 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "height 100 px is not possible with this bundle; choose 16 to 64 in steps of 8 px"),
        (["--batch", "5"], "5 pictures at guidance 5.0 need 10 rows of the UNet, which takes 1 to 8"),
        (["--batch", "0"], "0 pictures at guidance 5.0"),
        (["--guidance", "nan"], "guidance nan is not a finite number"),
        (["--target", "rtx"], "has no engines for the target 'rtx'; it has ort-cpu, cpu"),
        (["--target", "cpu"], "unet/openvino_model.xml holds no graph that can be read; export it again"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    error = refused(capsys, bundle, *arguments).replace("text_encoder/openvino", "unet/openvino")
    assert message in error


def test_why_an_engine_cannot_be_planned_is_carried_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_whole_bundle(tmp_path / "small", targets=("cpu",))
    carry_memory_report(bundle, {"unet": {"cpu": "the size of 'x' does not follow"}})
    assert "the memory of unet for cpu cannot be planned: the size of 'x' does not follow" in refused(capsys, bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [["Add", [1], [0], []]]}, r"reads \[1\], which is not all written before"),
        ({"steps": [["Add", [], [0], []], ["Add", [], [0], []]]}, "some was written before"),
        ({"outputs": [7]}, "expected the 1 described"),
        ({"buffers": [["x", "2*(", "FLOAT"]]}, "an expression of sizes"),
        ({"buffers": [["x", 2, "FLOUT"]]}, "the name of an ONNX element type"),
        ({"weight_bytes": -1}, "an integer of at least 0"),
    ],
)
def test_a_damaged_graph_is_refused(change: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {
        "weight_bytes": 0,
        "inputs": [],
        "buffers": [["x", "2*B", "FLOAT"]],
        "outputs": [0],
        "steps": [["Add", [], [0], []]],
    }
    graph = graph_from_json(JsonValue(sound, "memory.json"))
    assert json_from_graph(graph) == sound
    assert graph.at({"B": 24}).bytes == (192,)
    with pytest.raises(BundleError, match=message):
        graph_from_json(JsonValue({**sound, **change}, "memory.json"))


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
def test_arenas_of_sd15_are_close_to_the_lower_bound(component: str, tmp_path: Path) -> None:
    source = Source("sd15", weights="random")
    configs = open_source(source).configs
    export_stage(source, component, configs, None, tmp_path)
    for backend in (*BACKENDS, ORT_CUDA):
        fused, _ = fused_component(component_spec(component, configs), tmp_path, fuse=True)
        run_passes(
            (*precision_passes("fp16" if backend == ORT_CUDA else "fp32"), *lowering_passes(backend)), fused.model
        )
        graph = buffers_from_graph(fused.model)
        for batch, side in ((1, 64), (4, 96)):
            plan = plan_memory(graph.at({"B": batch, "H": side, "W": side, "H_px": 8 * side, "W_px": 8 * side}))
            for each in (plan.written, plan.reordered):
                assert each.lower_bound_bytes <= each.arena.bytes <= 1.10 * each.lower_bound_bytes
            assert plan.written.arena.bytes < plan.naive_bytes / 4
