"""Our int8 beside the peers' of the same network, calibrated on the same runs: pictures, errors and times.

    pip install nncf
    python scripts/compare_int8_peers.py --out build/peers
    python scripts/compare_int8_peers.py --out build/peers-planted --model build/planted/tiny

The peers run with the settings of the table's names, defaults otherwise. They get the network in one graph that nothing
was fused in or hoisted out of, lowered for ONNX Runtime, and the inputs of its calls in the denoising runs that ours is
calibrated on. Their engines stand in a bundle in the place of its UNet, so that everything around it is the same. The
reference is fp32 of the trained model, on each target. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from unet_steps import TIMED_ROUNDS, step_seconds, time_in_turn, unet_bytes

from sdc.compiler.bundle.writer import json_bytes
from sdc.compiler.calibration.prompts import prompts_for
from sdc.compiler.calibration.settings import CalibrationSettings
from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings
from sdc.compiler.evaluate.verdicts import digest_of
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.planning import PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.text_table import markdown_row
from sdc.engines.bundle import MANIFEST_NAME, open_bundle
from sdc.engines.manifest import EngineEntry, FileEntry
from sdc.engines.pipeline import Pipeline
from sdc.engines.schedule_config import read_schedule
from sdc.engines.session import Run, Session
from sdc.engines.sessions.openvino_core import openvino_core
from sdc.engines.targets import parse_targets
from sdc.engines.tokenizer import load_tokenizer

BATCH = 4
"""Prompts of a calibrating run, as in our own."""

TARGETS = ("cpu", "ort-cpu")

Feeds = dict[str, np.ndarray]
Write = Callable[[Path, Path, list[Feeds]], tuple[Path, ...]]
"""Quantises the network of a file into a folder and names what it wrote, the engine's file first."""


@dataclass(frozen=True)
class Peer:
    """A way to int8.

    Attributes:
        name: in the table.
        target: whose backend runs it.
        write: does it.
    """

    name: str
    target: str
    write: Write


def main() -> None:
    """Quantise with everything, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles and the figures")
    parser.add_argument("--model", default=JUDGED_MODEL, help="tiny, or a folder of that name, such as the planted one")
    parser.add_argument("--samples", type=int, default=500, help="pictures")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures")
    parser.add_argument("--guidance", type=float, default=1.9, help="of the pictures")
    parser.add_argument("--again", action="store_true", help="take the peers' bundles that --out has from a run before")
    options = parser.parse_args()
    out: Path = options.out
    bundles: dict[tuple[str, str], Path] = {}
    for target in TARGETS:
        bundles["fp32", target] = export(out, JUDGED_MODEL, "fp32", target)
        bundles["sdc int8", target] = export(out, options.model, "int8", target)
        bundles["sdc int8, not fused or hoisted", target] = export(out, options.model, "int8", target, classic=True)
    plain = {target: export(out, options.model, "fp32", target, classic=True) for target in TARGETS}
    network = engine_file(plain["ort-cpu"], "ort-cpu")
    feeds = record_feeds(plain["ort-cpu"], prompts_for(JUDGED_MODEL))
    print(f"{len(feeds)} calls of the network in {CalibrationSettings.steps} steps of as many prompts as ours has")
    for peer in PEERS:
        place = out / f"{peer.name} {peer.target}".replace(",", "").replace(" ", "-")
        try:
            bundle = place
            if not options.again or not (place / MANIFEST_NAME).is_file():
                bundle = with_unet(plain[peer.target], place, peer, network, feeds)
            with opened(bundle, Settings(samples=1, target=peer.target)) as made:
                step_seconds(made)  # what does not load or gives no numbers
            bundles[peer.name, peer.target] = bundle
        except Exception as error:  # a peer may fail in any way, and that is a row's content, not the end
            print(f"{peer.name}, {peer.target}: failed: {type(error).__name__}: {str(error)[:200]}")
    settings = Settings(samples=options.samples, seed=options.seed, guidance_scale=options.guidance)
    print_table(bundles, settings, out / "table.json")


def export(out: Path, model: str, precision: str, target: str, *, classic: bool = False) -> Path:
    """A bundle for one target; nothing of a classic one is fused or hoisted."""
    bundle = out / f"{precision}-{target}{'-classic' if classic else ''}{'' if model == JUDGED_MODEL else '-model'}"
    request = ExportRequest(Source(model), PrecisionRequest(precision), parse_targets(target), bundle)
    export_bundle(replace(request, fuse=not classic, hoist=not classic))
    return bundle


def engine_file(bundle: Path, target: str) -> Path:
    """The UNet's."""
    return bundle / open_bundle(bundle).manifest.targets[target].engines["unet"].files[0]


