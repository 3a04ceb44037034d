"""Q/DQ pairs around results of convolutions: one scale and zero point for each channel, from a calibration table.

    q[c] = saturate(round(y[c] / s[c]) + z[c]),  y'[c] = s[c] · (q[c] - z[c])

Channels may differ as much as they like. A backend that writes bytes with a single scale t can do it all the same: it
convolves with weights whose scales are t / s[c] times as large (`lower_conv_to_bytes`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdc.engines.errors import PassError
from sdc.passes.matching import add_initializer
from sdc.passes.precision.qdq_pair import insert_pair
from sdc.passes.precision.scales import affine_from_limits
from sdc.passes.precision.tensor_statistics import ChannelRanges

_MARGIN = 1.1
"""Ranges are wider than what was seen: other prompts and sizes reach further, and what saturates costs more."""


def quantise_result(graph: ir.Graph, conv: ir.Node, ranges: ChannelRanges, *, channels: int, symmetric: bool) -> None:
    """Let all that reads the float32 result of a convolution read it from a pair.

    Raises:
        PassError: the ranges are not finite, or not those of its channels.
    """
    value = conv.outputs[0]
    finite = bool(np.isfinite(ranges.minima).all() and np.isfinite(ranges.maxima).all())
    if not finite or not len(ranges.minima) == len(ranges.maxima) == channels:
        raise PassError(
            f"the ranges of {value.name!r} are not finite numbers, one for each of {channels} channels",
            hint="calibrate again",
        )
    readers = list(value.uses())
    low, high = (_MARGIN * np.asarray(each, np.float32) for each in (ranges.minima, ranges.maxima))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales, integers = affine_from_limits(low, high, symmetric=symmetric)
    scale = add_initializer(graph, scales, f"{value.name}.result_scale")
    zero_point = add_initializer(graph, integers, f"{value.name}.result_zero_point")
    pair = insert_pair(graph, value, scale, zero_point, ir.DataType.FLOAT, kind="int8", axis=1)
    for node, index in readers:
        node.replace_input_with(index, pair)
