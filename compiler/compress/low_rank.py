"""Weights of low rank: each output channel a combination of fewer, W = U (Uᵀ W) with U [outputs, rank] orthonormal.

A layer so costs rank · (outputs + inputs) multiply-adds at each place and not outputs · inputs, once an export has made
two of it; inputs of a convolution count for each place of its kernel. U spans the eigenvectors of the largest
eigenvalues of the layer's *moments*, an [outputs, outputs] matrix, as many as hold a share of their sum, the energy:

==========  ==========================================================================================================
plain       W Wᵀ: the truncated singular value decomposition, which changes the weights least
activation  sum of y yᵀ, y = W x what the layer gives without bias, over noisy latents of all timesteps: of all weights
            of a rank W' = U Uᵀ W changes y least. With S Sᵀ = sum of x xᵀ these are the left singular vectors of W S:
            Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
            arXiv:2403.07378, section 3.1, without forming S, which for a 3x3 convolution is nine times as wide
==========  ==========================================================================================================

The share is the same for all layers. It is given, or found by bisection under a budget: what the prediction on held-out
pictures may lose before recovery.

U stays as it is in recovery: after each step weights are projected on it, so that the rank never grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdc.compiler.compress.layer_sums import sum_over_probe
from sdc.compiler.compress.probes import Probe
from sdc.compiler.compress.prune import UnetState
from sdc.compiler.compress.settings import Ranks
from sdc.engines.errors import InputError, NumericalError
from sdc.passes.simplify.factorise_weights import LOW_RANK

Spans = dict[str, Tensor]
"""For weights by name, U: [outputs, rank], float32."""

ROUNDING = 1e-6
"""What may be outside of a span after rounding to float32, of a weight's norm; a tenth of what an export allows."""

LEAST_LOST = 1e-5
"""Share of energy; ranks that lose less save next to nothing."""

TRIALS = 6
"""Energies that are measured under a budget: what is lost is found to a factor of `LEAST_LOST` ** (-1 / 64), 1.2."""


@dataclass(frozen=True)
class LowRankLayers:
    """What becomes of the layers of a network.

    Attributes:
        spans: of those whose rank pays.
        dense: names of the others, and why.
    """

    spans: Spans
    dense: dict[str, str]


@torch.no_grad()
def output_moments(unet: UNet2DConditionModel, names: tuple[str, ...], probe: Probe, *, rows: int) -> dict[str, Tensor]:
    """Sums of y yᵀ over all rows and places of a probe, y what a layer gives without its bias.

    Args:
        unet: on the probe's device.
        names: of its convolutions and linear layers.
        probe: inputs over all timesteps.
        rows: at a time.

    Returns:
        [outputs, outputs], float64, on the CPU, for each layer by name.
    """

    def moments(layer: Any, _: Tensor, outputs: Tensor) -> Tensor:
        unbiased = outputs if layer.bias is None else outputs - layer.bias
        return unbiased.T @ unbiased

    return sum_over_probe(unet, names, probe, moments, rows=rows)


def weight_moments(weight: Tensor) -> Tensor:
    """W Wᵀ: [outputs, outputs], float64."""
    flat = weight.detach().cpu().double().flatten(1)
    return flat @ flat.T


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a layer's moments, and as many eigenvectors as can be of use.

    Attributes:
        lost: [outputs], float64: sums of the smallest 1, 2, ... eigenvalues.
        vectors: [outputs, most], float32, of the largest eigenvalues, rising; more of them would save nothing.
        full_rank: of the weight, if none is lost.
    """

    lost: Tensor
    vectors: Tensor
    full_rank: int

    def rank(self, energy: float) -> int:
        """The least that holds this share of the eigenvalues' sum."""
        return max(1, int((self.lost > (1 - energy) * self.lost[-1]).sum()))


def spectra_of(
    weights: Mapping[str, Tensor], names: tuple[str, ...], moments: Mapping[str, Tensor] | None
) -> dict[str, Spectrum]:
    """The spectrum of each layer, by its name.

    Args:
        weights: of the network, by name.
        names: of the layers.
        moments: of what they give; None for those of the weights.
    """
    spectra = {}
    for name in names:
        weight = weights[f"{name}.weight"]
        values, vectors = torch.linalg.eigh(weight_moments(weight) if moments is None else moments[name])  # rising
        outputs, inputs = weight.shape[0], weight[0].numel()
        most = (outputs * inputs - 1) // (outputs + inputs)
        kept = vectors[:, outputs - most :].float().contiguous()
        spectra[name] = Spectrum(values.clamp(min=0).cumsum(0), kept, min(outputs, inputs))
    return spectra


def choose_spans(spectra: Mapping[str, Spectrum], *, energy: float) -> LowRankLayers:
    """The least rank of each layer that holds a share of its energy, where that saves multiply-adds.

    Args:
        spectra: of the layers, by name.
        energy: share of the eigenvalues' sum, between 0 and 1.
    """
    spans, dense = {}, {}
    for name, spectrum in spectra.items():
        rank, most = spectrum.rank(energy), spectrum.vectors.shape[1]
        if rank <= most:
            spans[f"{name}.weight"] = spectrum.vectors[:, most - rank :].contiguous()
        else:
            dense[name] = f"rank {rank} of {spectrum.full_rank} saves nothing"
    return LowRankLayers(spans, dense)


