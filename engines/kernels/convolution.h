// Convolution on the CPU: the C interface, and the steps that a thread computes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "images.h"

extern "C" {

/// How weights are stored.
enum SdcWeightType : int32_t { kSdcFloat32 = 0, kSdcBf16 = 1, kSdcInt8 = 2 };

/// Weights of a convolution, [outputs, channels, window, window] without gaps, on their way to the layout of the kernel.
struct SdcFilter {
    const void* weights;
    void* packed;   ///< as many bytes as sdc_packed_filter_bytes says, aligned to 64
    int32_t* sums;  ///< [outputs], of each output's weights; for int8 only
    int64_t outputs;
    int64_t channels;
    int64_t window;  ///< height and width
    SdcWeightType type;
};

/// output = (Σ weight · quantised(input) − shift) · factor + offset, where images end in zeros on all sides, so that the
/// output is as large as the input.
struct SdcConvolution {
    SdcImages input;
    SdcImages output;
    const void* filter;     ///< packed
    const float* factors;   ///< [outputs]
    const float* offsets;   ///< [outputs]
    const int32_t* shifts;  ///< [outputs]; with `bytes` only
    int64_t batch;
    int64_t height;
    int64_t width;
    int64_t channels;
    int64_t outputs;
    int64_t window;      ///< odd
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

/// A task writes so many outputs of each pixel.
constexpr int64_t kOutputsPerTask = 32;

/// How images lie while they are convolved; see convolution_amx.cpp.
struct Planes {
    int64_t pitch;          ///< lines from a row to the next one
    int64_t rows;
    int64_t lines;          ///< of one plane
    int64_t count;          ///< planes
    int64_t tiles_per_row;
    int64_t rows_per_task;  ///< of images without a margin

    size_t bytes() const;
    size_t sums_bytes() const;  ///< of a task
};

Planes planes_of(const SdcConvolution& convolution);

/// Packs the weights of kOutputsPerTask outputs.
void pack_outputs(const SdcFilter& filter, int64_t first_output);

/// Step 1: one row of all planes, the margin's among them.
void pack_row(const SdcConvolution& convolution, const Planes& planes, int64_t row, std::byte* packed);

/// Step 2: kOutputsPerTask outputs of some rows.
void convolve(const SdcConvolution& convolution, const Planes& planes, int64_t first_output, int64_t first_row,
              const std::byte* packed, std::byte* sums);

}  // namespace sdc
