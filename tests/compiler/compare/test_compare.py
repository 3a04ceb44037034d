"""Comparisons of bundles and ONNX files whose differences are known."""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from whole_bundle import CHANNELS, TOKENS, WIDTH, write_whole_bundle

from sdc.compiler.cli import compare as command
from sdc.compiler.compare.compare import _told
from sdc.compiler.compare.compare import compare as compare_wholly
from sdc.compiler.compare.comparison_page import comparison_page
from sdc.compiler.compare.outputs import compare_outputs, draw_feeds, seconds_in_turn, timing_from_seconds
from sdc.compiler.compare.report import format_comparison
from sdc.compiler.compare.subject import LONE_COMPONENT, open_subject
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB
from sdc.compiler.evaluate.settings import Settings
from sdc.engines.errors import InputError, TargetError
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec

SETTINGS = Settings(samples=1, steps=3, target="ort-cpu", threads=1)

compare = partial(compare_wholly, footprints=False)
"""Without a process for each engine, which takes a second."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return {
        "plain": write_whole_bundle(folder / "plain", targets=("ort-cpu", "cpu")),
        "unfused": write_whole_bundle(folder / "unfused", fused=False),
        "noisy": write_whole_bundle(folder / "noisy", noise=0.05),
        "empty": write_whole_bundle(folder / "empty", targets=()),
    }


def test_components_of_other_shapes_are_not_compared() -> None:
    def told(first: tuple[TensorSpec, ...], second: tuple[TensorSpec, ...]) -> str:
        return _told("inputs", first, second)

    keys, heads = (TensorSpec("prompt.0", "float32", shape) for shape in (("B", 77, 64), ("B", 4, 77, 16)))
    sample = TensorSpec("sample", "float32", ("B", 4, "H", "W"))
    assert told((sample, keys), (sample, heads)) == (
        "the inputs differ: only the first has prompt.0 float32 [B, 77, 64], "
        "only the second prompt.0 float32 [B, 4, 77, 16]"
    )
    assert told((sample,), (sample, keys, heads)).endswith(
        "nothing, only the second prompt.0 float32 [B, 77, 64] and 1 more"
    )


def test_a_bundle_equals_itself(bundles: dict[str, Path]) -> None:
    found = compare(bundles["plain"], bundles["plain"], replace(SETTINGS, samples=2), rounds=2)
    assert [each.name for each in found.components] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for component in found.components:
        assert all(output.largest == 0 and output.scale > 0 for output in component.outputs)
        assert all(first == second for first, second in component.operators.values())
        assert component.timing is not None
        assert component.timing.rounds == 2
    assert found.pictures is not None
    assert found.pictures.psnr_db == (PSNR_CEILING_DB, PSNR_CEILING_DB)
    assert found.pictures.ssim == (1.0, 1.0)
    assert found.pictures.settings.samples == 2
    assert found.denoising is not None
    assert len(found.denoising.steps) == 3
    assert all(step.epsilon == step.drift == 0 for step in found.denoising.steps)
    assert found.denoising.timing.rounds == 3


def test_an_extra_node_shows_in_the_graph_only(bundles: dict[str, Path]) -> None:
    found = compare(bundles["plain"], bundles["unfused"], replace(SETTINGS, samples=1), rounds=1)
    unet = found.components[1]
    assert (unet.first.nodes, unet.second.nodes) == (8, 9)
    assert unet.operators["Mul"] == (1, 2)
    assert unet.outputs[0].largest < 1e-6
    text = format_comparison(found)
    assert "operators of unet" in text
    assert "operators of vae_decoder" not in text
    assert "not fused" in text


def test_disturbed_weights_show_in_outputs_and_pictures(bundles: dict[str, Path]) -> None:
    found = compare(bundles["plain"], bundles["noisy"], replace(SETTINGS, samples=3), rounds=1)
    by_name = {each.name: each.outputs for each in found.components}
    assert 0.005 < by_name["unet"][0].relative_rms < 0.2
    assert by_name["unet"][0].mean < by_name["unet"][0].largest
    assert by_name["vae_decoder"][0].largest == 0
    assert len(by_name["text_encoder"]) == 2
    assert found.pictures is not None
    assert all(10 < value < 60 for value in found.pictures.psnr_db)
    assert found.pictures.ssim is not None
    assert all(0.1 < value < 0.9999 for value in found.pictures.ssim)
    assert found.denoising is not None
    assert all(0.001 < step.epsilon < 0.5 for step in found.denoising.steps)
    assert [step.drift > 0 for step in found.denoising.steps] == [False, True, True]
    assert found.denoising.final_drift > 0


def test_two_backends_of_one_bundle_agree(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The fastest target is OpenVINO's for one side; the other side has only ONNX Runtime's."""
    found = compare(bundles["plain"], bundles["unfused"], replace(SETTINGS, target=None), rounds=1)
    assert "target cpu" in found.first
    assert "target ort-cpu" in found.second
    for component in found.components:
        assert max(output.relative_rms for output in component.outputs) < 1e-5
    assert found.pictures is not None
    assert found.pictures.psnr_db[0] > 60


