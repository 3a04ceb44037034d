// Convolution with AMX, on images with channels last.
//
// A line is 64 bytes: 32 channels of a pixel as bf16, or 64 as bytes. A tile of 16 lines, times one of weights, gives sums
// of 16 pixels and 16 outputs.
//
//   1. pack      Channels are cut into planes of one line for each pixel: [planes][rows][columns][images], with a margin
//                of zeros around rows and columns. So the neighbours of 16 lines are 16 lines too, for any offset in the
//                window, and images share their tiles. Bytes are made of bf16 here.
//   2. convolve  sums[pixel][output] += Σ over the window of lines · weights, of one plane at a time for all pixels of a
//                task, two tiles of pixels by two of outputs. A plane's weights for 32 outputs are 18 KiB for a window
//                of 3 by 3 and stay in the first cache; between planes, sums are in the second.
//
// Weights are packed in the order in which they are read: [32 outputs][plane][window][2 tiles]. While a plane is
// computed, the weights of the next one are fetched. With gates, the second tile is that of the gates of 16 outputs, so
// that both sums are there when they are multiplied.
//
// Bf16 with a window of 1, a product of matrices, needs no margin: tiles are loaded from where the images lie.
//
// Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26 (the error function).
#include <algorithm>

#include "convolution.h"
#include "tiles_amx.h"
#include "workspace.h"

