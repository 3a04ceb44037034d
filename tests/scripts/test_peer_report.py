"""Tables and plot, the sampler of the peers' pictures, and what the list of sides promises."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_peers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from peers.pictures import alphas_from_config, denoise
from peers.plot import plot
from peers.report import report, short
from peers.sides import COMPONENTS, ENVIRONMENTS, OWN, ROOFLINES, SIDES, find_side
from peers.store import Measurement, Store

FOLDER = Path(bench_peers.__file__).with_name("peers")


def measured(side: str, component: str, round_: int, seconds: float, **changed: Any) -> Measurement:
    values: dict[str, Any] = {
        "processor_seconds": 1.0,
        "foreign": 0.0,
        "disturbed": False,
        "peak_bytes": 3 << 30,
        "load_seconds": 1.0,
    }
    return Measurement(side, component, 2, round_, [seconds], **{**values, **changed})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "figures.json", {"architecture": "sd15", "steps": 20})
    for round_, slow in enumerate((1.0, 2.0, 1.0)):  # the machine is slower in a round: ratios are not
        for side, seconds in (("torch-bf16", 3.0), ("openvino-bf16", 2.0), ("sdc-bf16", 1.0), ("sdc-int8", 0.5)):
            found.measurements.append(measured(side, "unet", round_, seconds * slow, disturbed=slow > 1))
        found.measurements.append(measured("roofline-torch", "gemm-bf16", round_, 1.0, flops=2e12))
        found.measurements.append(measured("roofline-openvino", "gemm-bf16", round_, 1.0, flops=4e12))
    found.flops = {"unet": 1.6e12, "vae_decoder": 2.4e12, "text_encoder": 0.0}
    found.errors = {"sdc-bf16": {"unet": 0.0107}}
    found.failures = {"sdcpp-f16": {"all": "set-up: cmake | ninja\nfailed"}}
    return found


def cells(text: str, title: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_pictures_of_less_work_have_no_error_and_no_roofline(store: Store) -> None:
    for side, seconds in (("openvino-int8", 20.0), ("sdc-int8", 10.0), ("sdc-int8-lcm", 2.0)):
        store.measurements += [measured(side, "picture", round_, seconds) for round_ in range(3)]
        store.errors[side] = {"picture": 0.5}
    store.measurements.append(measured("roofline-torch", "gemm-int8", 0, 1.0, flops=2e12))
    whole, less = (cells(report(store), find_side(key).title) for key in ("openvino-int8", "sdc-int8-lcm"))
    assert (less[3], less[7]) == ("", "")
    assert less[4].startswith("0.10")
    assert "" not in (whole[3], whole[7])


def test_ways_have_their_own_number_of_steps() -> None:
    """Others take one step to warm up: what a way runs late would be compiled in the first picture that counts."""
    ways = [(side.components, side.options["way"]) for side in SIDES if side.draws_otherwise]
    assert len(ways) == 2
    for components, way in ways:
        assert isinstance(way, dict)
        assert components == ("picture",)
        assert way["steps"] >= max(way.get("guidance_steps", (0, 1)))


def test_ratios_are_to_the_best_peer_of_each_round(store: Store) -> None:
    row = cells(report(store), "sdc bf16")
    assert row[1:3] == ["1.000", "1.000 to 1.500"]
    assert row[3] == "2.50"  # 1.6e12 operations at 4e12 a second are 0.4 s
    assert row[4:6] == ["0.50 (0.50 to 0.50)"] * 2
    assert row[6:] == ["3.00", "0.0107", "3 (1)"]


def test_precision_without_a_peer_has_no_ratio_of_its_own(store: Store) -> None:
    row = cells(report(store), "sdc int8")
    assert row[4:6] == ["", "0.25 (0.25 to 0.25)"]


def test_failed_side_is_a_row_with_its_reason(store: Store) -> None:
    assert cells(report(store), "stable-diffusion.cpp f16")[1] == "failed: set-up: cmake / ninja failed"
    assert short("x" * 500).endswith("x" * 300)


def test_first_start_does_not_count(store: Store) -> None:
    for round_, seconds in enumerate((60.0, 4.0, 5.0)):
        store.measurements.append(measured("sdc-int8", "start", round_, seconds))
    section = report(store).split("first denoising step")[1]
    assert cells(section, "sdc int8")[1:3] == ["4.500", "4.250 to 4.750"]


def test_picture_has_all_its_operations(store: Store) -> None:
    store.measurements.append(measured("sdc-bf16", "picture", 0, 17.2))
    section = report(store).split("Whole picture")[1]
    assert cells(section, "sdc bf16")[3] == "2.00"  # (20 · 1.6 + 2.4) / 4 = 8.6 s


def test_plot_has_a_bar_for_each_side(store: Store) -> None:
    picture = ElementTree.fromstring(plot(store, 2))
    bars = picture.findall("{*}rect")[1:]
    assert len(bars) == 4
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(widths[-1] / 6, rel=0.02)


def test_pictures_are_drawn_as_diffusers_does() -> None:
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False, "set_alpha_to_one": False,
    }  # fmt: skip
    generator = np.random.default_rng(1)
    noise = generator.standard_normal((1, 4, 5, 7), np.float32)
    states = generator.standard_normal((2, 77, 3), np.float32)

    def predict(feeds: dict[str, np.ndarray]) -> np.ndarray:
        shift = feeds["encoder_hidden_states"].mean((1, 2))[:, None, None, None]
        return np.tanh(0.3 * feeds["sample"] + shift) * np.float32(1 + feeds["timestep"][0] / 1000)

    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(20)
    wanted = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        both = {"sample": np.repeat(wanted.numpy(), 2, 0), "timestep": np.array([float(timestep)])}
        low, high = torch.from_numpy(predict({**both, "encoder_hidden_states": states})).split(1)
        wanted = scheduler.step(low + 5.0 * (high - low), timestep, wanted).prev_sample
    _, found = denoise(predict, noise, states, alphas_from_config(config), 20, 5.0)
    assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


def test_other_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="v_prediction"):
        alphas_from_config({"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "steps_offset": 1})


def test_sides_are_complete() -> None:
    everything = (*SIDES, *ROOFLINES)
    assert len({side.key for side in everything}) == len({side.title for side in everything}) == len(everything)
    for side in everything:
        assert side.environment in (OWN, *ENVIRONMENTS)
        assert (FOLDER / f"{side.module}.py").exists()
        assert side.needs is None or find_side(side.needs)
        assert set(side.components) <= {*COMPONENTS, *ROOFLINES[0].components}


def test_needed_sides_are_prepared_first() -> None:
    order = [side.key for side in bench_peers.with_needed([find_side("openvino-int8"), find_side("ort-fp32")])]
    assert order == ["ort-fp32", "openvino-bf16", "openvino-int8"]


def test_what_runs_in_a_peers_environment_imports_nothing_of_sdc() -> None:
    for path in [*FOLDER.glob("*_side.py"), FOLDER / "protocol.py", FOLDER / "pictures.py", FOLDER / "__init__.py"]:
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            + ([str(node.module)] if isinstance(node, ast.ImportFrom) else [])
        }
        of_sdc = {name for name in names if name.split(".")[0] == "sdc"}
        assert bool(of_sdc) == (path.name == "sdc_side.py"), path
        assert {name for name in names if name.startswith("peers.")} <= {"peers.protocol", "peers.pictures"}, path


def test_components_go_by_short_names() -> None:
    assert bench_peers.names("vae,picture") == ["vae_decoder", "picture"]
    with pytest.raises(Exception, match="expected some of"):
        bench_peers.names("vea")
