"""What quantising each layer by itself does to the network's output, on samples of real denoising runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdc.compiler.build.built import save_onnx
from sdc.compiler.component import Component
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import TensorSpec
from sdc.engines.targets import ONNXRUNTIME
from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.plan import PrecisionPlan
from sdc.passes.precision.range_rules import DEFAULT_RULE, RangeRule
from sdc.passes.precision.switched_layers import SWITCHES, switch_layers
from sdc.passes.simplify.inline_functions import InlineFunctions

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sensitivity:
    """Errors of one network, relative mean squares: Σ(y' - y)² / Σy², over all samples.

    Attributes:
        layers: by name of the layer, if it alone has its planned format.
        all_layers: if all of them have.
    """

    layers: Mapping[str, float]
    all_layers: float


def measure_sensitivity(
    component: Component,
    table: CalibrationTable | None,
    plan: PrecisionPlan,
    samples: Sequence[Feeds],
    *,
    rule: RangeRule = DEFAULT_RULE,
    on_run: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Run the network once for each layer and sample, in one session.

    Args:
        component: the graph in float32 that was calibrated; it is not changed.
        table: its calibration.
        plan: the format of each layer that is asked about.
        samples: inputs, from several timesteps.
        rule: how activations' ranges follow from the table.
        on_run: progress.
    """
    model = switch_layers(component.model, table, plan, rule)
    InlineFunctions(fused=True).run(model)
    count = len(plan.layers)
    spec = replace(component.spec, inputs=(*component.spec.inputs, TensorSpec(SWITCHES, "bool", (count,))))
    output = component.spec.outputs[0].name
    squares = np.zeros(count + 1)
    power = 0.0
    with tempfile.TemporaryDirectory(prefix="sdc-sensitivity-") as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        with open_session(EngineSource(spec, ONNXRUNTIME, (path,))) as session:
            for done, sample in enumerate(samples):
                exact = session.run({**sample, SWITCHES: np.zeros(count, bool)})[output].astype(np.float64)
                power += float(np.square(exact).sum())
                for index, switches in enumerate([*np.eye(count, dtype=bool), np.ones(count, bool)]):
                    found = session.run({**sample, SWITCHES: switches})[output]
                    squares[index] += np.square(found - exact).sum()
                    if on_run is not None:
                        on_run(done * (count + 1) + index + 1, len(samples) * (count + 1))
    errors = squares / power
    names = [layer.name for layer in plan.layers]
    return Sensitivity(dict(zip(names, map(float, errors), strict=False)), float(errors[-1]))
