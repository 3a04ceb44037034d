// Attention with products of 8-bit integers, with AVX-512 VNNI: half of the work of bf16, for an error like that of the
// 8-bit layers around it. Blocks, lanes and steps are those of attention_avx512.cpp; only what is multiplied differs:
//
//   keys           s8, (key − mean) / key scale. The same vector taken off all keys adds the same to all logits of a
//                  query, which the softmax does not see; it takes off what outlier channels have in common.
//   queries        u8, query / query scale + 128
//   1. scores      = key scale · Σ − 128 · key scale · Σ of the key's integers;  vpdpbusd on four features
//   3. probabilities u8, 255 · 2^(logit − maximum of the block): each block of keys has a reference of its own, so
//                  that small probabilities lose less; what it is above or below the query's comes back in step 5
//   4. sums        of the integers, exact
//   5. outputs     += value scale · 2^(maximum of the block − reference) · Σ;  vpdpbusd on four keys
//   values         s8, value / value scale
//
// Scales are the largest magnitude / 127: of each query, of each key, and of each feature in each block of values.
// The mean is that of up to kSampledKeys keys; any vector would do, one near the mean leaves the least magnitudes.
//
// Source: Zhang et al., "SageAttention", arXiv:2410.02367 (mean of keys, scales); its values stay in 16 bits.
#include <immintrin.h>

#include <algorithm>

#include "softmax_avx512.h"

namespace sdc {
namespace {

constexpr int64_t kSampledKeys = 64;
constexpr float kLargest = 127.0F;
constexpr float kLog2Of255 = 7.99435344F;
constexpr float kLeastMagnitude = 1e-30F;  ///< so that rows of zeros have a scale
static_assert(kKeysPerChunk % kKeysPerBlock == 0);

bool takes(const SdcAttention& attention) { return attention.eight_bits && !attention.causal; }

bool supported() { return kAvx512Bf16.supported() && __builtin_cpu_supports("avx512vnni"); }

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

int64_t quads_of(const SdcAttention& attention) { return round_up(attention.head_size, 4) / 4; }

/// Where a head's packed keys and values lie, in words of 32 bits. They consist of blocks of kKeysPerBlock keys.
struct Layout {
    int64_t quads;        ///< of features, the last one padded
    int64_t floats;       ///< one for each feature, padded to whole vectors
    size_t key_means;     ///< [chunks][floats]: each chunk works out the same
    size_t key_scales;    ///< [blocks][keys]
    size_t key_biases;    ///< [blocks][keys]: what is added to scores, −∞ for padding
    size_t value_scales;  ///< [blocks][floats]
    size_t keys;          ///< [blocks][keys][quads]: four features
    size_t values;        ///< [blocks][keys / 4][4 · quads]: four keys
    size_t end;
};

Layout layout_of(const SdcAttention& attention) {
    const int64_t keys = round_up(attention.keys, kKeysPerBlock);
    const int64_t chunks = round_up(attention.keys, kKeysPerChunk) / kKeysPerChunk;
    Layout layout{};
    layout.quads = quads_of(attention);
    layout.floats = round_up(attention.head_size, kLanes);
    layout.key_scales = layout.key_means + static_cast<size_t>(chunks * layout.floats);
    layout.key_biases = layout.key_scales + static_cast<size_t>(keys);
    layout.value_scales = layout.key_biases + static_cast<size_t>(keys);
    layout.keys = layout.value_scales + static_cast<size_t>(keys / kKeysPerBlock * layout.floats);
    layout.values = layout.keys + static_cast<size_t>(keys * layout.quads);
    layout.end = layout.values + static_cast<size_t>(keys * layout.quads);
    return layout;
}

size_t packed_bytes(const SdcAttention& attention) {
    return (layout_of(attention).end * sizeof(uint32_t) + 63) / 64 * 64;
}

size_t scratch_bytes(const SdcAttention& attention) { return bytes_of_scratch(4 * quads_of(attention), 4); }

/// The features `feature` to `feature` + 15 of a row of bf16; 0 behind the last one.
SDC_AVX512_INLINE __m512 load_features(const uint16_t* row, int64_t feature, int64_t head_size) {
    const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(head_size - feature), row + feature);
    return float_from_low(_mm512_cvtepu16_epi32(halves));
}

/// Float's order is that of its bits but for the sign, and NaN is the largest: it is not lost among maxima.
SDC_AVX512_INLINE __m512i larger_magnitude(__m512i largest, __m512 x) {
    return _mm512_max_epi32(largest, reinterpret_cast<__m512i>(_mm512_abs_ps(x)));
}

/// The scale of integers up to kLargest for floats up to a magnitude.
SDC_AVX512_INLINE __m512 scale_of(__m512i largest) {
    const __m512 magnitude = _mm512_max_ps(_mm512_set1_ps(kLeastMagnitude), reinterpret_cast<__m512>(largest));
    return _mm512_mul_ps(magnitude, _mm512_set1_ps(1.0F / kLargest));
}

/// The mean of some of a head's keys, evenly spaced; 0 behind the last feature.
SDC_AVX512 void sample_mean(const SdcAttention& attention, int64_t batch, int64_t head, float* mean) {
    const int64_t count = std::min(attention.keys, kSampledKeys);
    for (int64_t feature = 0; feature < attention.head_size; feature += kLanes) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; ++i) {
            const uint16_t* row = row_of(attention.key, batch, head, i * attention.keys / count);
            sum = _mm512_add_ps(sum, load_features(row, feature, attention.head_size));
        }
        _mm512_store_ps(mean + feature, _mm512_div_ps(sum, _mm512_set1_ps(static_cast<float>(count))));
    }
}

