// Weights on their way to the layout in which convolution_amx.cpp reads them.
#include <algorithm>
#include <cstring>

#include "convolution.h"
#include "workspace.h"

namespace sdc {
namespace {

/// Bytes of the packed weights of one task.
int64_t block_bytes(const SdcFilter& filter) {
    const int64_t planes = blocks(filter.channels, channels_per_line(filter.type == kSdcInt8));
    return planes * filter.window * filter.window * kPairBytes;
}

uint16_t bf16_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>(bits >> 16 | 0x40U);  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

float float_from_half(uint16_t half) {
    constexpr uint32_t kExponent = 0x7c00U;
    const uint32_t infinite = (half & kExponent) == kExponent ? 0x7f800000U : 0U;
    const uint32_t bits = (half & 0x7fffU) << 13 | infinite;  // the exponent is 112 too low, unless it is the highest
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    if (!infinite) magnitude *= 0x1p112F;
    return half & 0x8000U ? -magnitude : magnitude;
}

/// Writes the tiles of one task, [planes][places of the window][2 tiles][16 rows][16 outputs][group], where a row is a
/// group of channels that fill 32 bits. Weights are read in the order in which they lie.
template <typename Stored, typename Packed, typename Convert>
void pack_outputs(const SdcFilter& filter, int64_t task, Convert&& convert) {
    constexpr int64_t group = sizeof(uint32_t) / sizeof(Packed);
    constexpr int64_t channels_per_plane = kTileRows * group;
    constexpr int64_t tile_size = kTileRows * kTileRows * group;
    const bool gated = filter.gates != nullptr;
    const int64_t places = filter.window * filter.window;
    std::byte* const block = static_cast<std::byte*>(filter.packed) + task * block_bytes(filter);
    if (filter.outputs % outputs_per_task(gated) != 0 || filter.channels % channels_per_plane != 0) {
        std::memset(block, 0, static_cast<size_t>(block_bytes(filter)));  // what is behind the last ones
    }
    for (int64_t tile = 0; tile < 2; ++tile) {
        const auto* weights = static_cast<const Stored*>(gated && tile == 1 ? filter.gates : filter.weights);
        const int64_t first_output = task * outputs_per_task(gated) + (gated ? 0 : tile * kTileRows);
        const int64_t outputs = std::min(kTileRows, filter.outputs - first_output);
        for (int64_t first = 0; first < filter.channels; first += channels_per_plane) {
            const int64_t channels = std::min(channels_per_plane, filter.channels - first);
            const int64_t first_tile = first / channels_per_plane * places * 2 + tile;
            auto* const plane = reinterpret_cast<Packed*>(block) + first_tile * tile_size;
            const auto pack_window = [&](int64_t output, int64_t channel) {
                const Stored* window = weights + (first_output + output) * filter.output_stride +
                                       (first + channel) * filter.channel_stride;
                Packed* target = plane + (channel / group * kTileRows + output) * group + channel % group;
                for (int64_t place = 0; place < places; ++place) {
                    target[place * 2 * tile_size] = convert(window[place]);
                }
            };
            if (filter.channel_stride <= filter.output_stride) {
                for (int64_t output = 0; output < outputs; ++output) {
                    for (int64_t channel = 0; channel < channels; ++channel) pack_window(output, channel);
                }
            } else {
                for (int64_t channel = 0; channel < channels; ++channel) {
                    for (int64_t output = 0; output < outputs; ++output) pack_window(output, channel);
                }
            }
        }
    }
}

/// Sums of the weights of one task's outputs.
void sum_weights(const SdcFilter& filter, int64_t task, const void* weights, int32_t* sums) {
    const int64_t step = outputs_per_task(filter.gates != nullptr);
    const int64_t last = std::min((task + 1) * step, filter.outputs);
    const int64_t places = filter.window * filter.window;
    for (int64_t output = task * step; output < last; ++output) {
        int32_t sum = 0;
        for (int64_t channel = 0; channel < filter.channels; ++channel) {
            const auto* window = static_cast<const int8_t*>(weights) + output * filter.output_stride +
                                 channel * filter.channel_stride;
            for (int64_t place = 0; place < places; ++place) sum += window[place];
        }
        sums[output] = sum;
    }
}

}  // namespace

void pack_outputs(const SdcFilter& filter, int64_t task) {
    if (filter.type == kSdcFloat32) {
        pack_outputs<float, uint16_t>(filter, task, bf16_from_float);
    } else if (filter.type == kSdcBf16) {
        pack_outputs<uint16_t, uint16_t>(filter, task, [](uint16_t weight) { return weight; });
    } else if (filter.type == kSdcFloat16) {
        pack_outputs<uint16_t, uint16_t>(filter, task,
                                         [](uint16_t weight) { return bf16_from_float(float_from_half(weight)); });
    } else {
        pack_outputs<int8_t, int8_t>(filter, task, [](int8_t weight) { return weight; });
        sum_weights(filter, task, filter.weights, filter.sums);
        if (filter.gates) sum_weights(filter, task, filter.gates, filter.sums + filter.outputs);
    }
}

}  // namespace sdc

int64_t sdc_packed_filter_bytes(const SdcFilter* filter) {
    return sdc::blocks(filter->outputs, sdc::outputs_per_task(filter->gates != nullptr)) * sdc::block_bytes(*filter);
}
