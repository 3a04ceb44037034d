"""optimum-onnx's export in ONNX Runtime: float32, and int8 by ONNX Runtime's own quantisation.

Option "variant": "fp32"; "dynamic" (MatMul and Gemm of UNet and text encoder, activations quantised at run time);
"static" (Conv, MatMul and Gemm of the UNet as U8S8 Q/DQ pairs, ranges from a few calls with small pictures). What a
variant does not quantise it takes from "fp32".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from peers.pictures import work_from_networks
from peers.protocol import Feeds, Job, Run, Work, made_folder, main

GRAPHS = "onnx"
QUANTISED = {"fp32": (), "dynamic": ("unet", "text_encoder"), "static": ("unet",)}
CALIBRATING_CALLS = 4
LAYERS = ["Conv", "MatMul", "Gemm"]
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def prepare(job: Job) -> None:
    """Export; quantise."""
    made_folder(job, GRAPHS, lambda folder: export(job, folder))
    variant = job.options["variant"]
    for component in QUANTISED[variant]:
        quantise = partial(
            quantise_dynamic if variant == "dynamic" else quantise_static, job, graph(job, "fp32", component)
        )
        made_folder(job, f"{GRAPHS}-{variant}-{component}", quantise)


def export(job: Job, folder: Path) -> None:
    """As optimum-cli does, without its check of the results."""
    from optimum.exporters.onnx import main_export

    main_export(job.checkpoint, folder, task="text-to-image", do_validation=False, no_post_process=True)


def quantise_dynamic(job: Job, source: Path, folder: Path) -> None:
    """Weights per channel; Conv stays: its integer form is slower than float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del job
    quantize_dynamic(
        source,
        folder / "model.onnx",
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def quantise_static(job: Job, source: Path, folder: Path) -> None:
    """Min-max ranges; weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = calibrating_feeds(job)

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

    quantize_static(
        source,
        folder / "model.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=LAYERS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def calibrating_feeds(job: Job) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of the UNet at timesteps over the whole range, cut to 16×16 latents."""
    feeds = job.feeds("unet")
    inputs = inputs_of_file(graph(job, "fp32", "unet"))
    for index in range(CALIBRATING_CALLS):
        changed = {
            **feeds,
            "sample": np.roll(feeds["sample"], index, axis=-1)[..., :16, :16],
            "timestep": np.array([1 + 300 * index]),
        }
        yield fitted(changed, inputs)


def inputs_of_file(path: Path) -> dict[str, tuple[np.dtype, int]]:
    """Type and rank of each input, without loading weights."""
    import onnx

    inputs = {each.name: each.type.tensor_type for each in onnx.load(path, load_external_data=False).graph.input}
    to_dtype = onnx.helper.tensor_dtype_to_np_dtype
    return {name: (to_dtype(kind.elem_type), len(kind.shape.dim)) for name, kind in inputs.items()}


def fitted(feeds: Feeds, inputs: Mapping[str, tuple[np.dtype, int]]) -> dict[str, np.ndarray]:
    """Inputs in the types and ranks that the graph wants: its timestep may have no dimension."""
    made = {}
    for name, (dtype, rank) in inputs.items():
        made[name] = feeds[name].astype(dtype).reshape(feeds[name].shape if rank else ())
    return made


def graph(job: Job, variant: str, component: str) -> Path:
    """The file of a component."""
    if component in QUANTISED[variant]:
        return Path(job.made) / f"{GRAPHS}-{variant}-{component}" / "model.onnx"
    return Path(job.made) / GRAPHS / component / "model.onnx"


def load(job: Job, component: str) -> Run:
    """A session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    path = graph(job, job.options["variant"], component)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {each.name: (np.dtype(TYPES[each.type]), len(each.shape)) for each in session.get_inputs()}
    first = session.get_outputs()[0].name

    def run(feeds: Feeds) -> np.ndarray:
        return session.run([first], fitted(feeds, inputs))[0]

    return run


def open_work(job: Job) -> Work:
    """Networks and pictures."""
    return work_from_networks(job, load)


if __name__ == "__main__":
    main(open_work, prepare)
