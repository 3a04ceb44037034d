// Group normalisation with AVX-512 BF16, on images with channels last.
//
// The lanes of a vector are 16 channels. The image is read twice, for its statistics and to be normalised:
//
//   1. moments     of images, or of the sums of two, which are written then. For each channel in chunks of 128 pixels:
//                  the mean m, and the sum s of squared differences from it. Of differences d from the chunk's first
//                  pixel, both sums stay in registers:
//                      m = first + Σd / n,  s = Σd² − (Σd)² / n
//   2. per group   the mean M = Σ n·m / N and the variance Σ (s + n·(m − M)²) / N over all of its chunks and channels, in
//                  double precision; and from them a factor and an offset for each channel:
//                      factor = weight / √(variance + epsilon),  offset = bias − M · factor
//   3. normalise   v = pixel · factor + offset, and v / (1 + 2^(−v · log2(e))) where there is SiLU
//
// A difference from a neighbour is of the size of the standard deviation, however large the mean is, so that float32 is
// enough in step 1; step 2 subtracts no large numbers from each other. An addend of a channel moves its mean and nothing
// else, so it costs step 2 only, and its sum with the pixels is never rounded.
//
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "avx512.h"
#include "group_norm.h"

namespace sdc {
namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr int kVectors = 8;  ///< channels whose sums are in registers at a time, in vectors
constexpr int64_t kChannelsPerBlock = kVectors * kLanes;

float float_from_bits(uint16_t bits) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(uint32_t{bits} << 16))));
}

SDC_AVX512_INLINE __m512 load_floats(const uint16_t* channels, __mmask16 mask) {
    return float_from_low(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, channels)));
}

SDC_AVX512_INLINE void store_rounded(uint16_t* channels, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(channels, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

/// v / (1 + e^−v). The reciprocal's relative error of 2^−14 is small beside that of bf16.
SDC_AVX512_INLINE __m512 silu(__m512 v) {
    const __m512 power = exp2(_mm512_mul_ps(v, _mm512_set1_ps(-kLog2E)));
    return _mm512_mul_ps(v, _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0F))));
}

/// The channels of a block in a chunk of pixels.
struct Chunk {
    const uint16_t* pixel;  ///< the first one
    int64_t stride;
    int64_t count;
    __mmask16 last_mask;  ///< of the last 16 channels, those that there are
};

/// Moments of `vectors` times 16 channels.
template <int vectors>
SDC_AVX512 void take_moments_of(const Chunk& chunk, float* means, float* squares) {
    const auto mask = [&](int vector) { return vector == vectors - 1 ? chunk.last_mask : __mmask16{0xffff}; };
    const uint16_t* pixel = chunk.pixel;
    __m512 first[vectors];
    __m512 sums[vectors] = {};
    __m512 sums_of_squares[vectors] = {};
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) first[i] = load_floats(pixel + i * kLanes, mask(i));
    for (int64_t row = 1; row < chunk.count; ++row) {
        pixel += chunk.stride;
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i) {
            const __m512 difference = _mm512_sub_ps(load_floats(pixel + i * kLanes, mask(i)), first[i]);
            sums[i] = _mm512_add_ps(sums[i], difference);
            sums_of_squares[i] = _mm512_fmadd_ps(difference, difference, sums_of_squares[i]);
        }
    }
    const __m512 share = _mm512_set1_ps(1.0F / static_cast<float>(chunk.count));
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
        const __m512 mean = _mm512_mul_ps(sums[i], share);
        const __m512 square = _mm512_fnmadd_ps(mean, sums[i], sums_of_squares[i]);
        _mm512_mask_storeu_ps(means + i * kLanes, mask(i), _mm512_add_ps(first[i], mean));
        // Not below zero by rounding; of zero and a NaN, max gives the second.
        _mm512_mask_storeu_ps(squares + i * kLanes, mask(i), _mm512_max_ps(_mm512_setzero_ps(), square));
    }
}

/// Writes sums, and leaves them in the cache for their moments.
SDC_AVX512 void add_summand(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, int64_t pixels) {
    for (int64_t row = first_pixel; row < first_pixel + pixels; ++row) {
        const uint16_t* left = pixel_of(norm.input, batch, row);
        const uint16_t* right = pixel_of(norm.summand, batch, row);
        uint16_t* sum = pixel_of_output(norm.sum, batch, row);
        for (int64_t channel = 0; channel < norm.channels; channel += kLanes) {
            const __mmask16 mask = first_lanes(norm.channels - channel);
            store_rounded(sum + channel, mask,
                          _mm512_add_ps(load_floats(left + channel, mask), load_floats(right + channel, mask)));
        }
    }
}

