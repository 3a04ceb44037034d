"""`sdc compress restore`: switches elastic channels of a bundle on where that pays for the prompts it is to draw.

1. The teacher draws pictures of the prompts. Of every step, what it saw and what it predicted are kept.
2. A unit's gate is 0 while it is off. How the error to the teacher's predictions changes when it becomes 1 is predicted
   from its first derivative and the Gauss-Newton part of the second, on half of the prompts, which are drawn: a list
   that takes turns, say of backgrounds, shall not be split along them.
3. Of the units that are predicted to help, the best quarter, half, three quarters and all are switched on, and all
   units that there are; the error on the other prompts says which of these it shall be, or none, if the errors of
   single prompts do not agree that it helps.

Whether the prompts are others than those of the compression is asked of the errors without any of the units: those of
captions that it did not learn from are beside the elastic channels' weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from sdc.compiler.bundle.request_file import StoredRequest, read_request
from sdc.compiler.bundle.writer import check_new_place
from sdc.compiler.compress.elastic import ElasticChannels, lora_of_units, open_units, read_elastic
from sdc.compiler.compress.gates import Units, units_off
from sdc.compiler.compress.importance import random_directions
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.trajectories import probe_of_prompts
from sdc.compiler.distill.training_data import encode_texts, tokenizer_of
from sdc.compiler.load import Checkpoint, Weights, load_checkpoint
from sdc.compiler.load.tensor_files import read_metadata, refuse_pickle
from sdc.compiler.lora import check_source
from sdc.compiler.lora_argument import DISTILLED, parse_lora
from sdc.engines.bundle import open_bundle
from sdc.engines.errors import InputError
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.specs import COMPONENTS

REFERENCE_PROMPTS = 128
"""Captions whose errors a compressed folder has."""

STEPS = 10
"""Of the pictures that the teacher draws."""

LEAST_PROMPTS = 4

ROWS, GRADIENT_ROWS = 8, 2
"""Of a batch; where derivatives are taken, all that the network computes is kept."""

MARGIN = 2.0
"""Standard errors by which single prompts' errors have to become less on average."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the units that are predicted to help."""

SHIFTED = 0.01
"""Probability of errors as large by chance, below which the prompts are called others."""

OBJECTIVE = "elastic"
"""What the LoRA's metadata says that it is for."""

_PERMUTATIONS = 9999

Chosen = Mapping[str, Sequence[int]]
"""For each layer, numbers of units among those that are off."""


@dataclass(frozen=True)
class Restoration:
    """What was found.

    Attributes:
        prompts: how many.
        units: that are off in the bundle.
        chosen: those that pay.
        error: mean square of the difference to the teacher's predictions over that of these, with all units off, on
            prompts that said how many units it shall be; likewise ``error_chosen`` and ``error_open``, with all on.
        ratio: of the prompts' errors to those of the compression's captions, geometric mean; None if it had none.
        probability: of such a ratio by chance; None likewise.
    """

    prompts: int
    units: int
    chosen: Chosen
    error: float
    error_chosen: float
    error_open: float
    ratio: float | None
    probability: float | None

    @property
    def shifted(self) -> bool:
        """Whether the network does worse on these prompts than on those it was compressed with."""
        return self.ratio is not None and self.ratio > 1 and (self.probability or 0) < SHIFTED

    def to_text(self) -> str:
        """For the terminal."""
        if self.ratio is None:
            shift = "whether that is much for this network is not known: it was compressed without captions"
        else:
            verdict = "prompts of another distribution" if self.shifted else "not told apart from them"
            shift = (
                f"{self.ratio:.2f} times those of captions that it was compressed for "
                f"(p = {self.probability:.4f}): {verdict}"
            )
        count = sum(map(len, self.chosen.values()))
        change = (
            f"{count} of {self.units} units pay: error {self.error:.5f} -> {self.error_chosen:.5f}"
            if count
            else f"none of {self.units} units pays, no bundle is written: error {self.error:.5f}"
        )
        return f"errors of {self.prompts} prompts: {shift}\n{change} ({self.error_open:.5f} with all on)\n"


