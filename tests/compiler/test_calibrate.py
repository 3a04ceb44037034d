"""Calibration of a small denoiser: maxima against the same run done by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from small_denoiser import make_fused_denoiser, run_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sdc.compiler.calibration.calibrate import Surroundings, calibrate
from sdc.compiler.calibration.prompts import GENERAL, prompts_for
from sdc.compiler.calibration.settings import CalibrationSettings, chosen_settings, default_settings
from sdc.compiler.component import Component
from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS, GARMENTS, all_captions
from sdc.engines.denoise import denoise_from_epsilon, guide
from sdc.engines.errors import InputError, NumericalError
from sdc.engines.manifest import PipelineSettings
from sdc.engines.noise import noise_from_seeds
from sdc.engines.samplers.ddim import ddim, plan_ddim, plan_ddim_through
from sdc.engines.schedule import Schedule
from sdc.engines.session import Run
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.graph_digest import digest_from_model
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.quantisation import find_layers
from sdc.passes.precision.range_rules import MAX, RangeRule
from sdc.passes.precision.smooth_quant import SmoothQuant
from sdc.passes.precision.smoothing_rule import SmoothingRule
from sdc.passes.precision.timestep_drift import choose_timesteps, relative_magnitudes

MAX_RULE = RangeRule(MAX)
WORDS = {"<s>": 0, "</s>": 1, "red": 2, "green": 3, "boot": 4, "bag": 5}
EMBEDDING = np.random.default_rng(59).normal(size=(len(WORDS), 7)).astype(np.float32)
SCHEDULE = Schedule(alphas_cumprod=np.linspace(0.99, 0.01, 100), timestep_spacing="leading", steps_offset=1)
PIPELINE = PipelineSettings(0.5, 0.0, 4, 3, 20, 28, 5, None)
SETTINGS = CalibrationSettings(("red boot", "green bag", "bag"), steps=4, latent_size=(5, 7), seed=23)


class Embedding:
    """A text encoder of one table."""

    spec = ComponentSpec(
        "text_encoder",
        (TensorSpec("input_ids", "int64", ("B", 5)),),
        (TensorSpec("last_hidden_state", "float32", ("B", 5, 7)),),
        {"B": DimensionRange(1, 2, 8)},
    )
    memory_bytes = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"last_hidden_state": EMBEDDING[feeds["input_ids"]]}

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        return lambda others: self.run({**feeds, **others})

    def close(self) -> None:
        pass

    def __enter__(self) -> Embedding:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.fixture
def surroundings() -> Surroundings:
    encoder = Tokenizer(WordLevel(WORDS, unk_token="<s>"))
    encoder.pre_tokenizer = Whitespace()
    return Surroundings(ClipTokenizer(encoder, 0, 1, 1, max_tokens=5), Embedding(), SCHEDULE, PIPELINE)


@pytest.fixture
def unet() -> Component:
    spec = ComponentSpec(
        "unet",
        (
            TensorSpec("sample", "float32", ("B", 3, "H", "W")),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("encoder_hidden_states", "float32", ("B", 5, 7)),
        ),
        (TensorSpec("out_sample", "float32", ("B", 3, "H", "W")),),
        {"B": DimensionRange(1, 2, 6), "H": DimensionRange(4, 5, 80), "W": DimensionRange(4, 7, 80)},
    )
    return Component(spec, make_fused_denoiser())


def maxima_by_hand(
    unet: Component,
    surroundings: Surroundings,
    settings: CalibrationSettings,
    timesteps: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """[timesteps] for each tensor, one prompt after the other, every tensor fetched whole."""
    trajectory = plan_ddim_through(SCHEDULE, timesteps) if timesteps else plan_ddim(SCHEDULE, settings.steps)
    names = sorted({layer.activation.name or "" for layer in find_layers(unet.model)[0]} - {"sample"})
    names.remove("encoder_hidden_states")
    found: dict[str, list[list[float]]] = {name: [] for name in [*names, "sample", "encoder_hidden_states"]}
    for index, prompt in enumerate(settings.prompts):
        states = EMBEDDING[surroundings.tokenizer.encode(["", prompt])]
        rows: dict[str, list[float]] = {name: [] for name in found}

        def predict(sample: np.ndarray, timestep: float, states=states, rows=rows) -> np.ndarray:
            feeds = {"sample": sample, "timestep": np.array([timestep], np.float32), "encoder_hidden_states": states}
            output, *values = run_model(unet.model, feeds, ["out_sample", *names])
            for name, value in [*zip(names, values, strict=True), *feeds.items()]:
                if name in rows:
                    rows[name].append(float(np.abs(value).max()))
            return output

        noise = noise_from_seeds([settings.seed + index])
        x = noise((1, 3, *settings.latent_size))
        ddim(denoise_from_epsilon(guide(predict, settings.guidance_scale)), x, trajectory.transitions, noise)
        for name, row in rows.items():
            found[name].append(row)
    return {name: np.max(rows, axis=0) for name, rows in found.items()}


def test_maxima_are_those_of_the_runs(unet: Component, surroundings: Surroundings):
    digest = digest_from_model(unet.model)
    table = calibrate(unet, surroundings, SETTINGS)
    expected = maxima_by_hand(unet, surroundings, SETTINGS)
    assert table.timesteps == (76.0, 51.0, 26.0, 1.0)
    assert set(table.tensors) == set(expected)
    for name, statistics in table.tensors.items():
        # float32 with another order of sums, carried through four steps
        np.testing.assert_allclose(statistics.magnitudes, expected[name], rtol=2e-4, err_msg=name)
        assert table.range_of(name, MAX_RULE) == (-max(statistics.magnitudes), max(statistics.magnitudes))
        assert statistics.channel_magnitudes.max() == max(statistics.magnitudes)
    moving = {each.magnitudes for each in table.tensors.values() if len(set(each.magnitudes)) > 1}
    assert len(moving) > 5  # they do move with the timestep
    assert table.graph_digest == digest == digest_from_model(unet.model)
    assert table.prompts == SETTINGS.prompts


@pytest.mark.parametrize("smoothing", [None, SmoothingRule(0.5)])
def test_only_chosen_timesteps_are_recorded(
    unet: Component, surroundings: Surroundings, smoothing: SmoothingRule | None
):
    told: list[tuple[int, int]] = []
    settings = replace(SETTINGS, timesteps=2)
    table = calibrate(unet, surroundings, settings, smoothing=smoothing, on_run=lambda *each: told.append(each))
    seen = calibrate(unet, surroundings, replace(SETTINGS, prompts=SETTINGS.prompts[:1]))
    chosen = [int(seen.timesteps[index]) for index in choose_timesteps(relative_magnitudes(seen), 2, always=(0,))]
    assert table.timesteps == tuple(map(float, chosen))
    assert chosen[0] == 76  # pictures start in noise
    assert table.steps == 2
    assert told[-1] == (4 + 3 * 2,) * 2
    if smoothing is None:
        expected = maxima_by_hand(unet, surroundings, SETTINGS, chosen)
        for name, statistics in table.tensors.items():
            np.testing.assert_allclose(statistics.magnitudes, expected[name], rtol=2e-4, err_msg=name)


def test_more_timesteps_than_steps_are_refused():
    with pytest.raises(InputError, match="asks for 5 of 4 steps"):
        replace(SETTINGS, timesteps=5)


def test_same_seed_gives_the_same_table(unet: Component, surroundings: Surroundings):
    table = calibrate(unet, surroundings, SETTINGS)
    assert calibrate(unet, surroundings, SETTINGS) == table
    assert calibrate(unet, surroundings, replace(SETTINGS, seed=24)).tensors != table.tensors


def test_batches_do_not_change_the_ranges(unet: Component, surroundings: Surroundings):
    done: list[tuple[int, int]] = []
    table = calibrate(unet, surroundings, SETTINGS)
    together = calibrate(unet, surroundings, replace(SETTINGS, batch=2), on_run=lambda *count: done.append(count))
    assert done == [(run, 8) for run in range(1, 9)]
    for name, alone in table.tensors.items():
        found = together.tensors[name]
        assert found.histogram.total == alone.histogram.total  # the last batch is a smaller one
        for kind in ("minima", "maxima", "channel_minima", "channel_maxima", "channel_means"):
            expected = np.array(getattr(alone, kind))
            atol = 2e-4 * max(alone.magnitudes)
            np.testing.assert_allclose(getattr(found, kind), expected, rtol=0, atol=atol, err_msg=f"{name} {kind}")


def test_without_guidance_the_empty_prompt_stays_out(unet: Component, surroundings: Surroundings):
    settings = CalibrationSettings(("bag bag bag",), steps=2, latent_size=(5, 7), guidance_scale=1.0)
    statistics = calibrate(unet, surroundings, settings).tensors["encoder_hidden_states"]
    rows = EMBEDDING[[0, 5, 5, 5, 1]]
    assert statistics.seen == (float(rows.min()), float(rows.max()))


def test_values_that_are_not_finite_are_named(unet: Component, surroundings: Surroundings):
    bias = unet.model.graph.initializers["b_interior_1"]
    bias.const_value = ir.tensor(np.full(9, np.nan, np.float32))
    with pytest.raises(NumericalError, match=r"tensor '.+' holds NaN or infinity at timestep 76"):
        calibrate(unet, surroundings, SETTINGS)


def test_more_steps_than_the_schedule_has(unet: Component, surroundings: Surroundings):
    with pytest.raises(InputError, match="101 steps"):
        calibrate(unet, surroundings, replace(SETTINGS, steps=101))


def test_no_prompts_are_refused():
    with pytest.raises(InputError, match="no prompts"):
        CalibrationSettings(())


def test_small_networks_run_everything_and_large_ones_a_part(unet: Component):
    settings = default_settings(unet, PIPELINE, GENERAL)
    assert settings == CalibrationSettings(GENERAL, steps=20, latent_size=(5, 7), batch=3)
    large = replace(PIPELINE, default_height_px=4 * 4000, default_width_px=4 * 4400)
    reduced = default_settings(unet, large, GENERAL)
    assert (reduced.steps, reduced.latent_size, len(reduced.prompts), reduced.batch) == (10, (32, 32), 4, 1)
    assert default_settings(unet, large, GENERAL, all_prompts=True) == replace(reduced, prompts=GENERAL)


def test_what_the_user_says_goes_before_the_defaults(unet: Component):
    settings = default_settings(unet, PIPELINE, GENERAL)
    assert chosen_settings(unet, PIPELINE, GENERAL) == settings
    assert chosen_settings(unet, PIPELINE, GENERAL, steps=3) == replace(settings, steps=3)
    assert chosen_settings(unet, PIPELINE, GENERAL, steps=5, timesteps=4) == replace(settings, steps=5, timesteps=4)
    assert chosen_settings(unet, PIPELINE, GENERAL, size_px=24) == replace(settings, latent_size=(6, 6))


@pytest.mark.parametrize("size", [26, 8, 400])
def test_sizes_that_the_network_does_not_take_are_refused(unet: Component, size: int):
    with pytest.raises(InputError, match=f"pictures of {size} pixels are not of a size that the UNet takes"):
        chosen_settings(unet, PIPELINE, GENERAL, size_px=size)


def test_prompts_speak_the_models_language():
    captions = prompts_for("tiny")
    assert len(set(captions)) == 32
    assert set(captions) <= set(all_captions())
    for word in (*GARMENTS, *COLOURS, *BACKGROUNDS):
        assert any(word in caption for caption in captions), word
    assert len(set(prompts_for("sd15"))) == 32


def test_smoothed_graphs_are_what_is_measured(unet: Component, surroundings: Surroundings):
    done: list[tuple[int, int]] = []
    plain = calibrate(unet, surroundings, SETTINGS)
    table = calibrate(
        unet, surroundings, SETTINGS, smoothing=SmoothingRule(outlier_ratio=1), on_run=lambda *count: done.append(count)
    )
    assert done == [(run, 16) for run in range(1, 17)]  # one prompt to look ahead, then three
    assert table.smoothing is not None
    assert table.smoothing.graph_digest == plain.graph_digest == digest_from_model(unet.model)
    scouted = calibrate(unet, surroundings, replace(SETTINGS, prompts=SETTINGS.prompts[:1]))
    for name, row in table.smoothing.magnitudes.items():
        np.testing.assert_array_equal(row, scouted.tensors[name].channel_magnitudes, err_msg=name)
    smoothed = unet.model.clone()
    assert SmoothQuant(table.smoothing).run(smoothed).matched == 3
    assert digest_from_model(smoothed) == table.graph_digest != plain.graph_digest
    assert CalibrationTable.from_json(table.to_json()) == table
    before, after = plain.tensors, table.tensors
    assert sum(before[name].channel_maxima != after[name].channel_maxima for name in before) >= 3


def test_table_does_not_grow_with_the_samples(unet: Component, surroundings: Surroundings):
    few = calibrate(unet, surroundings, replace(SETTINGS, prompts=SETTINGS.prompts[:1]))
    many = calibrate(unet, surroundings, replace(SETTINGS, prompts=SETTINGS.prompts * 4))
    name = next(name for name in few.tensors if name != "encoder_hidden_states")
    counted = few.tensors[name].histogram, many.tensors[name].histogram
    assert counted[1].total == 12 * counted[0].total
    assert counted[1]._counts.nbytes == counted[0]._counts.nbytes
