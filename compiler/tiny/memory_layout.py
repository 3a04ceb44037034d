"""Channels-last weights, which oneDNN's convolutions read without reordering."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Lay out the network's weights channels last, in place, and return it."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know the keyword
    return network