class Recorder:
    """Stands in for the UNet's session and adds copies of what it is fed to a list."""

    def __init__(self, session: Session, recorded: list[Feeds]) -> None:
        self.spec = session.spec
        self._recorded = recorded
        self._session = session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        self._recorded.append({name: np.array(value) for name, value in feeds.items()})
        return self._session.run(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """See `Session.hold`."""
        return lambda others: self.run({**feeds, **others})

    @property
    def memory_bytes(self) -> int:
        """As the session that it stands for."""
        return self._session.memory_bytes

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()


def record_feeds(bundle: Path, prompts: tuple[str, ...]) -> list[Feeds]:
    """What the UNet is called with when ours is calibrated: all prompts, every timestep."""
    opened_bundle = open_bundle(bundle)
    target = opened_bundle.target("ort-cpu")
    recorded: list[Feeds] = []

    def load_session(component: str) -> Session:
        session = opened_bundle.load_session(component, target)
        return Recorder(session, recorded) if component == "unet" else session

    manifest = opened_bundle.manifest
    with Pipeline(
        tokenizer=load_tokenizer(bundle / "tokenizer", max_tokens=manifest.pipeline.max_tokens),
        schedule=read_schedule(bundle / "scheduler" / "scheduler_config.json"),
        settings=manifest.pipeline,
        specs=manifest.components,
        load_session=load_session,
    ) as pipeline:
        for begin in range(0, len(prompts), BATCH):
            plan = pipeline.plan(
                list(prompts[begin : begin + BATCH]),
                sampler="ddim",
                steps=CalibrationSettings.steps,
                guidance_scale=CalibrationSettings.guidance_scale,
                seed=[begin + index for index in range(BATCH)],
            )
            pipeline.denoise(plan)
    return recorded


def with_unet(bundle: Path, out: Path, peer: Peer, network: Path, feeds: list[Feeds]) -> Path:
    """A copy of a bundle with a peer's engine in the place of its UNet."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(bundle, out)
    manifest = open_bundle(bundle).manifest
    entry = manifest.targets[peer.target]
    files = dict(manifest.files)
    for name in entry.engines["unet"].files:
        (out / name).unlink()
        del files[name]
    written = peer.write(network, out / "unet", feeds)
    for path in written:
        files[path.relative_to(out).as_posix()] = FileEntry(digest_of(path), path.stat().st_size)
    names = tuple(path.relative_to(out).as_posix() for path in written)
    # The options of our own int8 engines: the rest of the network in whatever the backend holds to be fastest.
    options = {"inference_precision": "auto"} if peer.target == "cpu" else entry.engines["unet"].options
    engines = {**entry.engines, "unet": EngineEntry(names, options)}
    targets = {**manifest.targets, peer.target: replace(entry, engines=engines)}
    changed = replace(manifest, targets=targets, files=files, precision=peer.name)
    (out / MANIFEST_NAME).write_bytes(json_bytes(changed.to_json()))
    open_bundle(out)
    return out


def with_nncf(*, mixed: bool = False, transformer: bool = False) -> Write:
    """NNCF's post-training quantisation.

    Args:
        mixed: asymmetric activations, as ours.
        transformer: smooths, and leaves some operators out; activations are asymmetric, too.
    """

    def write(network: Path, folder: Path, feeds: list[Feeds]) -> tuple[Path, ...]:
        import nncf
        import openvino

        kind = nncf.ModelType.TRANSFORMER if transformer else None
        preset = nncf.QuantizationPreset.MIXED if mixed else None
        model = nncf.quantize(
            openvino_core().read_model(network),
            nncf.Dataset(feeds),
            preset=preset,
            model_type=kind,
            subset_size=len(feeds),
        )
        path = folder / "openvino_model.xml"
        openvino.save_model(model, path)
        return path, path.with_suffix(".bin")

    return write


def with_onnxruntime(*, layers_only: bool, unsigned: bool = False) -> Write:
    """onnxruntime.quantization's static quantisation, min-max.

    Args:
        layers_only: Conv, MatMul and Gemm per channel, as ours; else all that it knows, per tensor, as is its default.
        unsigned: activations in uint8, in which ONNX Runtime multiplies faster on CPUs; else in int8, its default.
    """

    def write(network: Path, folder: Path, feeds: list[Feeds]) -> tuple[Path, ...]:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._feeds: Iterator[Feeds] = iter(feeds)

            def get_next(self) -> Feeds | None:
                return next(self._feeds, None)

        path = folder / "model.onnx"
        with tempfile.TemporaryDirectory() as temporary:
            whole, prepared = (Path(temporary) / name for name in ("whole.onnx", "prepared.onnx"))
            onnx.save(onnx.load(network), whole)  # it takes no weights in files of their own that are links
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            layers = ["Conv", "MatMul", "Gemm"] if layers_only else None
            quantize_static(
                prepared,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
                op_types_to_quantize=layers,
                per_channel=layers_only,
            )
        return tuple(sorted(folder.glob("model.onnx*")))

    return write


PEERS = (
    Peer("NNCF, defaults", "cpu", with_nncf()),
    Peer("NNCF, mixed preset", "cpu", with_nncf(mixed=True)),
    Peer("NNCF, transformer", "cpu", with_nncf(transformer=True)),
    Peer("onnxruntime static, defaults", "ort-cpu", with_onnxruntime(layers_only=False)),
    Peer("onnxruntime static, layers per channel", "ort-cpu", with_onnxruntime(layers_only=True)),
    Peer("onnxruntime static, layers, uint8", "ort-cpu", with_onnxruntime(layers_only=True, unsigned=True)),
)


def print_table(bundles: Mapping[tuple[str, str], Path], settings: Settings, figures: Path) -> None:
    """A row for each bundle, with times taken in turn."""
    seconds = time_steps(bundles, settings)
    print(markdown_row("network", "target", "PSNR, dB", "worst 5 %", "epsilon error", "UNet, MB", "ms a step", "ratio"))
    print(markdown_row(*["---"] * 8))
    rows = []
    for place, ((name, target), bundle) in enumerate(bundles.items()):
        found = evaluate(bundle, bundles["fp32", target], replace(settings, target=target))
        psnr = next(row for row in found.paired if row.name == "psnr_db")
        errors = [row.error for row in found.epsilon if row.error is not None]
        mean = float(np.sqrt(np.mean(np.square(errors))))
        size = unet_bytes(bundle, target)
        ratios = seconds[:, place] / seconds[:, list(bundles).index(("fp32", target))]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        milliseconds = 1000 * float(np.median(seconds[:, place]))
        spread = f"{psnr.value.value:.2f} ± {psnr.value.noise or 0:.2f}"
        print(
            markdown_row(
                *(name, target, spread, f"{psnr.worst_5_percent:.2f}", f"{mean:.5f}", f"{size / 1e6:.1f}"),
                *(f"{milliseconds:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"),
            ),
            flush=True,
        )
        rows.append(
            {
                "name": name,
                "target": target,
                "psnr_db": psnr.value.value,
                "worst_5_percent_db": psnr.worst_5_percent,
                "epsilon": errors,
                "unet_bytes": size,
                "seconds": seconds[:, place].tolist(),
            }
        )
        figures.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def time_steps(bundles: Mapping[tuple[str, str], Path], settings: Settings) -> np.ndarray:
    """Median seconds of the UNet in a step of one picture: [rounds, bundles].

    What is hoisted runs once a picture and is not in it. Bundles of one target take turns. Those of another are not
    loaded meanwhile: a backend's idle threads wait busily.
    """
    seconds = np.empty((TIMED_ROUNDS, len(bundles)))
    for target in TARGETS:
        chosen = {place: bundle for place, ((_, of), bundle) in enumerate(bundles.items()) if of == target}
        with ExitStack() as stack:
            made = [stack.enter_context(opened(bundle, replace(settings, target=target))) for bundle in chosen.values()]
            seconds[:, list(chosen)] = time_in_turn(made)
    return seconds


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
