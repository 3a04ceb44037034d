"""`sdc compress`: takes channels and weights of a UNet away, lets it recover from its teacher, writes a checkpoint."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from sdc.compiler.bundle.request_file import lasting_name
from sdc.compiler.compress.blocks import remove_blocks
from sdc.compiler.compress.draws import Draws
from sdc.compiler.compress.elastic import OPEN_TURN, ElasticChannels, close_units, columns_of
from sdc.compiler.compress.gates import Units, units_off
from sdc.compiler.compress.low_rank import (
    Spans,
    apply_spans,
    check_ranks,
    choose_ranks,
    output_moments,
    project_parameters,
)
from sdc.compiler.compress.preview import save_side_by_side
from sdc.compiler.compress.prune import UnetState, own_network, state_of
from sdc.compiler.compress.quality import Quality, measure_quality
from sdc.compiler.compress.recovery import move_average, recovery_loss
from sdc.compiler.compress.report import Report, write_report
from sdc.compiler.compress.restore import REFERENCE_PROMPTS, STEPS, prompt_errors
from sdc.compiler.compress.rounds import prune_round
from sdc.compiler.compress.settings import CompressSettings
from sdc.compiler.compress.sparsity import (
    Masks,
    apply_masks,
    check_zeros,
    choose_layers,
    describe_sparsity,
    frozen_zeros,
    input_norms,
    make_masks,
)
from sdc.compiler.compress.trajectories import probe_of_prompts
from sdc.compiler.distill.pictures import Pictures
from sdc.compiler.distill.progress_files import Checkpoint as SavedRun
from sdc.compiler.distill.progress_files import LossLog, load_checkpoint_of
from sdc.compiler.distill.settings import learning_rate_at
from sdc.compiler.distill.training_data import TrainingData
from sdc.compiler.distill.training_loop import CHECKPOINT, LOSSES, Reporting, Training, descend, run_steps
from sdc.compiler.load import Checkpoint
from sdc.compiler.load.save import save_checkpoint
from sdc.compiler.tiny.memory_layout import channels_last
from sdc.compiler.trace.interfaces import latent_size
from sdc.compiler.workshop.staging import exclusive, staged_folder
from sdc.engines.errors import InputError
from sdc.engines.schedule_config import schedule_from_config
from sdc.passes.simplify.factorise_weights import LOW_RANK

STUDENT, AVERAGE, MASKS, SPANS = "student", "average", "masks", "spans"


def compress(
    checkpoint: Checkpoint,
    pictures: Pictures | None,
    settings: CompressSettings,
    *,
    out: Path,
    reporting: Reporting,
) -> Report:
    """Make a smaller checkpoint, or go on from what is in the run's folder, and write it with its report.

    A run that is killed and started again gives the same losses and the same files as one that is not, on one machine
    with one number of threads.

    Args:
        checkpoint: the teacher; only its UNet becomes smaller.
        pictures: with captions; None if `settings` need none.
        settings: of the run.
        out: the folder, in diffusers' layout; nothing may be there.
        reporting: of the run.

    Raises:
        InputError: something is at `out`, the folder of the run is another run's, or the UNet cannot be made so small.
        NumericalError: the loss is not finite.
    """
    if checkpoint.config("unet").get("time_cond_proj_dim") is not None and settings.needs_data:
        raise InputError(f"{checkpoint.source} is a latent consistency model", hint="compress its base model")
    if pictures is None and settings.needs_data:
        raise InputError(
            "pictures are needed to measure and to recover",
            hint="give --data, or go by weights alone: --importance magnitude --budgets uniform "
            "--sparsity-scores magnitude --low-rank-by plain --round-steps 0 --recover-steps 0",
        )

    if reporting.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"the run's folder {reporting.folder} is in the result's place, {out}", hint="name another --work"
        )

    def wait() -> None:
        reporting.tell(f"waiting for another process that works in {reporting.folder}")

    with exclusive(reporting.folder, on_wait=wait), exclusive(out, on_wait=wait):
        if out.exists():
            raise InputError(f"{out} is there already", hint="remove it, or name another folder with --out")
        reporting.folder.mkdir(exist_ok=True)
        return _Compression(checkpoint, pictures, settings, reporting).run(out)


class _Compression:
    """The networks, the data and the optimiser of one run.

    What the run is in the midst of is `self.rounds` (one entry for each round that is done), `self.step`, the weights
    of student and average, and what recovery may not change of them; all else follows from these and the settings.
    """

    def __init__(
        self, checkpoint: Checkpoint, pictures: Pictures | None, settings: CompressSettings, reporting: Reporting
    ) -> None:
        self.checkpoint, self.settings, self.reporting = checkpoint, settings, reporting
        self.identity = {
            **settings.to_json(),
            "data": None if pictures is None else pictures.digest,
            **{name: checkpoint.digest(name) for name in ("unet", "text_encoder", "vae_encoder")},
        }
        saved = load_checkpoint_of(self.identity, reporting.folder / CHECKPOINT)
        self.accelerator = Accelerator(mixed_precision="no" if settings.precision == "fp32" else settings.precision)
        self.device = self.accelerator.device
        self.schedule = schedule_from_config(checkpoint.scheduler_config)
        self.draws: Draws | None = None
        if pictures is not None:
            data = TrainingData(checkpoint, pictures, device=self.device, reporting=reporting)
            self.draws = Draws(data, settings, self.schedule)
        teacher = checkpoint.unet()
        self.teacher = channels_last(teacher).to(self.device)
        config = {name: value for name, value in checkpoint.config("unet").items() if name != LOW_RANK}
        whole = UnetState(config, {name: each.cpu() for name, each in teacher.state_dict().items()})
        self.whole_parameters = whole.parameters
        self.rounds: list[dict[str, Any]] = []
        self.step, self.seconds = 0, 0.0
        self.optimizer_state: dict[str, Any] = {}
        self.masks: Masks = {}
        self.spans: Spans = {}
        if saved is None:
            self.student = self.average = remove_blocks(whole, settings.student)
            return
        self.rounds, config = saved.structure["rounds"], saved.structure["config"]
        self.student, self.average = (UnetState(config, saved.weights[role]) for role in (STUDENT, AVERAGE))
        self.masks, self.spans = saved.weights[MASKS], saved.weights[SPANS]
        self.step, self.seconds, self.optimizer_state = saved.step, saved.seconds, saved.optimizer

    def run(self, out: Path) -> Report:
        """All that is left to do, then the folder."""
        phases = self.settings.phases
        if self.rounds:
            self.reporting.tell(f"going on after round {len(self.rounds)}, step {self.step}")
        losses = LossLog(self.reporting.folder / LOSSES, step=self.step)
        try:
            while True:
                done = len(self.rounds)
                end = sum(phases[:done])
                if self.step < end:
                    self._recover(range(self.step + 1, end + 1), phases[done - 1], losses)
                if done and phases[done - 1]:
                    self._note_quality("recovered")
                if done == len(phases):
                    break
                self._shrink(done + 1)
        finally:
            losses.close()
        return self._write(out, losses.losses)

    def _shrink(self, number: int) -> None:
        """Round `number`, from 1, on the average of the weights."""
        settings, last = self.settings, number == len(self.settings.phases)
        self.reporting.tell(f"round {number} of {len(settings.phases)}")
        self.optimizer_state = {}
        self.rounds.append({"round": number, "step": self.step, "parameters": self.average.parameters, "groups": []})
        if settings.parameters:
            self._prune(number)
        elif settings.student != "same":
            self._note_quality("with fewer blocks")
        if settings.sparsity is not None and last:
            self._make_sparse(number)
        if settings.low_rank is not None and last:
            self._make_low_rank(number)
        self._save()

    def _prune(self, number: int) -> None:
        goal = round(self.whole_parameters * (1 - self.settings.share_after(number)))
        pruned = prune_round(
            self.average,
            None if self.draws is None else self.draws.probe(number),
            self.settings,
            goal=goal,
            elastic=self.settings.elastic if number == len(self.settings.phases) else 0.0,
            seed=self.settings.seed + number,
            device=self.device,
            tell=self.reporting.tell,
        )
        self.student = self.average = pruned.state
        self.rounds[-1] |= pruned.to_json()
        if self.settings.elastic and number == len(self.settings.phases):
            units = [unit for layer in pruned.off.values() for unit in layer]
            self.reporting.tell(f"{len(units)} units, {sum(map(len, units))} channels, stay switched off")
        self._note_quality("pruned")

    def _make_sparse(self, number: int) -> None:
        pattern = self.settings.pattern
        assert pattern is not None
        layers, norms = choose_layers(self.average.build_empty(), in_blocks=pattern.structured), None
        if self.settings.sparsity_scores == "activation":
            assert self.draws is not None
            norms = input_norms(
                self.average.build().to(self.device), layers.names, self.draws.probe(number), rows=self.settings.batch
            )
        self.masks = make_masks(self.average.weights, layers.names, pattern, norms)
        self.student = self.average = apply_masks(self.average, self.masks)
        self.rounds[-1]["sparsity"] = describe_sparsity(self.average, layers, self.masks)
        self.reporting.tell(f"{len(layers.names)} layers are sparse, {len(layers.dense)} stay dense")
        self._note_quality("sparse")

    def _make_low_rank(self, number: int) -> None:
        settings, moments = self.settings, None
        assert settings.ranks is not None
        chosen = choose_layers(self.average.build_empty(), in_blocks=False)
        if settings.low_rank_by == "activation":
            assert self.draws is not None
            moments = output_moments(
                self.average.build().to(self.device), chosen.names, self.draws.probe(number), rows=settings.batch
            )
        layers, found = choose_ranks(
            self.average,
            chosen.names,
            moments,
            settings.ranks,
            snr_db=lambda state: self._quality(state).student_snr_db,
            tell=self.reporting.tell,
        )
        self.spans = layers.spans
        self.student = self.average = apply_spans(self.average, self.spans)
        self.rounds[-1]["low_rank"] = {**found, "dense": {**chosen.dense, **layers.dense}}
        self.reporting.tell(f"{len(layers.spans)} layers are of low rank, {len(layers.dense)} stay whole")
        self._note_quality("in low rank")

    @property
    def _off(self) -> Units:
        """Units that are switched off."""
        off: Units = self.rounds[-1].get("elastic", {}) if self.rounds else {}
        return off

    def _note_quality(self, when: str) -> None:
        """Add the average's quality to the last round's entry, once."""
        if self.draws is None or when in self.rounds[-1] or self.draws.held_out == 0:
            return
        self.reporting.tell(f"{when}: measuring on {self.draws.held_out} pictures that are held out")
        found = self._quality(self.average)
        self.rounds[-1][when] = found.to_json()
        self.reporting.tell(f"{when}: the prediction's SNR is {found.student_snr_db:.2f} dB, {found.lost_db:.2f} less")

    def _quality(self, state: UnetState) -> Quality:
        assert self.draws is not None
        latents, states = self.draws.apart()
        return measure_quality(
            close_units(state, self._off).build().to(self.device),
            self.teacher,
            latents=latents,
            states=states,
            schedule=self.schedule,
            rows=self.settings.batch,
            seed=self.settings.seed,
        )

    def _recover(self, steps: range, phase_steps: int, losses: LossLog) -> None:
        """The steps that are left of a phase of `phase_steps`."""
        settings, config, draws = self.settings, self.student.config, self.draws
        assert draws is not None
        student, average = (own_network(state, self.device) for state in (self.student, self.average))
        student.requires_grad_(True)
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
            student.train()  # else diffusers does not checkpoint; SD's networks drop nothing
        parameters = list(student.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        spans = {name: span.to(self.device) for name, span in self.spans.items()}
        before = steps.stop - 1 - phase_steps

        def optimize(step: int) -> dict[str, float]:
            within = step - before
            rate = learning_rate_at(within, steps=phase_steps, largest=settings.learning_rate)
            batch = draws.batch(step)
            with units_off(student, {} if step % OPEN_TURN == 0 else self._off):
                with self.accelerator.autocast():
                    loss = recovery_loss(student, self.teacher, batch, feature_weight=settings.feature_weight)
                line = descend(loss, parameters, optimizer, accelerator=self.accelerator, step=step, learning_rate=rate)
            project_parameters(student, spans)
            move_average(average, student, decay=min(settings.average_decay, within / (within + 10)), spans=spans)
            return line

        def save(step: int, seconds: float) -> None:
            self.step, self.seconds, self.optimizer_state = step, seconds, optimizer.state_dict()
            self.student, self.average = state_of(student, config), state_of(average, config)
            self._save()

        def draw(step: int) -> None:
            self._draw(average, step)

        training = Training(optimize, save, draw)
        with frozen_zeros(student, self.masks):
            self.seconds = run_steps(training, steps, seconds=self.seconds, losses=losses, reporting=self.reporting)

    def _save(self) -> None:
        weights = {STUDENT: dict(self.student.weights), AVERAGE: dict(self.average.weights)}
        weights |= {MASKS: self.masks, SPANS: self.spans}
        structure = {"config": dict(self.student.config), "rounds": self.rounds}
        saved = SavedRun(self.identity, self.step, self.seconds, weights, self.optimizer_state, structure)
        saved.save(self.reporting.folder / CHECKPOINT)

    def _draw(self, network: UNet2DConditionModel, step: int) -> None:
        assert self.draws is not None
        data = self.draws.data
        path = self.reporting.folder / f"grid-{step:06}.png"
        with self.accelerator.autocast(), units_off(network, self._off):
            save_side_by_side(
                path,
                (self.teacher, network),
                data.vae,
                self.schedule,
                prompts=self.reporting.prompts,
                states=data.encode([*self.reporting.prompts, ""]),
                size=data.latent_size,
                guidance_scale=statistics.fmean(self.settings.guidance),
            )
        self.reporting.tell(f"{path}: the teacher's pictures, and the student's of the same noise")

    def _elastic(self, closed: UnetState) -> ElasticChannels:
        """What is off, with what the network's errors are without it."""
        scale = statistics.fmean(self.settings.guidance)
        errors: tuple[float, ...] = ()
        config = self.checkpoint.config("unet")
        size: tuple[int, ...] = (config["in_channels"], *latent_size(config))
        if self.draws is not None:
            data = self.draws.data
            size, captions = data.latent_size, self.draws.captions(REFERENCE_PROMPTS)
            self.reporting.tell(f"errors of {len(captions)} captions without the elastic channels")
            probe = probe_of_prompts(
                self.teacher,
                self.schedule,
                data.encode([*captions, ""]),
                size=size,
                steps=STEPS,
                guidance_scale=scale,
                tell=self.reporting.tell,
            )
            errors = prompt_errors(closed.build().to(self.device), probe)
        return ElasticChannels(
            self._off,
            columns_of(self.average, self._off),
            teacher=lasting_name(self.checkpoint.source, self.checkpoint.source),
            teacher_weights=self.checkpoint.weights,
            teacher_digest=self.checkpoint.digest("unet"),
            guidance_scale=scale,
            size=size,
            steps=STEPS,
            errors=errors,
        )

    def _write(self, out: Path, losses: list[float]) -> Report:
        state = close_units(self.average, self._off)
        if self.settings.pattern is not None:
            check_zeros(state.weights, self.masks, self.settings.pattern)
        check_ranks(state.weights, self.spans)
        report = Report(
            model=self.checkpoint.source,
            settings=self.settings,
            parameters_before=self.whole_parameters,
            parameters_after=state.parameters,
            rounds=self.rounds,
            last_loss=statistics.fmean(losses[-max(1, self.settings.recover_steps // 10) :]) if losses else None,
        )
        with staged_folder(out, durable=False) as folder:
            save_checkpoint(self.checkpoint, folder, unet=(state.config, state.weights))
            if self._off:
                self._elastic(state).save(folder)
            write_report(report, folder)
        return report