def test_lone_onnx_files(bundles: dict[str, Path]) -> None:
    first, second = bundles["plain"] / "unet/model.onnx", bundles["noisy"] / "unet/model.onnx"
    found = compare(first, second, SETTINGS, rounds=1)
    (component,) = found.components
    assert component.name == LONE_COMPONENT
    assert component.outputs[0].shape == (2, CHANNELS, 16, 16)
    assert component.outputs[0].relative_rms > 0.005
    assert found.pictures is None
    assert found.notes == ("pictures need two bundles",)
    assert "pictures need two bundles" in comparison_page(found)


def test_a_bundle_cannot_be_compared_with_a_lone_file(bundles: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        compare(bundles["plain"], bundles["plain"] / "unet/model.onnx", SETTINGS)


def test_components_with_other_inputs_are_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="the inputs differ"):
        compare(bundles["plain"] / "unet/model.onnx", bundles["plain"] / "vae_decoder/model.onnx", SETTINGS)


def test_bundles_that_do_not_run_here_are_described_only(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = write_whole_bundle(tmp_path / "plan", targets=("rtx",))
    if open_subject(bundle, "rtx").unrunnable is None:
        pytest.skip("this machine runs plans")
    found = compare(bundle, bundle, replace(SETTINGS, target=None))
    assert all(each.not_run and not each.outputs and each.timing is None for each in found.components)
    assert found.pictures is None
    assert "was not run" in format_comparison(found)


def test_what_cannot_be_opened(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        open_subject(tmp_path / "nothing.onnx", None)
    with pytest.raises(InputError, match="is no bundle"):
        open_subject(tmp_path / "nothing", None)
    with pytest.raises(TargetError, match="no engines for the target 'rtx'"):
        open_subject(bundles["plain"], "rtx")
    with pytest.raises(TargetError, match="none"):
        open_subject(bundles["empty"], None)
    (tmp_path / "x.plan").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be compared"):
        open_subject(tmp_path / "x.plan", None)


def test_feeds_are_seeded_and_fit_the_interface(bundles: dict[str, Path]) -> None:
    spec = open_subject(bundles["plain"], "ort-cpu").specs["unet"]
    first, again, other = (draw_feeds(spec, seed=seed) for seed in (3, 3, 4))
    assert first["sample"].shape == (2, CHANNELS, 8, 8)
    assert first["encoder_hidden_states"].shape == (2, TOKENS, WIDTH)
    assert first["timestep"].tolist() == [501.0]
    np.testing.assert_array_equal(first["sample"], again["sample"])
    assert (first["sample"] != other["sample"]).all()
    odd = ComponentSpec("unet", (TensorSpec("x", "bool", ("B",)),), (), {"B": DimensionRange(1, 2, 3)})
    with pytest.raises(InputError, match="bool"):
        draw_feeds(odd, seed=0)


def test_differences_have_closed_forms() -> None:
    first = np.array([[3.0, -4.0]], np.float32)
    (found,) = compare_outputs({"y": first}, {"y": first + np.array([[0.0, 1.0]], np.float32), "z": first})
    assert (found.largest, found.mean, found.scale) == (1.0, 0.5, 4.0)
    assert found.relative_rms == pytest.approx(1 / 5)
    with pytest.raises(InputError, match="shapes"):
        compare_outputs({"y": first}, {"y": first[:, :1]})
    with pytest.raises(InputError, match="no output in common"):
        compare_outputs({"y": first}, {"z": first})


def test_a_slower_engine_is_seen_as_slower(tmp_path: Path) -> None:
    """The second file does the first one's matrix product eight times."""
    for name, count in (("once", 1), ("often", 8)):
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([96, 96]))
        value, nodes = x, []
        for _ in range(count * 40):
            nodes.append(ir.Node("", "MatMul", [value, x]))
            nodes.append(ir.Node("", "Tanh", [nodes[-1].outputs[0]]))
            value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = "y", x.type, x.shape
        ir.save(
            ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 23}, name="g"), ir_version=10),
            tmp_path / f"{name}.onnx",
        )
    once, often = (open_subject(tmp_path / f"{name}.onnx", None) for name in ("once", "often"))
    feeds = draw_feeds(once.specs[LONE_COMPONENT], seed=1)
    with once.open_session(LONE_COMPONENT) as first, often.open_session(LONE_COMPONENT) as second:
        seconds = seconds_in_turn([lambda: first.run(feeds), lambda: second.run(feeds)], rounds=9)
    timing = timing_from_seconds(seconds[:, 0], seconds[:, 1])
    assert timing.ratio > 2
    assert timing.lowest_ratio <= timing.ratio <= timing.highest_ratio


