"""What a machine's NVIDIA GPU does with sdc's engines and with torch: pictures, time, memory, kernels.

    python scripts/gpu_check.py --out build/gpu.json
    python scripts/gpu_check.py --out build/gpu.json --parts sdc torch

Each part runs in a process of its own, so that memory is its own and one that fails leaves the others; `--out` has what
was found so far after each. Bundles are exported into `--work` where they are not there yet.

- ``reference``: pictures by ONNX Runtime on the CPU in fp32, into `--work`, of `tiny` and of Stable Diffusion 1.5 with
  random weights; any machine can draw them.
- ``pictures``: the same in fp32 and fp16 on the GPU: PSNR of each picture to the reference.
- ``sdc``, ``sdc-plain``: Stable Diffusion 1.5 with random weights in fp16, with and without fusion and hoisting:
  UNet step with guidance at 512×512, VAE decoder, whole pictures, overhead of the loop, memory.
- ``sdc-frugal``: time and memory of a picture whose engines are released as soon as it needs them no more.
- ``kernels``, ``kernels-plain``: kernels launched in the loop of a picture, by torch's profiler (CUPTI).
- ``torch``: diffusers' UNet and VAE decoder with the same weights in fp16, channels-last: eager, and with both modes of
  `torch.compile`, one after another; what was measured before `--timeout` is kept.

Times are medians over calls, and end when the GPU has; sdc's include the copies from and to the host. Memory is the
most that the GPU had in use, by nvidia-smi: nothing else may run on it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sdc.compiler.cli import main as main_of_sdc

PROMPTS = [
    "a photo of a red dress on a white background",
    "a photo of a blue sneaker on a black background",
    "a photo of a green bag on a white background",
    "a photo of a yellow coat on a black background",
]
STEPS, WARM_UP, CALLS = 20, 5, 40
MODES = (None, "reduce-overhead", "max-autotune")
PARTS = ("reference", "pictures", "sdc", "sdc-plain", "sdc-frugal", "kernels", "kernels-plain", "torch")
RANDOM = ("--weights", "random")
DRAWN: dict[str, tuple[tuple[str, ...], int, int]] = {"tiny": ((), 4, STEPS), "sd15": (RANDOM, 1, 4)}
"""How pictures are compared: by model, flags of the export, number of prompts, steps."""
Measured = dict[str, Any]


def main() -> int:
    """Run the parts one after another."""
    options = arguments()
    if options.part:
        print(json.dumps(run_part(options)), flush=True)
        return 0
    found: Measured = {"machine": describe_machine(), "parts": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        print(f"{part} ...", flush=True)
        found["parts"][part] = run_in_process(options, part)
        print(json.dumps(found["parts"][part]), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return any("error" in each for each in found["parts"].values())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="folder for bundles")
    parser.add_argument("--target", default="ort-cuda", help="target that runs on this GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one part")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def describe_machine() -> Measured:
    """GPU, driver and versions."""
    from sdc.compiler.doctor import diagnose

    diagnosis = diagnose()
    gpus = [f"{gpu}, {gpu.memory_bytes / 2**30:.0f} GiB, CUDA {gpu.driver_cuda}" for gpu in diagnosis.gpus]
    return {"gpus": gpus, "no_gpu": diagnosis.no_gpu, "versions": dict(diagnosis.versions)}


def run_in_process(options: argparse.Namespace, part: str) -> Measured:
    """What a part found, and its error if it had one."""
    command = [sys.executable, __file__, "--part", part, "--work", str(options.work), "--target", options.target]
    begin = time.perf_counter()
    pipes: Measured = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, process_group=0, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=options.timeout)
            error = f"status {process.returncode}: {errors.strip()[-2000:]}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that torch has started
            printed, _ = process.communicate()
            error = f"not done after {options.timeout} s"
    found: Measured = {"seconds": round(time.perf_counter() - begin, 1)}
    for line in printed.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return {**found, "error": error} if error else found


def run_part(options: argparse.Namespace) -> Measured:
    """One part, in this process."""
    if options.part == "reference":
        return draw_references(options.work)
    if options.part == "pictures":
        return compare_pictures(options.work, options.target)
    if options.part == "torch":
        return measure_torch()
    plain = options.part.endswith("-plain")
    flags = ("--no-fuse", "--no-hoist") if plain else ()
    bundle = export(options.work, "sd15", "fp16", (options.target,), *RANDOM, *flags)
    measure = {"kernels": count_kernels, "kernels-plain": count_kernels, "sdc-frugal": measure_frugal}
    return measure.get(options.part, measure_sdc)(bundle, options.target)


def export(work: Path, model: str, precision: str, targets: tuple[str, ...], *flags: str) -> Path:
    """The bundle, made if it is not there; its name says what it is."""
    bundle = work / "-".join([model, precision, *targets, *(flag.strip("-") for flag in flags)])
    if not bundle.exists():
        command = ["export", "--model", model, "--precision", precision, "--target", ",".join(targets), *flags]
        with redirect_stdout(sys.stderr):
            if main_of_sdc([*command, "--out", str(bundle)]):
                raise RuntimeError(f"sdc {' '.join(command)} failed")
    return bundle


def draw_references(work: Path) -> Measured:
    """Pictures on the CPU, into files."""
    found: Measured = {}
    for model, (flags, prompts, steps) in DRAWN.items():
        bundle = export(work, model, "fp32", ("ort-cpu",), *flags)
        pictures, seconds = draw(bundle, "ort-cpu", prompts, steps)
        np.save(reference_path(work, model), pictures)
        found[model] = {"draw_s": seconds, "standard_deviation": float(pictures.std())}
    return found


def reference_path(work: Path, model: str) -> Path:
    """Where the CPU's pictures are."""
    return work / f"reference-{model}.npy"