namespace sdc {
namespace {

constexpr int64_t kSets = 64;    ///< of the first cache; lines of equal numbers modulo that push each other out
constexpr int64_t kApart = 34;   ///< lines from two tiles of a plane to those of the next one, modulo kSets
constexpr int64_t kTilesPerTask = 32;       ///< whose sums of 32 outputs take 64 KiB
constexpr int64_t kWeightsInCache = 20480;  ///< bytes, fewer than half of the first cache

/// How many planes are multiplied at a time, so that their weights stay in the first cache: about equal parts of all.
int64_t planes_at_once(int64_t planes, int64_t places) {
    const int64_t most = std::max<int64_t>(1, kWeightsInCache / (places * kPairBytes));
    return blocks(planes, blocks(planes, most));
}

SDC_AVX512_INLINE __m512i line_of_bf16(const uint16_t* channels, int64_t count) {
    const uint32_t lanes = count >= kBf16PerLine ? ~0U : (1U << count) - 1U;
    return _mm512_maskz_loadu_epi16(lanes, channels);
}

SDC_AVX512_INLINE __m512i line_of_bytes(const uint16_t* channels, int64_t count, __m512 factor, __m512 zero_point) {
    __m128i quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __mmask16 lanes = first_lanes(count - i * kLanes);
        const __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, channels + i * kLanes));
        const __m512 scaled = _mm512_fmadd_ps(float_from_low(halves), factor, zero_point);
        // Limited before it is an integer, as large floats are none, and NaN becomes the limit.
        const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(scaled, _mm512_set1_ps(255.0F)));
        quarters[i] = _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
    }
    const __m256i low = _mm256_set_m128i(quarters[1], quarters[0]);
    const __m256i high = _mm256_set_m128i(quarters[3], quarters[2]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

template <bool bytes>
SDC_AVX512 void pack_columns(const SdcConvolution& convolution, const Planes& planes, int64_t row, int64_t first_column,
                             std::byte* packed) {
    const int64_t y = row - convolution.top;
    const bool inside = y >= 0 && y < convolution.height;
    const int64_t last_column = std::min(first_column + kColumnsPerTask, planes.columns);
    const __m512 factor = _mm512_set1_ps(1.0F / convolution.scale);
    const __m512 zero_point = _mm512_set1_ps(convolution.zero_point);
    const __m512i zero = bytes ? _mm512_set1_epi8(static_cast<char>(static_cast<int>(convolution.zero_point)))
                               : _mm512_setzero_si512();
    for (int64_t plane = 0; plane < planes.count; ++plane) {
        std::byte* line =
            packed + (plane * planes.lines + row * planes.pitch + first_column * convolution.batch) * kLine;
        const int64_t channel = plane * channels_per_line(bytes);
        const int64_t count = std::min(channels_per_line(bytes), convolution.channels - channel);
        for (int64_t x = first_column - convolution.left; x < last_column - convolution.left; ++x) {
            const bool is_pixel = inside && x >= 0 && x < convolution.width;
            for (int64_t image = 0; image < convolution.batch; ++image, line += kLine) {
                __m512i values = zero;
                if (is_pixel) {
                    const uint16_t* channels = pixel_of(convolution.input, image, y * convolution.width + x) + channel;
                    values = bytes ? line_of_bytes(channels, count, factor, zero_point) : line_of_bf16(channels, count);
                }
                _mm512_store_si512(line, values);
            }
        }
    }
}

template <bool bytes>
SDC_AMX_INLINE void multiply_tiles(const std::byte* left, const std::byte* right, int64_t line, const std::byte* weights) {
    // Tiles 0 to 3: sums, [2 of pixels][2 of outputs]; 4 and 5: pixels; 6 and 7: weights.
    _tile_loadd(4, left, line);
    _tile_loadd(6, weights, kTileStride);
    _tile_loadd(7, weights + kTileBytes, kTileStride);
    _tile_loadd(5, right, line);
    if constexpr (bytes) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

SDC_AMX_INLINE void load_sums(const std::byte* sums) {
    _tile_loadd(0, sums, kTileStride);
    _tile_loadd(1, sums + kTileBytes, kTileStride);
    _tile_loadd(2, sums + 2 * kTileBytes, kTileStride);
    _tile_loadd(3, sums + 3 * kTileBytes, kTileStride);
}

SDC_AMX_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

SDC_AMX_INLINE void store_sums(std::byte* sums) {
    _tile_stored(0, sums, kTileStride);
    _tile_stored(1, sums + kTileBytes, kTileStride);
    _tile_stored(2, sums + 2 * kTileBytes, kTileStride);
    _tile_stored(3, sums + 3 * kTileBytes, kTileStride);
}

/// Fetches lines from `next` to `end` into the second cache, a few at each call.
class Fetcher {
  public:
    Fetcher(const std::byte* next, int64_t bytes, int64_t calls)
        : next_(next), end_(next + bytes), step_(blocks(bytes / kLine, calls) * kLine) {}

    void fetch() {
        for (const std::byte* stop = std::min(next_ + step_, end_); next_ < stop; next_ += kLine) {
            _mm_prefetch(next_, _MM_HINT_T1);
        }
    }

  private:
    const std::byte *next_, *end_;
    int64_t step_;
};

/// What sums become for 16 outputs, or for their gates.
template <bool bytes>
struct Finish {
    __m512 factors, offsets;
    __m512i shifts;
    __mmask16 lanes;

    /// Args: number of the first output, and where its factor is among all.
    SDC_AVX512 Finish(const SdcConvolution& convolution, int64_t output, int64_t index)
        : lanes(first_lanes(convolution.outputs - output)) {
        factors = _mm512_maskz_loadu_ps(lanes, convolution.factors + index);
        offsets = _mm512_maskz_loadu_ps(lanes, convolution.offsets + index);
        shifts = bytes ? _mm512_maskz_loadu_epi32(lanes, convolution.shifts + index) : _mm512_setzero_si512();
    }

    SDC_AVX512_INLINE __m512 operator()(const std::byte* sums) const {
        const __m512i stored = _mm512_load_si512(sums);
        const __m512 values = bytes ? _mm512_cvtepi32_ps(_mm512_sub_epi32(stored, shifts))
                                    : reinterpret_cast<__m512>(stored);
        return _mm512_fmadd_ps(values, factors, offsets);
    }
};

/// x · Φ(x), where Φ(−|x|) = t · (a1 + t · (a2 + …)) · e^(−x²/2) / 2 for t = 1 / (1 + p · |x| / √2), and Φ(x) = 1 − Φ(−x).
SDC_AVX512_INLINE __m512 gelu(__m512 x) {
    constexpr float kSqrtHalf = 0.707106781F;
    constexpr float kHalfLog2E = 0.721347520F;
    const auto constant = [](float value) SDC_AVX512 { return _mm512_set1_ps(value); };
    const __m512 magnitude = _mm512_abs_ps(x);
    const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(magnitude, constant(0.3275911F * kSqrtHalf), constant(1.0F)));
    __m512 sum = _mm512_fmadd_ps(t, constant(0.5F * 1.061405429F), constant(0.5F * -1.453152027F));
    sum = _mm512_fmadd_ps(sum, t, constant(0.5F * 1.421413741F));
    sum = _mm512_fmadd_ps(sum, t, constant(0.5F * -0.284496736F));
    sum = _mm512_fmadd_ps(sum, t, constant(0.5F * 0.254829592F));
    const __m512 power = exp2(_mm512_mul_ps(_mm512_mul_ps(magnitude, magnitude), constant(-kHalfLog2E)));
    const __m512 below = _mm512_mul_ps(_mm512_mul_ps(sum, t), power);
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(below, positive, constant(1.0F), below));
}