@dataclass(frozen=True)
class Trial:
    """An energy, and by how much less the SNR of the prediction is with it, dB."""

    energy: float
    lost_db: float


def search_energy(lost_db: Callable[[float], float], budget_db: float) -> tuple[Trial, tuple[Trial, ...]]:
    """The smallest share of energy that keeps to a budget, by bisection over the logarithm of what is lost.

    What is lost in dB should grow with what is lost of the energy; where it does not, what is found keeps to the budget
    all the same, and a smaller share might too.

    Args:
        lost_db: measures an energy.
        budget_db: the most that it may give.

    Returns:
        What was found, and everything that was measured, in order.

    Raises:
        InputError: every energy that was measured, up to nearly 1, loses more.
    """
    trials, low, high = [], math.log(LEAST_LOST), 0.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        energy = -math.expm1(middle)
        trials.append(Trial(energy, lost_db(energy)))
        low, high = (middle, high) if trials[-1].lost_db <= budget_db else (low, middle)
    kept = [trial for trial in trials if trial.lost_db <= budget_db]
    if not kept:
        raise InputError(
            f"the SNR of the prediction may be {budget_db:g} dB less, and is {trials[-1].lost_db:.3g} dB less with "
            f"{trials[-1].energy:.6f} of the layers' energy",
            hint="allow more dB, with another --work, or leave out --low-rank",
        )
    return min(kept, key=lambda trial: trial.energy), tuple(trials)


def choose_ranks(
    state: UnetState,
    names: tuple[str, ...],
    moments: Mapping[str, Tensor] | None,
    ranks: Ranks,
    *,
    snr_db: Callable[[UnetState], float],
    tell: Callable[[str], None],
) -> tuple[LowRankLayers, dict[str, Any]]:
    """Layers with the energy that is given, or with the smallest that keeps to the budget.

    Args:
        state: the network.
        names: of the layers.
        moments: as for `spectra_of`.
        ranks: the energy or the budget.
        snr_db: measures a network, the SNR of its prediction in dB; only under a budget.
        tell: gets a line for each measurement.

    Returns:
        The layers, and what the report says: the energy, what `describe_low_rank` does, and all measurements.

    Raises:
        InputError: no energy keeps to the budget.
    """
    spectra = spectra_of(state.weights, names, moments)
    if ranks.energy is not None:
        energy, measured = ranks.energy, {}
    else:
        assert ranks.budget_db is not None
        whole_db = snr_db(state)

        def lost_db(energy: float) -> float:
            spans = choose_spans(spectra, energy=energy).spans
            lost = whole_db - snr_db(apply_spans(state, spans))
            tell(f"{energy:.6f} of the energy, {len(spans)} layers of low rank: the SNR is {lost:.3f} dB less")
            return lost

        found, trials = search_energy(lost_db, ranks.budget_db)
        energy = found.energy
        measured = {"budget_db": ranks.budget_db, "lost_db": found.lost_db, "trials": [asdict(each) for each in trials]}
    layers = choose_spans(spectra, energy=energy)
    return layers, {"energy": energy, **measured, **describe_low_rank(state, layers)}


def project(weight: Tensor, span: Tensor) -> Tensor:
    """U Uᵀ W, in the weight's shape."""
    return (span @ (span.T @ weight.flatten(1))).reshape(weight.shape)


def apply_spans(state: UnetState, spans: Spans) -> UnetState:
    """The network with weights of low rank, whose configuration says so; other tensors are shared."""
    projected = {name: project(state.weights[name].double(), span.double()).float() for name, span in spans.items()}
    ranks = {name.removesuffix(".weight"): span.shape[1] for name, span in spans.items()}
    return UnetState({**state.config, LOW_RANK: ranks}, {**state.weights, **projected})


@torch.no_grad()
def project_parameters(network: nn.Module, spans: Spans) -> None:
    """Put weights back on their spans, in place; the spans are on the network's device."""
    for name, span in spans.items():
        weight = network.get_parameter(name)
        weight.copy_(project(weight, span))


def check_ranks(weights: Mapping[str, Tensor], spans: Spans) -> None:
    """See that weights are on their spans.

    Raises:
        NumericalError: one is not, which it names.
    """
    for name, span in spans.items():
        weight = weights[name].detach().cpu().double()
        outside = float((weight - project(weight, span.double())).norm() / weight.norm().clamp(min=1e-30))
        if outside > ROUNDING:
            raise NumericalError(f"{name} is not of rank {span.shape[1]}: {outside:.1e} of its norm is outside")


def describe_low_rank(state: UnetState, layers: LowRankLayers) -> dict[str, Any]:
    """For the report: ranks, and what the layers have in weights before and after they are two each."""
    before = {name: state.weights[name].numel() for name in layers.spans}
    after = {
        name: span.shape[1] * (span.shape[0] + before[name] // span.shape[0]) for name, span in layers.spans.items()
    }
    return {
        "layers": {
            name.removesuffix(".weight"): {"rank": span.shape[1], "weights": before[name], "in_factors": after[name]}
            for name, span in layers.spans.items()
        },
        "dense": layers.dense,
        "weights": sum(before.values()),
        "in_factors": sum(after.values()),
    }
