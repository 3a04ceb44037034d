// Group normalisation on the CPU: the C interface, and the steps that a thread computes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "images.h"

extern "C" {

/// output = activation((x − mean) / √(variance + epsilon) · weight + bias) for x = input + summand + addend, where mean and
/// variance are those of all pixels of a group of neighbouring channels in one image.
struct SdcGroupNorm {
    SdcImages input;
    SdcImages summand;    ///< its data is null for zeros
    SdcImages sum;        ///< where input + summand is written, rounded; may be the output, or one of the two
    SdcImages output;     ///< may be the input
    const float* weight;  ///< [channels]
    const float* bias;    ///< [channels]
    const void* addend;   ///< bf16, [batch, channels]; null for zeros
    int64_t addend_batch_stride;  ///< in elements; 0 where all images have the same
    int64_t batch;
    int64_t pixels;
    int64_t channels;
    int64_t groups;
    float epsilon;
    int32_t silu;  ///< whether the activation is x · sigmoid(x); otherwise there is none
};

/// Normalises on the threads of the caller's TBB arena. Null, or what is wrong with the arguments.
const char* sdc_group_norm(const SdcGroupNorm* norm);

}  // extern "C"

namespace sdc {

/// Statistics are taken of so many pixels at a time, by one thread.
constexpr int64_t kPixelsPerChunk = 128;

/// One per channel, or rows of that: [chunks][channels].
struct Moments {
    float* means;
    float* squares;  ///< sums of squared differences from the mean
};

/// What a pixel is multiplied with and what is added to it then, [channels].
struct Affine {
    float* factors;
    float* offsets;
};

bool group_norm_supported();

/// Step 1: the row of moments of one chunk of pixels; and their sums if there is a summand.
void take_moments(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, Moments row);

/// Step 2: what one group's pixels are normalised with, from the moments of all chunks of the image.
void join_moments(const SdcGroupNorm& norm, int64_t batch, int64_t group, Moments moments, Affine affine);

/// Step 3: writes so many pixels of one image.
void normalise(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, int64_t pixels, Affine affine);

}  // namespace sdc
