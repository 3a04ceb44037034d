"""What is compared: every side, the environment that it runs in, and which figures it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COMPONENTS = ("unet", "vae_decoder", "text_encoder", "picture", "start")
"""What can be measured; "start" is from the start of a process to its first denoising step."""

REFERENCE = "torch-fp32"
"""The side that errors are relative to, and that counts operations."""

ROOFLINE_COMPONENTS = ("gemm-fp32", "gemm-bf16", "gemm-int8")

OWN = "sdc"
"""The environment that the script itself runs in."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        requirements: for pip, pinned.
        arguments: of pip install.
        variables: of pip's process.
    """

    requirements: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    "diffusers": Environment(
        # The range takes a CPU build where one is offered; later ones may bring gigabytes of CUDA packages.
        ("torch>=2.9,<2.14", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "numpy<2.5"),
    ),
    "optimum": Environment(
        (
            "torch>=2.9,<2.14",
            "optimum-onnx==0.1.0",
            "transformers==4.57.6",  # optimum-onnx takes none from 4.58 on
            "diffusers==0.39.0",
            "onnxruntime==1.31.1",
            "onnx==1.20.1",
            "accelerate==1.15.0",
            "numpy<2.5",
        ),
    ),
    "openvino": Environment(("openvino==2026.4.1", "nncf==3.4.0", "numpy<2.5")),
    "sdcpp": Environment(
        ("stable-diffusion-cpp-python==0.4.7", "numpy<2.5"),
        ("--no-binary", "stable-diffusion-cpp-python"),
        {
            "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        },
    ),
}


@dataclass(frozen=True)
class Side:
    """A row of the tables.

    Attributes:
        key: on the command line and in the results.
        title: in the tables.
        environment: a name of `ENVIRONMENTS`, or `OWN`.
        module: below `peers`; what runs there.
        precision: "fp32", "bf16" (or another 16-bit type) or "int8": which sides it is held against.
        options: the module's own.
        variables: of the process.
        components: that differ from those of the side before it, and so are measured.
        needs: the side whose files it is prepared from.
        most_rounds: that it takes part in; for one that is many times slower than all others.
    """

    key: str
    title: str
    environment: str
    module: str
    precision: str
    options: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    components: tuple[str, ...] = COMPONENTS
    needs: str | None = None
    most_rounds: int | None = None

    @property
    def draws_otherwise(self) -> bool:
        """Whether its pictures are of less work than the others'."""
        return "way" in self.options

    @property
    def ours(self) -> bool:
        """Whether it is no peer."""
        return self.environment == OWN


UNET_ONLY = ("unet", "picture", "start")
"""Of sides whose other networks are the same as another side's."""

SIDES = (
    Side(
        *("torch-compile", "torch.compile bf16, frozen, channels-last", "diffusers", "torch_side", "bf16"),
        options={"dtype": "bfloat16", "compile": True},
    ),
    Side(
        *("torch-bf16", "diffusers, eager bf16, channels-last", "diffusers", "torch_side", "bf16"),
        options={"dtype": "bfloat16"},
    ),
    Side(
        *(REFERENCE, "diffusers, eager fp32, channels-last", "diffusers", "torch_side", "fp32"),
        options={"dtype": "float32"},
    ),
    Side(
        *("ort-fp32", "ONNX Runtime (optimum) fp32", "optimum", "onnxruntime_side", "fp32"), options={"variant": "fp32"}
    ),
    Side(
        *("ort-dynamic", "ONNX Runtime (optimum) int8, dynamic", "optimum", "onnxruntime_side", "int8"),
        options={"variant": "dynamic"},
        components=("unet", "text_encoder", "picture", "start"),
        needs="ort-fp32",
    ),
    Side(
        *("ort-static", "ONNX Runtime (optimum) int8, static", "optimum", "onnxruntime_side", "int8"),
        options={"variant": "static"},
        components=UNET_ONLY,
        needs="ort-fp32",
    ),
    Side(
        *("openvino-bf16", "OpenVINO (optimum's export) bf16", "openvino", "openvino_side", "bf16"),
        options={"variant": "plain"},
        needs="ort-fp32",
    ),
    Side(
        *("openvino-int8", "OpenVINO (optimum's export) int8 by NNCF", "openvino", "openvino_side", "int8"),
        options={"variant": "nncf"},
        components=UNET_ONLY,
        needs="openvino-bf16",
    ),
    Side(
        *("sdcpp-f16", "stable-diffusion.cpp f16", "sdcpp", "sdcpp_side", "bf16"),
        options={"type": "f16"},
        most_rounds=2,
    ),
    Side(
        *("sdcpp-q8", "stable-diffusion.cpp q8_0", "sdcpp", "sdcpp_side", "int8"),
        options={"type": "q8_0"},
        components=UNET_ONLY,
        most_rounds=2,
    ),
    Side(
        *("sdc-bf16-plain", "sdc bf16, kernels off", OWN, "sdc_side", "bf16"),
        options={"precision": "bf16"},
        variables={"SDC_KERNELS": "0"},
    ),
    Side(
        *("sdc-bf16", "sdc bf16", OWN, "sdc_side", "bf16"),
        options={"precision": "bf16"},
        variables={"SDC_KERNELS": "1"},
    ),
    Side(
        *("sdc-int8-plain", "sdc int8, kernels off", OWN, "sdc_side", "int8"),
        options={"precision": "int8"},
        variables={"SDC_KERNELS": "0"},
        components=UNET_ONLY,
    ),
    Side(
        *("sdc-int8", "sdc int8", OWN, "sdc_side", "int8"),
        options={"precision": "int8"},
        variables={"SDC_KERNELS": "1"},
        components=UNET_ONLY,
    ),
    Side(
        *("sdc-int8-cached", "sdc int8, DeepCache 3, guidance at 0:15", OWN, "sdc_side", "int8"),
        options={
            "precision": "int8",
            "deepcache": True,
            "way": {"steps": 20, "deepcache": 3, "guidance_steps": (0, 15)},
        },
        variables={"SDC_KERNELS": "1"},
        components=("picture",),
    ),
    Side(
        *("sdc-int8-lcm", "sdc int8, LCM in 4 steps", OWN, "sdc_side", "int8"),
        options={"precision": "int8", "way": {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}},
        variables={"SDC_KERNELS": "1"},
        components=("picture",),
    ),
)

ROOFLINES = (
    Side(
        *("roofline-torch", "torch (MKL, oneDNN)", "diffusers", "roofline_torch_side", "any"),
        components=ROOFLINE_COMPONENTS,
    ),
    Side(
        *("roofline-openvino", "OpenVINO", "openvino", "roofline_openvino_side", "any"),
        components=ROOFLINE_COMPONENTS,
    ),
)
"""Products of two matrices of 4096 × 4096; the fastest of them is what times are multiples of."""


def find_side(key: str) -> Side:
    """The side or roofline of that name."""
    return next(side for side in (*SIDES, *ROOFLINES) if side.key == key)