def restore(folder: Path, prompts: Sequence[str], *, out: Path, lora: Path, tell: Callable[[str], None]) -> Restoration:
    """Measure, choose, and write the chosen units as a LoRA; `sdc.compiler.lora` makes the bundle with it.

    Args:
        folder: of the bundle; it stays as it is.
        prompts: `LEAST_PROMPTS` different ones at least; the more, the surer.
        out: where the new bundle shall be.
        lora: is written if any unit pays.
        tell: receives lines of progress.

    Raises:
        InputError: the bundle's model has no elastic channels, some are on already, or something is in a place that is
            written to.
    """
    check_new_place([folder], out)
    _check_place(lora, out)
    prompts = list(dict.fromkeys(prompts))  # none shall both choose and check
    if len(prompts) < LEAST_PROMPTS:
        raise InputError(
            f"{len(prompts)} different prompts are too few: half of them choose, the others check",
            hint=f"give {LEAST_PROMPTS} or more, one a line",
        )
    stored = read_request(open_bundle(folder))
    check_source(folder, stored)
    _refuse_loras(stored)
    source = stored.request.source
    if source.model == "tiny":  # the model of that name, whatever folder is so called here
        raise InputError(
            f"{folder} was made from tiny, which has no channels that are switched off",
            hint="make a smaller network with `sdc compress --elastic`, and a bundle of that",
        )
    elastic = read_elastic(Path(source.model))
    student = load_checkpoint(source.model, weights=cast(Weights, source.weights), seed=source.seed)
    if stored.request.base_digests != {name: student.digest(name) for name in COMPONENTS}:
        raise InputError(f"{source.model} is another model now than {folder} was made from", hint="export it again")
    teacher = _teacher(elastic)
    schedule = schedule_from_config(student.scheduler_config)
    states = encode_texts(tokenizer_of(student), student.text_encoder(), [*prompts, ""])
    probe = probe_of_prompts(
        teacher.unet(),
        schedule,
        states,
        size=elastic.size,
        steps=elastic.steps,
        guidance_scale=elastic.guidance_scale,
        tell=tell,
    )
    unet = student.unet()
    open_units(unet, elastic)
    tell(f"{elastic.units} units in {len(elastic.off)} layers are off")
    found = choose_units(unet, elastic, probe, tell=tell)
    if found.chosen:
        metadata = {DISTILLED: json.dumps({"objective": OBJECTIVE})}
        lora.parent.mkdir(parents=True, exist_ok=True)
        part = lora.with_name(f"{lora.name}.part")
        save_file(lora_of_units(elastic, found.chosen, unet), part, metadata=metadata)
        part.rename(lora)
    return found


def _check_place(lora: Path, out: Path) -> None:
    refuse_pickle(lora)
    if lora.exists():
        raise InputError(f"{lora} is there already", hint="remove it, or name another with --lora")
    if lora.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{lora} is inside of {out}, where the bundle shall be", hint="name another --lora")


def _refuse_loras(stored: StoredRequest) -> None:
    """What is measured is the network without any."""
    for folded in stored.loras:
        path = parse_lora(f"{folded.file}:1").path
        is_elastic = (
            path.is_file() and json.loads(read_metadata(path).get(DISTILLED, "{}")).get("objective") == OBJECTIVE
        )
        raise InputError(
            f"the bundle has elastic channels switched on already, by {path}"
            if is_elastic
            else f"the bundle has the LoRA {path}, and units are measured without any",
            hint=f"take it away first (sdc lora BUNDLE --remove {folded.file} --out DIR), and add it again behind",
        )


def _teacher(elastic: ElasticChannels) -> Checkpoint:
    try:
        teacher = load_checkpoint(elastic.teacher, weights=cast(Weights, elastic.teacher_weights))
    except InputError as error:
        raise InputError(
            f"the model that was compressed, {elastic.teacher}, is needed to measure against: {error}",
            hint="bring it back",
        ) from error
    if teacher.digest("unet") != elastic.teacher_digest:
        raise InputError(
            f"{elastic.teacher} is another model now than the one that was compressed", hint="bring that one back"
        )
    return teacher


@torch.no_grad()
def prompt_errors(
    network: UNet2DConditionModel, probe: Probe, off: Units | None = None, *, steps: int = STEPS
) -> tuple[float, ...]:
    """Of each prompt: mean square of the difference to the truth over the truth's, over its steps.

    Args:
        network: predicts.
        probe: of `probe_of_prompts`.
        off: units that count for nothing.
        steps: of each prompt.
    """
    errors: list[Tensor] = []
    with units_off(network, off or {}):
        for part in probe.split(ROWS):
            predicted = network(part.sample, part.timesteps, part.states).sample.float()
            errors.append((predicted - part.truth).square().mean((1, 2, 3)))
    powers = probe.truth.square().mean((1, 2, 3))
    wrong, whole = (each.reshape(-1, steps).sum(1) for each in (torch.cat(errors), powers))
    return tuple((wrong / whole).tolist())