/// One key. Its scale, and the bias that makes up for the 128 in the queries, are written with it.
SDC_AVX512_INLINE void pack_key(const uint16_t* row, const float* mean, int64_t head_size, int64_t quads,
                                uint32_t* packed, float* scale, float* bias) {
    const auto centred = [=](int64_t feature) SDC_AVX512 {
        return _mm512_sub_ps(load_features(row, feature, head_size), _mm512_load_ps(mean + feature));
    };
    __m512i largest = _mm512_setzero_si512();
    for (int64_t feature = 0; feature < head_size; feature += kLanes) {
        largest = larger_magnitude(largest, centred(feature));
    }
    const __m512 step = scale_of(_mm512_set1_epi32(_mm512_reduce_max_epi32(largest)));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0F), step);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t feature = 0; feature < head_size; feature += kLanes) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(centred(feature), inverse));
        sum = _mm512_add_epi32(sum, whole);
        _mm_mask_storeu_epi8(packed + feature / 4, first_lanes(4 * quads - feature), _mm512_cvtsepi32_epi8(whole));
    }
    *scale = _mm512_cvtss_f32(step);
    *bias = -128.0F * *scale * static_cast<float>(_mm512_reduce_add_epi32(sum));
}

/// A block of values, four keys in a word. `poison` is added to the scales.
SDC_AVX512 void pack_values(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key,
                            float poison, uint32_t* packed, float* scales) {
    const int64_t count = std::min(kKeysPerBlock, attention.keys - first_key);
    const int64_t size = attention.head_size;
    const int64_t padded_size = 4 * quads_of(attention);
    for (int64_t feature = 0; feature < size; feature += kLanes) {
        const auto load = [&](int64_t key) SDC_AVX512 {
            return load_features(row_of(attention.value, batch, head, first_key + key), feature, size);
        };
        __m512i largest = _mm512_setzero_si512();
        for (int64_t key = 0; key < count; ++key) largest = larger_magnitude(largest, load(key));
        const __m512 step = scale_of(largest);
        _mm512_store_ps(scales + feature, _mm512_add_ps(step, _mm512_set1_ps(poison)));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0F), step);
        for (int64_t key = 0; key < count; key += 4) {
            __m512i word = _mm512_setzero_si512();
            for (int64_t i = std::min<int64_t>(4, count - key); i-- > 0;) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(key + i), inverse));
                word = _mm512_or_si512(_mm512_slli_epi32(word, 8), low_byte(whole));
            }
            uint32_t* target = packed + key / 4 * padded_size + feature;
            _mm512_mask_storeu_epi32(target, first_lanes(padded_size - feature), word);
        }
    }
}

/// A chunk of keys and values.
SDC_AVX512 void pack(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key, std::byte* packed) {
    const Layout layout = layout_of(attention);
    auto* words = reinterpret_cast<uint32_t*>(packed);
    auto* floats = reinterpret_cast<float*>(packed);
    const int64_t size = attention.head_size;
    float* mean = floats + layout.key_means + first_key / kKeysPerChunk * layout.floats;
    sample_mean(attention, batch, head, mean);
    float* scales = floats + layout.key_scales;
    float* biases = floats + layout.key_biases;
    const int64_t last = std::min(first_key + kKeysPerChunk, attention.keys);
    for (int64_t begin = first_key; begin < last; begin += kKeysPerBlock) {
        const int64_t end = std::min(begin + kKeysPerBlock, last);
        float poison = 0.0F;  // NaN if a key is not finite: integers cannot tell
        for (int64_t key = begin; key < end; ++key) {
            prefetch_row(row_of(attention.key, batch, head, key + kRowsAhead), size);
            prefetch_row(row_of(attention.value, batch, head, key), size);
            pack_key(row_of(attention.key, batch, head, key), mean, size, layout.quads,
                     words + layout.keys + key * layout.quads, scales + key, biases + key);
            poison += 0.0F * scales[key];
        }
        for (int64_t key = end; key < round_up(end, kRows); ++key) {
            std::fill_n(words + layout.keys + key * layout.quads, layout.quads, 0U);
            scales[key] = 0.0F;
            biases[key] = -kInfinity;
        }
        pack_values(attention, batch, head, begin, poison, words + layout.values + begin * layout.quads,
                    floats + layout.value_scales + begin / kKeysPerBlock * layout.floats);
    }
}