/// What is normalised, once step 1 is done.
const SdcImages& sums_of(const SdcGroupNorm& norm) { return norm.summand.data ? norm.sum : norm.input; }

template <bool with_silu>
SDC_AVX512 void normalise_pixels(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, int64_t pixels,
                                 Affine affine) {
    for (int64_t row = first_pixel; row < first_pixel + pixels; ++row) {
        const uint16_t* source = pixel_of(sums_of(norm), batch, row);
        uint16_t* target = pixel_of_output(norm.output, batch, row);
        for (int64_t channel = 0; channel < norm.channels; channel += kLanes) {
            const __mmask16 mask = first_lanes(norm.channels - channel);
            const __m512 v = _mm512_fmadd_ps(load_floats(source + channel, mask),
                                             _mm512_maskz_loadu_ps(mask, affine.factors + channel),
                                             _mm512_maskz_loadu_ps(mask, affine.offsets + channel));
            store_rounded(target + channel, mask, with_silu ? silu(v) : v);
        }
    }
}

}  // namespace

bool group_norm_supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

SDC_AVX512 void take_moments(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, Moments row) {
    constexpr decltype(&take_moments_of<1>) kernels[] = {
        take_moments_of<1>, take_moments_of<2>, take_moments_of<3>, take_moments_of<4>,
        take_moments_of<5>, take_moments_of<6>, take_moments_of<7>, take_moments_of<8>};
    static_assert(sizeof(kernels) / sizeof(kernels[0]) == kVectors);
    const int64_t pixels = std::min(kPixelsPerChunk, norm.pixels - first_pixel);
    if (norm.summand.data) add_summand(norm, batch, first_pixel, pixels);
    const SdcImages& images = sums_of(norm);
    for (int64_t channel = 0; channel < norm.channels; channel += kChannelsPerBlock) {
        const int64_t channels = std::min(kChannelsPerBlock, norm.channels - channel);
        const int64_t vectors = (channels + kLanes - 1) / kLanes;
        const Chunk chunk = {pixel_of(images, batch, first_pixel) + channel, images.pixel_stride, pixels,
                             first_lanes(channels - (vectors - 1) * kLanes)};
        kernels[vectors - 1](chunk, row.means + channel, row.squares + channel);
    }
}

void join_moments(const SdcGroupNorm& norm, int64_t batch, int64_t group, Moments moments, Affine affine) {
    const int64_t size = norm.channels / norm.groups;
    const int64_t first = group * size;
    const auto addend = [&](int64_t channel) {
        const auto* addends = static_cast<const uint16_t*>(norm.addend);
        return addends ? double{float_from_bits(addends[batch * norm.addend_batch_stride + channel])} : 0.0;
    };
    const auto for_each = [&](auto&& visit) {  // moments: (channel, pixels, index of its moments)
        for (int64_t pixel = 0, row = 0; pixel < norm.pixels; pixel += kPixelsPerChunk, row += norm.channels) {
            const auto pixels = static_cast<double>(std::min(kPixelsPerChunk, norm.pixels - pixel));
            for (int64_t channel = first; channel < first + size; ++channel) visit(channel, pixels, row + channel);
        }
    };
    const double count = static_cast<double>(size) * static_cast<double>(norm.pixels);
    double sum = 0;
    for_each([&](int64_t channel, double pixels, int64_t index) {
        sum += pixels * (moments.means[index] + addend(channel));
    });
    const double mean = sum / count;
    double squares = 0;
    for_each([&](int64_t channel, double pixels, int64_t index) {
        const double difference = moments.means[index] + addend(channel) - mean;
        squares += moments.squares[index] + pixels * difference * difference;
    });
    const double scale = 1 / std::sqrt(squares / count + norm.epsilon);
    for (int64_t channel = first; channel < first + size; ++channel) {
        const double factor = norm.weight[channel] * scale;
        affine.factors[channel] = static_cast<float>(factor);
        affine.offsets[channel] = static_cast<float>(norm.bias[channel] + (addend(channel) - mean) * factor);
    }
}

void normalise(const SdcGroupNorm& norm, int64_t batch, int64_t first_pixel, int64_t pixels, Affine affine) {
    (norm.silu ? normalise_pixels<true> : normalise_pixels<false>)(norm, batch, first_pixel, pixels, affine);
}

}  // namespace sdc