def choose_units(
    unet: UNet2DConditionModel, elastic: ElasticChannels, probe: Probe, *, tell: Callable[[str], None]
) -> Restoration:
    """Which units pay, and what their errors are.

    Args:
        unet: has the weights of all units.
        elastic: says which are off, and has errors to compare with.
        probe: of `probe_of_prompts`.
        tell: receives lines of progress.
    """
    seeking, checking = (_of_prompts(probe, half, elastic.steps) for half in halves(len(probe) // elastic.steps))
    tell("what each unit would change")
    changes = predicted_changes(unet, elastic.off, seeking)
    ordered = sorted(
        (float(change), layer, number) for layer, each in changes.items() for number, change in enumerate(each)
    )
    helping = [(layer, number) for change, layer, number in ordered if change < 0]
    counts = sorted({round(share * len(helping)) for share in SHARES} - {0})
    everything = _by_layer([(layer, number) for _, layer, number in ordered])
    candidates = [*(_by_layer(helping[:count]) for count in counts), everything]

    def errors_with(chosen: Chosen) -> np.ndarray:
        tell(f"errors with {sum(map(len, chosen.values()))} of {elastic.units} units")
        return np.array(prompt_errors(unet, checking, _rest(elastic.off, chosen), steps=elastic.steps))

    without = errors_with({})
    errors = [errors_with(chosen) for chosen in candidates]
    best = int(np.argmin([each.mean() for each in errors]))
    saved = without - errors[best]
    pays = saved.mean() > MARGIN * saved.std(ddof=1) / math.sqrt(len(saved))
    tell("errors of all prompts without any")
    now = prompt_errors(unet, probe, elastic.off, steps=elastic.steps)
    ratio, probability = shift_of(elastic.errors, now) if elastic.errors else (None, None)
    return Restoration(
        prompts=len(now),
        units=elastic.units,
        chosen=candidates[best] if pays else {},
        error=float(without.mean()),
        error_chosen=float((errors[best] if pays else without).mean()),
        error_open=float(errors[-1].mean()),
        ratio=ratio,
        probability=probability,
    )


def halves(prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the prompts that choose and of those that check: drawn once and for all, each ascending."""
    drawn = np.random.default_rng(0).permutation(prompts)
    return np.sort(drawn[::2]), np.sort(drawn[1::2])


def _of_prompts(probe: Probe, numbers: np.ndarray, steps: int) -> Probe:
    prompts = torch.from_numpy(numbers)
    rows = (prompts[:, None] * steps + torch.arange(steps)).flatten()
    return Probe(*(tensor[rows] for tensor in vars(probe).values()))


def _by_layer(units: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for layer, number in sorted(units):
        chosen.setdefault(layer, []).append(number)
    return chosen


def _rest(off: Units, chosen: Chosen) -> Units:
    """What stays off."""
    return {
        layer: rest
        for layer, units in off.items()
        if (rest := [unit for number, unit in enumerate(units) if number not in chosen.get(layer, ())])
    }


def predicted_changes(unet: UNet2DConditionModel, off: Units, probe: Probe, *, seed: int = 0) -> dict[str, np.ndarray]:
    """By how much the mean squared error changes when a unit alone is switched on, for each layer [units].

    The prediction is taken to be linear in the gate m: e² becomes e² + m · de²/dm + m² · (d prediction/dm)², whose mean
    over the prediction's values is estimated along random directions, as in `importance.py`.

    Args:
        unet: has the weights of all units.
        off: which are off.
        probe: inputs and truth.
        seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = {layer: np.zeros(len(units)) for layer, units in off.items()}
    for part in probe.split(GRADIENT_ROWS):
        with units_off(unet, off, rows=len(part)) as gates:
            prediction = unet(part.sample, part.timesteps, part.states).sample.float()
            error = (prediction - part.truth).square().mean((1, 2, 3)).sum()
            slopes = torch.autograd.grad(error, list(gates.values()), retain_graph=True)
            along = torch.autograd.grad(prediction, list(gates.values()), random_directions(prediction, generator))
        for layer, slope, derivative in zip(gates, slopes, along, strict=True):
            changes[layer] += (slope + derivative.square()).double().sum(0).cpu().numpy()
    return {layer: total / len(probe) for layer, total in changes.items()}


def shift_of(before: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """Ratio of the geometric means, and how probable so large a one is if both are of one distribution.

    Source: permutation test of the difference of means of the logarithms (Fisher, "The Design of Experiments", 1935).
    """
    tiny = np.finfo(np.float64).tiny
    values = np.log(np.maximum([*before, *now], tiny))
    observed = values[len(before) :].mean() - values[: len(before)].mean()
    drawn = np.random.default_rng(0).permuted(np.tile(values, (_PERMUTATIONS, 1)), axis=1)
    differences = drawn[:, len(before) :].mean(1) - drawn[:, : len(before)].mean(1)
    as_large = int((differences >= observed - 1e-12).sum())
    return float(np.exp(observed)), (as_large + 1) / (_PERMUTATIONS + 1)
