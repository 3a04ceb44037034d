"""optimum-onnx's export in OpenVINO: as it is in bf16, and with a UNet in int8 by NNCF.

Option "variant": "plain" or "nncf". Sizes are fixed before compiling, which is what OpenVINO's own guides advise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino

from peers.pictures import work_from_networks
from peers.protocol import COMPONENTS, PICTURE, Feeds, Job, Run, Work, made_folder, main

GRAPHS = "onnx"
CALIBRATING_CALLS = 8


def prepare(job: Job) -> None:
    """Convert; quantise the UNet."""
    made_folder(job, "openvino", lambda folder: convert(job, folder))
    if job.options["variant"] == "nncf":
        made_folder(job, "openvino-nncf", lambda folder: quantise(job, folder))


def convert(job: Job, folder: Path) -> None:
    """Weights are kept in 16 bits, as OpenVINO's converter does by default."""
    for component in COMPONENTS:
        source = Path(job.made) / GRAPHS / component / "model.onnx"
        if not source.exists():
            raise FileNotFoundError(f"{source} is missing: optimum's export failed")
        openvino.save_model(openvino.convert_model(source), folder / f"{component}.xml", compress_to_fp16=True)


def quantise(job: Job, folder: Path) -> None:
    """NNCF's post-training quantisation for transformers, ranges from a few timesteps with small pictures."""
    import nncf

    feeds = job.feeds("unet")
    samples = [
        {
            **feeds,
            "sample": np.roll(feeds["sample"], index, axis=-1)[..., :32, :32],
            "timestep": np.array([1 + 120 * index]),
        }
        for index in range(CALIBRATING_CALLS)
    ]
    model = openvino.Core().read_model(Path(job.made) / "openvino" / "unet.xml")
    samples = [fitted(model, sample) for sample in samples]
    made = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
    openvino.save_model(made, folder / "unet.xml")


def fitted(model: openvino.Model, feeds: Feeds) -> dict[str, np.ndarray]:
    """Inputs by name in the types and ranks that the model wants."""
    made = {}
    for port in model.inputs:
        array = feeds[port.any_name].astype(port.element_type.to_dtype())
        made[port.any_name] = array.reshape(()) if port.partial_shape.rank.get_length() == 0 else array
    return made


def load(job: Job, component: str) -> Run:
    """A compiled model of fixed sizes."""
    folder = "openvino-nncf" if job.options["variant"] == "nncf" and component == "unet" else "openvino"
    core = openvino.Core()
    model = core.read_model(Path(job.made) / folder / f"{component}.xml")
    feeds = fitted(model, job.feeds(component))
    model.reshape({name: array.shape for name, array in feeds.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(fed: Feeds) -> np.ndarray:
        results = request.infer(fitted(model, fed), share_inputs=True, share_outputs=False)
        return results[compiled.outputs[0]]

    return run


def open_work(job: Job) -> Work:
    """Networks and pictures; a picture's VAE decodes one."""
    if job.component == PICTURE and job.feeds(PICTURE)["latents"].shape[0] != 1:
        raise ValueError("expected noise for one picture")
    return work_from_networks(job, load)


if __name__ == "__main__":
    main(open_work, prepare)
