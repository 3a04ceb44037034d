"""The only door for torch weights: opens checkpoints and folds LoRAs into them."""

from sdc.compiler.load.checkpoint import Checkpoint, NetworkSource, Weights, WeightSource
from sdc.compiler.load.load import load_checkpoint
from sdc.compiler.load.lora import LoraSource, parse_lora

__all__ = ["Checkpoint", "LoraSource", "NetworkSource", "WeightSource", "Weights", "load_checkpoint", "parse_lora"]