def compare_pictures(work: Path, target: str) -> Measured:
    """PSNR in dB of each picture to that of the reference: same prompts, seeds, steps."""
    from sdc.compiler.evaluate.metrics import psnr

    found: Measured = {}
    for model, (flags, prompts, steps) in DRAWN.items():
        reference = np.load(reference_path(work, model))
        for precision in ("fp32", "fp16"):
            bundle = export(work, model, precision, (target,), *flags)
            pictures, seconds = draw(bundle, target, prompts, steps)
            values = psnr(pictures, reference, data_range=2)
            measured = {"psnr_db": [round(float(each), 2) for each in values], "draw_s": round(seconds, 3)}
            found.setdefault(model, {})[precision] = measured
            print(json.dumps(found), flush=True)
    return found


def draw(bundle: Path, target: str, prompts: int, steps: int) -> tuple[np.ndarray, float]:
    """Pictures as [N, 3, H, W], float64 in [-1, 1], and the seconds of a second drawing where they are many steps."""
    from sdc.engines import load

    with load(bundle, target=target) as pipeline:
        generation = pipeline.plan(PROMPTS[:prompts], steps=steps, guidance_scale=5.0, seed=7)
        for _ in range(2 if steps == STEPS else 1):
            begin = time.perf_counter()
            decoded = pipeline.decode(pipeline.denoise(generation))
        return np.clip(decoded.astype(np.float64), -1, 1), time.perf_counter() - begin


def measure_sdc(bundle: Path, target: str) -> Measured:
    """Times and memory of a bundle's pipeline, one picture at a time, with guidance."""
    from sdc.engines import load

    with PeakMemory() as memory, load(bundle, target=target) as pipeline:
        generation = pipeline.plan([PROMPTS[0]], steps=STEPS, guidance_scale=5.0, seed=7)
        latents = pipeline.denoise(generation)
        pipeline.decode(latents)
        engine_s: list[float] = []
        ends: list[float] = []

        def on_step(step: Any) -> None:
            engine_s.append(step.seconds)
            ends.append(time.perf_counter())

        pictures, before_s, outside_s = [], [], []
        for _ in range(5):
            ends.clear()
            begin = time.perf_counter()
            latents = pipeline.denoise(generation, on_step=on_step)
            pipeline.decode(latents)
            pictures.append(time.perf_counter() - begin)
            before_s.append(ends[0] - engine_s[-STEPS] - begin)
            steps = zip(pairwise(ends), engine_s[-STEPS + 1 :], strict=True)
            outside_s += [after - before - engine for (before, after), engine in steps]
        decode = time_calls(lambda: pipeline.decode(latents), calls=10)
    step = statistics.median(engine_s)
    return {
        "step_ms": 1e3 * step,
        "step_quartiles_ms": quartiles(engine_s),
        "loop_overhead": statistics.median(outside_s) / step,
        "before_first_step_ms": 1e3 * statistics.median(before_s),
        "decode_ms": 1e3 * decode,
        "picture_ms": 1e3 * statistics.median(pictures),
        "peak_mb": memory.peak_mb,
        "memory_before_mb": memory.before_mb,
    }