def test_calls_take_turns() -> None:
    called: list[str] = []
    seconds = seconds_in_turn([partial(called.append, name) for name in "abc"], rounds=3, warm_ups=1)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"
    assert seconds.shape == (3, 3)
    assert (seconds > 0).all()
    timing = timing_from_seconds(np.array([1.0, 2.0, 4.0]), np.array([3.0, 4.0, 16.0]))
    assert (timing.first_seconds, timing.second_seconds, timing.ratio) == (2.0, 4.0, 3.0)
    assert (timing.lowest_ratio, timing.highest_ratio, timing.rounds) == (2.5, 3.5, 3)


def test_every_engine_has_a_footprint(bundles: dict[str, Path]) -> None:
    found = compare_wholly(bundles["plain"], bundles["unfused"], SETTINGS, rounds=1, pictures=False)
    for component in found.components:
        for side in (component.first, component.second):
            assert side.execution is not None
            assert side.execution.count >= 1
            assert side.peak_memory_bytes is not None
            assert 30e6 < side.peak_memory_bytes < 1e9
    assert "memory, first" in format_comparison(found)


def test_engines_of_other_inputs_are_run_each_with_its_own(bundles: dict[str, Path], tmp_path: Path) -> None:
    """As a UNet whose invariant parts are engines of their own beside one that has them inside."""
    other = write_whole_bundle(tmp_path / "other")
    path = other / "sdc.json"
    manifest = json.loads(path.read_text())
    components, engines = manifest["components"], manifest["targets"]["ort-cpu"]["engines"]
    engines["vae_encoder"] = engines["vae_decoder"]
    components["vae_encoder"] = {**components["vae_decoder"], "name": "vae_encoder"}
    path.write_text(json.dumps(manifest))
    found = compare(bundles["plain"], other, SETTINGS, rounds=1, pictures=False)
    encoder = found.components[-1]
    assert encoder.name == "vae_encoder"
    assert encoder.outputs == ()
    assert encoder.timing is not None
    assert "latent_sample" in (encoder.not_compared or "")
    assert "outputs of vae_encoder are not compared" in format_comparison(found)


def test_a_component_of_one_side_only_is_named(bundles: dict[str, Path], tmp_path: Path) -> None:
    other = write_whole_bundle(tmp_path / "other")
    path = other / "sdc.json"
    manifest = json.loads(path.read_text())
    del manifest["targets"]["ort-cpu"]["engines"]["vae_encoder"]
    path.write_text(json.dumps(manifest))
    found = compare(other, bundles["plain"], SETTINGS, rounds=1, pictures=False)
    assert [each.name for each in found.components] == ["text_encoder", "unet", "vae_decoder"]
    assert found.notes == (f"only {bundles['plain']} has vae_encoder: it has 1 nodes",)


def test_command(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out.json"
    sides = [str(bundles["plain"]), str(bundles["noisy"]), "--target", "ort-cpu", "--json", str(out)]
    cheap = ["--pictures", "1", "--rounds", "1", "--steps", "2", "--threads", "1"]
    assert command.run(parser.parse_args([*sides, *cheap])) == 0
    text = capsys.readouterr().out
    assert "relative RMS" in text
    assert "PSNR" in text
    value = json.loads(out.read_text())
    assert value["components"][1]["outputs"][0]["name"] == "out_sample"
    assert value["components"][1]["first"]["kernels"] == sum(
        value["components"][1]["first"]["kernels_by_kind"].values()
    )
    assert len(value["denoising"]["steps"]) == 2
    assert value["pictures"]["settings"]["sampler"] == "ddim"
    assert command.run(parser.parse_args([*sides, *cheap, "--pictures", "0"])) == 0
    assert "PSNR" not in capsys.readouterr().out
    for bad in ("--rounds", "--pictures", "--threads"):
        with pytest.raises(InputError, match=bad):
            command.run(parser.parse_args([*sides, bad, "-1"]))


def test_prompts_of_a_file(bundles: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out.json"
    sides = [str(bundles["plain"])] * 2 + ["--target", "ort-cpu", "--json", str(out), "--prompts", str(prompts)]
    cheap = ["--rounds", "1", "--steps", "2", "--threads", "1", "--sampler", "euler", "--guidance", "1"]
    assert command.run(parser.parse_args([*sides, *cheap])) == 0
    pictures = json.loads(out.read_text())["pictures"]
    assert pictures["prompts"] == ["a cat", "a dog"]
    assert pictures["settings"]["sampler"] == "euler"
    assert command.run(parser.parse_args([*sides, *cheap, "--pictures", "3"])) == 0
    assert json.loads(out.read_text())["pictures"]["prompts"] == ["a cat", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two sides are needed"),
        (["a"], "two sides are needed"),
        (["a", "b", "--model", "tiny"], "--model alone"),
        (["--ablate"], "take a model"),
        (["a", "b", "--bisect", "--model", "tiny"], "take a model"),
        (["a", "b", "--tolerance", "1"], "--tolerance is"),
        (["--bisect", "--model", "tiny", "--report", "x.html"], "no HTML report"),
        (["--ablate", "--model", "tiny", "--target", "cpu,ort-cpu"], "one target at a time"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(InputError, match=message):
        command.run(parser.parse_args(arguments))
