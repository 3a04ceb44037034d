"""What determines the result of a compression."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sdc.compiler.distill.settings import PRECISIONS
from sdc.engines.errors import InputError

Importance = Literal["taylor", "fisher", "magnitude"]
Budgets = Literal["sensitivity", "uniform"]
Student = Literal["same", "base", "small"]
SparsityScores = Literal["activation", "magnitude"]
Moments = Literal["activation", "plain"]

MULTIPLES = (1, 8, 16, 32)

TWO_OF_FOUR = "2:4"

DECIBELS = "dB"

MOST_ELASTIC = 0.5


@dataclass(frozen=True)
class Pattern:
    """Where zeros are among the weights of a layer.

    Attributes:
        share: of the weights that are zero.
        structured: two of every four neighbours; otherwise anywhere.
    """

    share: float
    structured: bool


def parse_pattern(text: str) -> Pattern:
    """Read ``2:4``, or a share of zeros.

    Raises:
        InputError: it is neither.
    """
    if text == TWO_OF_FOUR:
        return Pattern(0.5, structured=True)
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise InputError(f"{text!r} is no sparsity", hint=f"give {TWO_OF_FOUR}, or a share between 0 and 1")
    return Pattern(share, structured=False)


@dataclass(frozen=True)
class Ranks:
    """What says which ranks layers get; one of both is None.

    Attributes:
        energy: share that every layer keeps.
        budget_db: by how much the prediction's SNR may fall, on held-out pictures, before recovery.
    """

    energy: float | None
    budget_db: float | None


def parse_ranks(text: str) -> Ranks:
    """Read a share of energy such as ``0.99``, or a budget such as ``1dB``.

    Raises:
        InputError: it is neither.
    """
    number = text.removesuffix(DECIBELS)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if number != text:
        if not 0 < value < math.inf:
            raise InputError(f"a budget for ranks must be above 0 dB, found {text!r}", hint="give for example 1dB")
        return Ranks(None, value)
    if not 0 < value < 1:
        raise InputError(
            f"the energy that is kept must be between 0 and 1, found {text!r}",
            hint="give for example 0.99, or what the SNR may fall by, 1dB",
        )
    return Ranks(value, None)


@dataclass(frozen=True)
class CompressSettings:
    """How a UNet is made smaller; equal settings, data and model give equal results on one machine.

    Attributes:
        parameters: share of the UNet's that shall go, what goes with blocks among it; 0 for fewer blocks, a sparsity or
            low rank alone, in one round.
        importance: what ranks the units of a group; see `importance.py`.
        budgets: "sensitivity" for a width of each group by its measured error, "uniform" for one share of all.
        student: "same", or BK-SDM's choice of blocks ("base", "small") to begin with; see `blocks.py`.
        multiple: of the channels that are kept.
        sparsity: "2:4", or the share of weights, as text, that become zero after the last round; None for none.
        sparsity_scores: which do, "activation" or "magnitude"; see `sparsity.py`.
        low_rank: share of energy that layers keep in the rank that they get after the last round, as text, or how many
            dB that may cost ("1dB"); None for none.
        low_rank_by: whose energy, "activation" or "plain"; see `low_rank.py`.
        elastic: share of a group's units that stay switched off, of those that a smaller network would do without; see
            `elastic.py`.
        rounds: in which channels are removed.
        round_steps: of recovery between rounds.
        recover_steps: of recovery after the last round.
        probe_rows: noisy latents that importance and sensitivity are measured on.
        batch: pictures a step.
        learning_rate: the largest; see `learning_rate_at`.
        guidance: smallest and largest guidance scale at which guided predictions are compared, 1 being none.
        feature_weight: of the loss on the blocks' outputs, beside that on the prediction.
        average_decay: of the averaged weights, which are the result.
        seed: of batches, noise and probes.
        precision: "fp32", or "bf16" for autocast of the networks.
        gradient_checkpointing: less memory, more time; the same losses.
    """

    parameters: float = 0.41
    importance: Importance = "fisher"
    budgets: Budgets = "sensitivity"
    student: Student = "same"
    multiple: int = 8
    sparsity: str | None = None
    sparsity_scores: SparsityScores = "activation"
    low_rank: str | None = None
    low_rank_by: Moments = "activation"
    elastic: float = 0.0
    rounds: int = 3
    round_steps: int = 200
    recover_steps: int = 5000
    probe_rows: int = 128
    batch: int = 16
    learning_rate: float = 5e-5
    guidance: tuple[float, float] = (1.0, 9.0)
    feature_weight: float = 0.1
    average_decay: float = 0.999
    seed: int = 0
    precision: str = "fp32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        changes_weights = self.sparsity is not None or self.low_rank is not None
        is_smaller_anyway = changes_weights or self.student != "same"
        if not (0 < self.parameters < 1 or (self.parameters == 0 and is_smaller_anyway)):
            raise InputError(f"the share of parameters must be between 0 and 1, found {self.parameters:g}")
        if self.sparsity is not None:
            parse_pattern(self.sparsity)
        if self.low_rank is not None:
            if self.sparsity is not None:
                raise InputError(
                    "a weight of low rank has no zeros of its own", hint="give --sparsity or --low-rank, not both"
                )
            parse_ranks(self.low_rank)
        if not 0 <= self.elastic <= MOST_ELASTIC:
            raise InputError(f"the share of elastic channels must be 0 to {MOST_ELASTIC}, found {self.elastic:g}")
        if self.elastic and (changes_weights or not self.parameters):
            raise InputError(
                "channels stay switched off where some are removed and no weights of the others are",
                hint="leave out --elastic, or give --parameters and neither --sparsity nor --low-rank",
            )
        kinds_by_name = {
            "importance": Importance,
            "budgets": Budgets,
            "student": Student,
            "sparsity_scores": SparsityScores,
            "low_rank_by": Moments,
        }
        for name, kinds in kinds_by_name.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise InputError(f"unknown {name} {getattr(self, name)!r}", hint=f"choose from {known}")
        if self.multiple not in MULTIPLES:
            raise InputError(f"channels cannot be multiples of {self.multiple}", hint=f"choose from {MULTIPLES}")
        for name, least in (("rounds", 1), ("round_steps", 0), ("recover_steps", 0), ("probe_rows", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, found {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"the seed must be in 0 to 2**32 - 1, found {self.seed}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"the learning rate must be above 0, found {self.learning_rate}")
        low, high = self.guidance
        if not 1 <= low <= high:
            raise InputError(f"guidance {low:g}:{high:g} is no range of scales", hint="give LOW:HIGH of 1 or more")
        if not self.feature_weight >= 0:
            raise InputError(f"the weight of features must be 0 or more, found {self.feature_weight}")
        if not 0 <= self.average_decay < 1:
            raise InputError(f"the average's decay must be in 0 to 1, found {self.average_decay}")
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}", hint=f"choose from {', '.join(PRECISIONS)}")

    @property
    def pattern(self) -> Pattern | None:
        """Of the zeros; None for none."""
        return None if self.sparsity is None else parse_pattern(self.sparsity)

    @property
    def ranks(self) -> Ranks | None:
        """What says which ranks layers get; None if they keep theirs."""
        return None if self.low_rank is None else parse_ranks(self.low_rank)

    @property
    def has_rank_budget(self) -> bool:
        """Whether ranks are found by measuring held-out pictures."""
        return self.ranks is not None and self.ranks.budget_db is not None

    @property
    def needs_data(self) -> bool:
        """Whether latents of pictures are looked at."""
        prunes_by_data = self.parameters > 0 and (self.importance != "magnitude" or self.budgets != "uniform")
        zeroes_by_data = self.sparsity is not None and self.sparsity_scores == "activation"
        factors_by_data = self.low_rank is not None and (self.low_rank_by == "activation" or self.has_rank_budget)
        return prunes_by_data or zeroes_by_data or factors_by_data or self.total_steps > 0

    @property
    def phases(self) -> tuple[int, ...]:
        """Steps of recovery after each round."""
        return (*(self.round_steps for _ in range(self.rounds - 1) if self.parameters), self.recover_steps)

    @property
    def total_steps(self) -> int:
        """Of recovery, in all phases."""
        return sum(self.phases)

    def share_after(self, round_: int) -> float:
        """Share of the parameters that is gone after a round, from 1: each takes an equal share of what is there."""
        return float(1 - (1 - self.parameters) ** (round_ / self.rounds))

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint and the report hold it."""
        return {**asdict(self), "guidance": list(self.guidance)}


def settings_for(model: str) -> CompressSettings:
    """What suits a model: `tiny` has a recipe of its own."""
    if model == "tiny":
        return CompressSettings(probe_rows=512, batch=64, learning_rate=1e-3, guidance=(1.0, 3.0), recover_steps=4000)
    return CompressSettings()
