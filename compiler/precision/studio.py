"""Draws the same pictures with any plan of the UNet, by the engines that a bundle would hold without hoisting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sdc.compiler.component import Component
from sdc.compiler.precision.half_safety import HalfCheckSettings, picture_generation
from sdc.compiler.precision.layer_times import open_lowered
from sdc.engines.manifest import PipelineSettings
from sdc.engines.networks import OnStep
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule import Schedule
from sdc.engines.session import Session
from sdc.engines.targets import Target
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.base import Pass, run_passes
from sdc.passes.precision.formats import Format
from sdc.passes.precision.plan import PrecisionPlan

PrecisionPhase = Callable[[str, PrecisionPlan, Target], tuple[Pass, ...]]
"""The passes that give a component its precision under a plan of the UNet, for one target."""


@dataclass(frozen=True)
class Scene:
    """What is drawn, and what the networks need for it.

    Attributes:
        tokenizer: the model's.
        schedule: the model's noise schedule.
        settings: as in the bundle's manifest.
        drawn: the pictures.
    """

    tokenizer: ClipTokenizer
    schedule: Schedule
    settings: PipelineSettings
    drawn: HalfCheckSettings


class Studio:
    """The networks of one model on one target; close it, or use it as a context manager.

    Args:
        target: it runs on this machine.
        components: fused graphs in float32, by name; they are not changed.
        phase: what gives them their precision.
        scene: what is drawn.
    """

    def __init__(
        self, target: Target, components: Mapping[str, Component], phase: PrecisionPhase, scene: Scene
    ) -> None:
        self._target = target
        self._components = components
        self._phase = phase
        self._scene = scene
        self._stack = ExitStack()
        self._default: Format | None = None
        self._surroundings: dict[str, Session] = {}

    def draw(self, plan: PrecisionPlan, *, on_step: OnStep | None = None) -> list[np.ndarray]:
        """The decoded pictures [1, 3, H, W], values from -1 to 1, if the UNet's layers are as planned.

        Args:
            plan: of the UNet; its default holds for the other components, whose engines stay open until it changes.
            on_step: called after every step of the first picture.

        Raises:
            NumericalError: an engine gave NaN or infinity.
        """
        if plan.default is not self._default:
            self.close()
            self._surroundings = {
                name: self._open(name, plan, self._stack) for name in self._components if name != "unet"
            }
            self._default = plan.default
        with ExitStack() as stack:
            sessions = {**self._surroundings, "unet": self._open("unet", plan, stack)}
            pipeline = Pipeline(
                tokenizer=self._scene.tokenizer,
                schedule=self._scene.schedule,
                settings=self._scene.settings,
                specs={name: session.spec for name, session in sessions.items()},
                load_session=sessions.__getitem__,
            )
            pictures = []
            for index in range(len(self._scene.drawn.prompts)):
                generation = picture_generation(pipeline, self._scene.drawn, index)
                latents = pipeline.denoise(generation, on_step=on_step if index == 0 else None)
                pictures.append(pipeline.decode(latents))
            return pictures

    def close(self) -> None:
        """Release the engines; they are opened again if they are needed again."""
        self._stack.close()
        self._default = None
        self._surroundings = {}

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, name: str, plan: PrecisionPlan, stack: ExitStack) -> Session:
        component = self._components[name]
        typed = Component(component.spec, component.model.clone())
        run_passes(self._phase(name, plan, self._target), typed.model)
        return open_lowered(typed, self._target, stack)
