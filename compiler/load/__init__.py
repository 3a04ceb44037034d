"""The only door for weights: opens checkpoints and folds LoRAs into them; opens folders of ONNX graphs."""

from sdc.compiler.load.checkpoint import Checkpoint, NetworkSource, Weights, WeightSource
from sdc.compiler.load.graph_folder import GraphCheckpoint
from sdc.compiler.load.load import load_checkpoint, load_model
from sdc.compiler.lora_argument import LoraSource, parse_lora

__all__ = [
    "Checkpoint",
    "GraphCheckpoint",
    "LoraSource",
    "NetworkSource",
    "WeightSource",
    "Weights",
    "load_checkpoint",
    "load_model",
    "parse_lora",
]