/// Queries as [quads][16 · vectors], and what a score of theirs is multiplied with to be a logit in units of log2.
template <int vectors>
SDC_AVX512 void pack_queries(const SdcAttention& attention, const uint16_t* first, int64_t count,
                             const Scratch& scratch, __m512 (&logit_scales)[vectors]) {
    const int64_t pairs = attention.head_size / 2;
    const int64_t quads = quads_of(attention);
    auto* features = reinterpret_cast<__m512i*>(scratch.outputs);  // pairs of them, of one vector at a time
    for (int vector = 0; vector < vectors; ++vector) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t pair = 0; pair < 2 * quads; pair += kLanes) {
            __m512i rows[kLanes];
            load_query_pairs(attention.query, first, vector * kLanes, count, pair, pairs, rows);
            const int64_t used = std::min<int64_t>(kLanes, 2 * quads - pair);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                largest = larger_magnitude(largest, float_from_low(rows[i]));
                largest = larger_magnitude(largest, float_from_high(rows[i]));
                if (i < used) features[pair + i] = rows[i];
            }
        }
        const __m512 step = scale_of(largest);
        logit_scales[vector] = _mm512_mul_ps(step, _mm512_set1_ps(attention.scale * kLog2E));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0F), step);
        const auto quantise = [inverse](__m512 x) SDC_AVX512 {
            return low_byte(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
        };
        for (int64_t quad = 0; quad < quads; ++quad) {
            __m512i word = _mm512_setzero_si512();
            for (int64_t i = 1; i >= 0; --i) {
                const __m512i pair = features[2 * quad + i];
                word = _mm512_or_si512(_mm512_slli_epi32(word, 8), quantise(float_from_high(pair)));
                word = _mm512_or_si512(_mm512_slli_epi32(word, 8), quantise(float_from_low(pair)));
            }
            const __m512i unsigned_bytes = _mm512_xor_si512(word, _mm512_set1_epi8(-128));  // + 128
            _mm512_store_si512(scratch.queries + (quad * vectors + vector) * kLanes, unsigned_bytes);
        }
    }
}

/// Step 1. Scores of a block of keys, and their maxima.
template <int vectors>
SDC_AVX512_INLINE void compute_scores(const uint32_t* keys, const float* scales, const float* biases, int64_t count,
                                      int64_t quads, const Scratch& scratch, __m512 (&maxima)[vectors]) {
    for (int vector = 0; vector < vectors; ++vector) maxima[vector] = _mm512_set1_ps(-kInfinity);
    for (int64_t key = 0; key < count; key += kRows) {
        __m512i sums[kRows][vectors] = {};
        multiply<kRows, vectors>(keys + key * quads, quads, 1, scratch.queries, quads, sums);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            const __m512 scale = _mm512_set1_ps(scales[key + row]);
            const __m512 bias = _mm512_set1_ps(biases[key + row]);
#pragma GCC unroll 4
            for (int vector = 0; vector < vectors; ++vector) {
                const __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row][vector]), scale, bias);
                _mm512_store_ps(scratch.scores + ((key + row) * vectors + vector) * kLanes, score);
                maxima[vector] = _mm512_max_ps(score, maxima[vector]);
            }
        }
    }
}

/// 2^x with a relative error of 1.7e-3, less than half of what u8 resolves at 255; 0 for −∞.
/// Coefficients: the square polynomial of the least maximal relative error on [0, 1] that is exact at both ends.
SDC_AVX512_INLINE __m512 exp2_of_8_bits(__m512 x) {
    const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    const __m512 power = _mm512_fmadd_ps(_mm512_set1_ps(0.33977F), fraction, _mm512_set1_ps(0.66023F));
    return _mm512_scalef_ps(_mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0F)), x);
}

