// Convolution on the CPU: the C interface, and the steps that a thread computes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "images.h"
#include "tiles.h"

extern "C" {

/// How weights are stored.
enum SdcWeightType : int32_t { kSdcFloat32 = 0, kSdcBf16 = 1, kSdcInt8 = 2, kSdcFloat16 = 3 };

/// Weights of a convolution, [outputs, channels, window, window], on their way to the layout of the kernel. A product of
/// matrices is one with a window of 1.
struct SdcFilter {
    const void* weights;
    const void* gates;  ///< as many weights, of what outputs are multiplied with; null for none
    void* packed;       ///< as many bytes as sdc_packed_filter_bytes says, aligned to 64
    int32_t* sums;      ///< of each output's weights, and behind those of each gate's; for int8 only
    int64_t outputs;
    int64_t channels;
    int64_t window;         ///< height and width
    int64_t output_stride;  ///< in elements, as the next one; places of a window have no gaps
    int64_t channel_stride;
    SdcWeightType type;
};

/// output = (Σ weight · quantised(input) − shift) · factor + offset, where images have margins of zeros, so that the output
/// is as large as the input. If the filter has gates, that is multiplied with gelu(the same of the gates).
struct SdcConvolution {
    SdcImages input;
    SdcImages output;
    const void* filter;     ///< packed
    const float* factors;   ///< [outputs], and behind those of the gates; likewise the next two
    const float* offsets;
    const int32_t* shifts;  ///< with `bytes` only
    int64_t batch;
    int64_t height;
    int64_t width;
    int64_t channels;
    int64_t outputs;
    int64_t window;
    int64_t top;         ///< rows of the margin above an image, of window - 1 in all; likewise columns left of it
    int64_t left;
    int32_t gated;       ///< whether the filter has gates
    int32_t bytes;       ///< whether weights are int8, and the input is made uint8, clamp(round(x / scale + zero_point))
    float scale;         ///< with `bytes` only; likewise the zero point, an integer
    float zero_point;
};

/// Whether the processor has what convolutions are computed with.
int32_t sdc_convolution_supported();

/// Bytes that packed weights take.
int64_t sdc_packed_filter_bytes(const SdcFilter* filter);

/// Packs weights on TBB's threads. Null, or what is wrong with the arguments.
const char* sdc_pack_filter(const SdcFilter* filter);

/// Convolves on the threads of the caller's TBB arena. Null, or what is wrong with the arguments.
const char* sdc_convolution(const SdcConvolution* convolution);

}  // extern "C"

namespace sdc {

/// A task writes so many outputs of each pixel: those of two tiles, or of one and a tile of gates.
constexpr int64_t outputs_per_task(bool gated) { return gated ? 16 : 32; }

constexpr int64_t kLine = kTileStride;  ///< bytes of some channels of a pixel; a row of a tile
constexpr int64_t kBf16Bytes = 2;
constexpr int64_t kBf16PerLine = kLine / kBf16Bytes;
constexpr int64_t kPairBytes = 2 * kTileBytes;  ///< two tiles, of weights or of sums

constexpr int64_t channels_per_line(bool bytes) { return bytes ? kLine : kBf16PerLine; }

/// A task of step 1 packs so many columns.
constexpr int64_t kColumnsPerTask = 64;

/// How images lie while they are convolved; see convolution_amx.cpp.
struct Planes {
    bool are_images;        ///< whether images are read where they lie
    int64_t columns;
    int64_t pitch;          ///< lines from a row to the next one
    int64_t rows;
    int64_t lines;          ///< of one plane
    int64_t count;          ///< planes
    int64_t tiles_per_row;
    int64_t tiles;           ///< of all images
    int64_t tiles_per_task;

    size_t bytes() const;
    size_t sums_bytes() const;  ///< of a task
};

Planes planes_of(const SdcConvolution& convolution);

/// Packs the weights of one task.
void pack_outputs(const SdcFilter& filter, int64_t task);

/// Step 1: some columns of one row in all planes, the margin's among them.
void pack_columns(const SdcConvolution& convolution, const Planes& planes, int64_t row, int64_t first_column,
                  std::byte* packed);

/// Step 2: the outputs of one task for some tiles of pixels.
void convolve(const SdcConvolution& convolution, const Planes& planes, int64_t task, int64_t first_tile,
              const std::byte* packed, std::byte* sums);

}  // namespace sdc
