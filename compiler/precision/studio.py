"""Draws the same pictures with any plan of the UNet, by the engines that a bundle for one target would hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sdc.compiler.component import Component
from sdc.compiler.precision.half_safety import HalfCheckSettings, picture_generation
from sdc.compiler.precision.layer_times import open_lowered
from sdc.engines.manifest import PipelineSettings
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule import Schedule
from sdc.engines.session import Run, Session
from sdc.engines.targets import Target
from sdc.engines.tokenizer import ClipTokenizer
from sdc.passes.base import Pass, run_passes
from sdc.passes.precision.formats import Format
from sdc.passes.precision.plan import PrecisionPlan

Feeds = Mapping[str, np.ndarray]

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
    """The networks of one model on one target.

    Args:
        target: it runs on this machine.
        components: fused graphs in float32, by name; they are not changed.
        phase: what gives them their precision.
        scene: what is drawn.
        stack: owns the engines that are kept, all but the UNet's.
    """

    def __init__(
        self,
        target: Target,
        components: Mapping[str, Component],
        phase: PrecisionPhase,
        scene: Scene,
        stack: ExitStack,
    ) -> None:
        self._target = target
        self._components = components
        self._phase = phase
        self._scene = scene
        self._stack = stack
        self._kept: dict[Format, dict[str, Session]] = {}

    def draw(self, plan: PrecisionPlan, *, watch: Callable[[Feeds], None] | None = None) -> list[np.ndarray]:
        """The decoded pictures [1, 3, H, W], values from -1 to 1, if the UNet's layers are as planned.

        Args:
            plan: of the UNet; its default holds for the other components.
            watch: is given what the UNet is fed, at each step.
        """
        with ExitStack() as stack:
            sessions = {**self._surroundings(plan), "unet": self._open("unet", plan, stack)}
            if watch is not None:
                sessions["unet"] = _Watched(sessions["unet"], watch)
            pipeline = Pipeline(
                tokenizer=self._scene.tokenizer,
                schedule=self._scene.schedule,
                settings=self._scene.settings,
                specs={name: session.spec for name, session in sessions.items()},
                load_session=sessions.__getitem__,
            )
            drawn = self._scene.drawn
            generations = (picture_generation(pipeline, drawn, index) for index in range(len(drawn.prompts)))
            return [pipeline.decode(pipeline.denoise(each)) for each in generations]

    def _surroundings(self, plan: PrecisionPlan) -> dict[str, Session]:
        if plan.default not in self._kept:
            names = self._components.keys() - {"unet"}
            self._kept[plan.default] = {name: self._open(name, plan, self._stack) for name in names}
        return self._kept[plan.default]

    def _open(self, name: str, plan: PrecisionPlan, stack: ExitStack) -> Session:
        component = self._components[name]
        typed = Component(component.spec, component.model.clone())
        run_passes(self._phase(name, plan, self._target), typed.model)
        return open_lowered(typed, self._target, stack)


class _Watched:
    """Stands in for a session, and shows what it is fed."""

    def __init__(self, session: Session, watch: Callable[[Feeds], None]) -> None:
        self.spec = session.spec
        self._session = session
        self._watch = watch

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        self._watch(feeds)
        return self._session.run(feeds)

    def hold(self, feeds: Feeds) -> Run:
        """See `Session.hold`; it always hands everything over."""
        return lambda others: self.run({**feeds, **others})

    @property
    def memory_bytes(self) -> int:
        """As the session that it stands for."""
        return self._session.memory_bytes

    def close(self) -> None:
        """Leaves the session to its owner."""

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
