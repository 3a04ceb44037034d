"""Seeded random weights: an architecture can be compiled, timed and tested without a download."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomWeights:
    """Weights that depend on the seed and a parameter's own name only.

    Matrices and kernels are uniform with variance 1/fan_in, which keeps activations of order one through the
    network; norm scales are 1 and biases 0, each plus uniform noise of ±0.1, so that leaving one out shows.
    Embeddings are uniform with CLIP's standard deviation of 0.02.

    Source: LeCun, Bottou, Orr, Müller, "Efficient BackProp" (1998), section 4.6.
    """

    seed: int

    @property
    def origin(self) -> str:
        """What an error or a manifest says."""
        return f"random weights, seed {self.seed}"

    def fingerprint(self) -> str:
        """All that determines the weights beside the configuration."""
        return json.dumps(["random", 1, self.seed, np.__version__])

    def check(self, network: str, module: nn.Module) -> None:
        """Random weights fit every architecture."""

    def read(self, network: str, module: nn.Module) -> dict[str, Tensor]:
        """Draw all parameters of ``module``, float32."""
        embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
        return {
            name: self._draw(f"{network}.{name}", parameter.shape, is_embedding=name in embeddings)
            for name, parameter in module.state_dict().items()
        }

    def _draw(self, name: str, shape: torch.Size, *, is_embedding: bool) -> Tensor:
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        noise = torch.empty(shape)
        # NumPy draws five times faster than torch's generator: this is 860 million numbers for SD 1.5.
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(key[:16], "little")))
        generator.random(out=noise.numpy(), dtype=np.float32)
        if len(shape) < 2:
            centre, width = (1.0 if name.endswith(".weight") else 0.0), 0.2
        else:
            deviation = 0.02 if is_embedding else 1 / math.sqrt(math.prod(shape[1:]))
            centre, width = 0.0, math.sqrt(12) * deviation
        return torch.add(torch.tensor(centre - width / 2), noise, alpha=width, out=noise)