/// Steps 3 and 4. `factors`: 2^(maxima − references).
template <int vectors>
SDC_AVX512_INLINE void compute_probabilities(const Scratch& scratch, int64_t count, const __m512 (&maxima)[vectors],
                                             const __m512 (&logit_scales)[vectors], const __m512 (&factors)[vectors],
                                             Softmax<vectors>& softmax) {
    __m512i sums[vectors] = {};
    __m512 offsets[vectors];
    for (int vector = 0; vector < vectors; ++vector) {
        offsets[vector] = _mm512_sub_ps(maxima[vector], _mm512_set1_ps(kLog2Of255));
    }
    for (int64_t key = 0; key < count; key += 4) {
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector) {
            __m512i rounded[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512 score = _mm512_load_ps(scratch.scores + ((key + i) * vectors + vector) * kLanes);
                rounded[i] = _mm512_cvtps_epi32(
                    exp2_of_8_bits(_mm512_fmsub_ps(score, logit_scales[vector], offsets[vector])));
            }
            const __m512i joined = join_bytes(rounded);
            _mm512_store_si512(scratch.probabilities + (key / 4 * vectors + vector) * kLanes, joined);
            sums[vector] = add_products(sums[vector], _mm512_set1_epi8(1), joined);
        }
    }
    for (int vector = 0; vector < vectors; ++vector) {
        softmax.sums[vector] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[vector]), factors[vector], softmax.sums[vector]);
    }
}

/// Step 5.
template <int vectors>
SDC_AVX512_INLINE void add_values(const uint32_t* values, const float* scales, int64_t count, int64_t quads, bool first,
                                  const __m512 (&factors)[vectors], const Scratch& scratch) {
    for (int64_t feature = 0; feature < 4 * quads; feature += kRows) {
        __m512i sums[kRows][vectors] = {};
        multiply<kRows, vectors>(values + feature, 1, 4 * quads, scratch.probabilities, count / 4, sums);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
            const __m512 scale = _mm512_set1_ps(scales[feature + row]);
#pragma GCC unroll 4
            for (int vector = 0; vector < vectors; ++vector) {
                float* output = scratch.outputs + ((feature + row) * vectors + vector) * kLanes;
                const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(output);
                const __m512 factor = _mm512_mul_ps(scale, factors[vector]);
                _mm512_store_ps(output, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row][vector]), factor, before));
            }
        }
    }
}

/// A block of up to 16 · vectors queries.
template <int vectors>
SDC_AVX512 void attend_block(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_query,
                             const std::byte* packed, std::byte* memory) {
    const Layout layout = layout_of(attention);
    const int64_t quads = layout.quads;
    const int64_t queries = std::min(kQueriesPerBlock, attention.queries - first_query);
    const auto* words = reinterpret_cast<const uint32_t*>(packed);
    const auto* floats = reinterpret_cast<const float*>(packed);
    const Scratch scratch = split_scratch(memory, 4 * quads, 4);
    __m512 logit_scales[vectors];
    pack_queries<vectors>(attention, row_of(attention.query, batch, head, first_query), queries, scratch, logit_scales);
    Softmax<vectors> softmax = {};
    for (int64_t key = 0; key < attention.keys; key += kKeysPerBlock) {
        const int64_t count = round_up(std::min(kKeysPerBlock, attention.keys - key), kRows);
        const bool first = key == 0;
        __m512 maxima[vectors];
        compute_scores<vectors>(words + layout.keys + key * quads, floats + layout.key_scales + key,
                                floats + layout.key_biases + key, count, quads, scratch, maxima);
        for (int vector = 0; vector < vectors; ++vector) {
            maxima[vector] = _mm512_mul_ps(maxima[vector], logit_scales[vector]);
        }
        raise_references<vectors>(maxima, first, 4 * quads, scratch.outputs, softmax);
        __m512 factors[vectors];
        for (int vector = 0; vector < vectors; ++vector) {
            factors[vector] = exp2(_mm512_sub_ps(maxima[vector], softmax.references[vector]));
        }
        compute_probabilities<vectors>(scratch, count, maxima, logit_scales, factors, softmax);
        add_values<vectors>(words + layout.values + key * quads,
                            floats + layout.value_scales + key / kKeysPerBlock * layout.floats, count, quads, first,
                            factors, scratch);
    }
    write_outputs<vectors>(attention.output, row_of(attention.output, batch, head, first_query), queries,
                           attention.head_size, scratch.outputs, softmax);
}

void attend(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_query, const std::byte* packed,
            std::byte* scratch) {
    constexpr decltype(&attend_block<1>) kernels[] = {attend_block<1>, attend_block<2>, attend_block<3>,
                                                      attend_block<4>};
    const int64_t count = std::min(kQueriesPerBlock, attention.queries - first_query);
    kernels[(count - 1) / kLanes](attention, batch, head, first_query, packed, scratch);
}

}  // namespace

const Path kAvx512Int8 = {"AVX512_VNNI", takes,         supported, kQueriesPerBlock,
                          packed_bytes,  scratch_bytes, pack,      attend};

}  // namespace sdc