def measure_frugal(bundle: Path, target: str) -> Measured:
    """Time and memory of one picture as `sdc run` draws it: loading is in the time."""
    from sdc.engines import load

    with PeakMemory() as memory, load(bundle, target=target, keep_loaded=False) as pipeline:
        generation = pipeline.plan([PROMPTS[0]], steps=STEPS, guidance_scale=5.0, seed=7)
        begin = time.perf_counter()
        pipeline.decode(pipeline.denoise(generation))
        seconds = time.perf_counter() - begin
    return {"picture_s": seconds, "peak_mb": memory.peak_mb, "memory_before_mb": memory.before_mb}


def count_kernels(bundle: Path, target: str) -> Measured:
    """Kernels and copies in the loop of one picture; torch comes first, for ONNX Runtime to take its libraries."""
    importlib.import_module("torch")
    from sdc.engines import load

    with load(bundle, target=target) as pipeline:
        generation = pipeline.plan([PROMPTS[0]], steps=STEPS, guidance_scale=5.0, seed=7)
        pipeline.denoise(generation)
        return {"launches_per_picture": count_launches(lambda: pipeline.denoise(generation)), "steps": STEPS}


def measure_torch() -> Measured:
    """The same of diffusers' modules, by mode of `torch.compile`; each is printed when it is known."""
    import torch

    from sdc.compiler.load import load_checkpoint

    checkpoint = load_checkpoint("sd15", weights="random")
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    unet, vae = checkpoint.unet(), checkpoint.vae()
    found: Measured = {}
    for mode in MODES:
        with PeakMemory() as memory, torch.inference_mode():
            for module in (unet, vae):
                module.to(memory_format=torch.channels_last, **like)
            found[mode or "eager"] = measure_modules(unet, vae, mode, like)
        found[mode or "eager"] |= {"peak_mb": memory.peak_mb, "memory_before_mb": memory.before_mb}
        print(json.dumps(found), flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return found


def measure_modules(unet: Any, vae: Any, mode: str | None, like: dict[str, Any]) -> Measured:
    """One mode; None for eager."""
    import torch

    sample = torch.randn(2, 4, 64, 64, **like).to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, 64, 64, **like).to(memory_format=torch.channels_last)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, **like)
    timestep = torch.tensor(500, device="cuda")
    step, decode = unet.forward, vae.decode
    if mode is not None:
        step = torch.compile(unet.forward, mode=mode, fullgraph=True)
        decode = torch.compile(vae.decode, mode=mode, fullgraph=True)

    def run_unet() -> None:
        step(sample, timestep, encoder_hidden_states=text, return_dict=False)
        torch.cuda.synchronize()

    def run_vae() -> None:
        decode(latents, return_dict=False)
        torch.cuda.synchronize()

    begin = time.perf_counter()
    run_unet()
    first = time.perf_counter() - begin
    times = timed_calls(run_unet)
    return {
        "step_ms": 1e3 * statistics.median(times),
        "step_quartiles_ms": quartiles(times),
        "first_step_s": first,
        "launches_per_step": count_launches(run_unet),
        "decode_ms": 1e3 * time_calls(run_vae, calls=10),
    }


def time_calls(call: Callable[[], object], calls: int = CALLS) -> float:
    """Median seconds of a call."""
    return statistics.median(timed_calls(call, calls))


def timed_calls(call: Callable[[], object], calls: int = CALLS) -> list[float]:
    """Seconds of each call, after some to warm up."""
    times = []
    for index in range(WARM_UP + calls):
        begin = time.perf_counter()
        call()
        if index >= WARM_UP:
            times.append(time.perf_counter() - begin)
    return times


def quartiles(seconds: list[float]) -> list[float]:
    """The first and the third, in ms."""
    first, _, third = statistics.quantiles(seconds, n=4)
    return [1e3 * first, 1e3 * third]


def count_launches(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that ran on the GPU in one call, whatever launched them, and copies and fills of memory."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    memory = sum(event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)
    return {"kernels": len(on_gpu) - memory, "memory": memory}


class PeakMemory:
    """The most memory that the GPU had in use within the block, in MB (10^6 bytes), read every 20 ms.

    Attributes:
        before_mb: in use when the block began.
        peak_mb: the most.
    """

    COMMAND = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=20")

    def __enter__(self) -> PeakMemory:
        self._watcher = subprocess.Popen(self.COMMAND, stdout=subprocess.PIPE, text=True)
        assert self._watcher.stdout is not None
        self.before_mb = self.peak_mb = self._read(self._watcher.stdout.readline())
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        assert self._watcher.stdout is not None
        for line in self._watcher.stdout:
            self.peak_mb = max(self.peak_mb, self._read(line))

    @staticmethod
    def _read(line: str) -> float:
        return int(line) * 2**20 / 1e6

    def __exit__(self, *exception: object) -> None:
        time.sleep(0.1)
        self._watcher.terminate()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