SDC_AVX512_INLINE void store_rounded(uint16_t* outputs, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(outputs, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

/// Writes the pixels of one tile for each of two tiles of outputs, or of outputs and gates.
template <bool bytes, bool gated>
SDC_AVX512 void write_pixels(const SdcConvolution& convolution, const Planes& planes, int64_t tile, int64_t output,
                             const Finish<bytes> (&finish)[2], const std::byte* sums) {
    const int64_t y = tile / planes.tiles_per_row;
    const int64_t first = tile % planes.tiles_per_row * kTileRows;  // lines of a row: pixels, and images of each
    const int64_t count = std::min(kTileRows, convolution.width * convolution.batch - first);
    int64_t x = first / convolution.batch;
    int64_t image = first % convolution.batch;
    for (int64_t row = 0; row < count; ++row) {
        uint16_t* pixel = pixel_of_output(convolution.output, image, y * convolution.width + x) + output;
        const __m512 left = finish[0](sums + row * kTileStride);
        const __m512 right = finish[1](sums + kTileBytes + row * kTileStride);
        if constexpr (gated) {
            store_rounded(pixel, finish[0].lanes, _mm512_mul_ps(left, gelu(right)));
        } else {
            store_rounded(pixel, finish[0].lanes, left);
            store_rounded(pixel + kLanes, finish[1].lanes, right);
        }
        if (++image == convolution.batch) {
            image = 0;
            ++x;
        }
    }
}

template <bool bytes, bool gated>
SDC_AMX void convolve(const SdcConvolution& convolution, const Planes& planes, int64_t task, int64_t first_tile,
                      const std::byte* packed, std::byte* sums) {
    const Tiles tiles;
    const int64_t places = convolution.window * convolution.window;
    const int64_t step = planes_at_once(planes.count, places);
    const int64_t count = std::min(planes.tiles_per_task, planes.tiles - first_tile);
    const int64_t plane_weights = places * kPairBytes;
    const std::byte* weights =
        static_cast<const std::byte*>(convolution.filter) + task * planes.count * plane_weights;
    const int64_t first_output = task * outputs_per_task(gated);
    const int64_t second_output = first_output + (gated ? 0 : kLanes);
    const Finish<bytes> finish[2] = {{convolution, first_output, first_output},
                                     {convolution, second_output, second_output + (gated ? convolution.outputs : 0)}};
    const auto* source = planes.are_images ? static_cast<const std::byte*>(convolution.input.data) : packed;
    const int64_t line_bytes = planes.are_images ? convolution.input.pixel_stride * kBf16Bytes : kLine;
    const int64_t plane_bytes = planes.are_images ? kLine : planes.lines * kLine;
    const auto lines_of = [&](int64_t plane, int64_t tile) {
        return source + plane * plane_bytes + (tile / planes.tiles_per_row * planes.pitch +
                         tile % planes.tiles_per_row * kTileRows) * line_bytes;
    };
    for (int64_t first = 0; first < planes.count; first += step) {
        const int64_t last = std::min(first + step, planes.count);
        const int64_t next = std::min(last + step, planes.count);
        Fetcher fetcher(weights + last * plane_weights, (next - last) * plane_weights,
                        blocks(count, 2) * (last - first) * places);
        for (int64_t index = 0; index < count; index += 2) {
            const int64_t tile = first_tile + index;
            const int64_t other = index + 1 < count ? tile + 1 : tile;
            std::byte* pair_sums = sums + index * kPairBytes;
            first == 0 ? zero_sums() : load_sums(pair_sums);
            const std::byte* place_weights = weights + first * plane_weights;
            for (int64_t plane = first; plane < last; ++plane) {
                const std::byte* left = lines_of(plane, tile);
                const std::byte* right = lines_of(plane, other);
                for (int64_t y = 0; y < convolution.window; ++y) {
                    for (int64_t x = 0; x < convolution.window; ++x) {
                        const int64_t offset = (y * planes.pitch + x * convolution.batch) * line_bytes;
                        multiply_tiles<bytes>(left + offset, right + offset, line_bytes, place_weights);
                        place_weights += kPairBytes;
                        fetcher.fetch();
                    }
                }
            }
            store_sums(pair_sums);
            settle_memory();
            if (last < planes.count) continue;
            write_pixels<bytes, gated>(convolution, planes, tile, first_output, finish, pair_sums);
            if (other != tile) {
                write_pixels<bytes, gated>(convolution, planes, other, first_output, finish, pair_sums + kPairBytes);
            }
        }
    }
}

}  // namespace

size_t Planes::bytes() const { return static_cast<size_t>((count * lines + kTileRows) * kLine); }

size_t Planes::sums_bytes() const { return static_cast<size_t>((tiles_per_task + 1) * kPairBytes); }

Planes planes_of(const SdcConvolution& convolution) {
    Planes planes{};
    planes.columns = convolution.width + convolution.window - 1;
    planes.pitch = planes.columns * convolution.batch;
    planes.rows = convolution.height + convolution.window - 1;
    planes.lines = blocks(planes.rows * planes.pitch, kSets) * kSets + kApart;
    planes.count = blocks(convolution.channels, channels_per_line(convolution.bytes));
    planes.tiles_per_row = blocks(convolution.width * convolution.batch, kTileRows);
    planes.are_images = convolution.window == 1 && !convolution.bytes && convolution.batch == 1 &&
                        convolution.width % kTileRows == 0 && convolution.channels % kBf16PerLine == 0;
    planes.tiles = planes.tiles_per_row * convolution.height;
    planes.tiles_per_task = kTilesPerTask;
    return planes;
}

void pack_columns(const SdcConvolution& convolution, const Planes& planes, int64_t row, int64_t first_column,
                  std::byte* packed) {
    const auto pack = convolution.bytes ? pack_columns<true> : pack_columns<false>;
    pack(convolution, planes, row, first_column, packed);
}

void convolve(const SdcConvolution& convolution, const Planes& planes, int64_t task, int64_t first_tile,
              const std::byte* packed, std::byte* sums) {
    const auto compute = convolution.gated ? convolution.bytes ? convolve<true, true> : convolve<false, true>
                         : convolution.bytes ? convolve<true, false>
                                             : convolve<false, false>;
    compute(convolution, planes, task, first_tile, packed, sums);
}

}  // namespace sdc
