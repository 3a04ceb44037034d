// Attention with AVX-512 BF16.
//
// The lanes of a vector are 16 queries, so every row of the softmax lives in one lane: its maximum and its sum need no
// reduction across lanes, and a NaN stays in the row that it came from. A block of up to 64 queries goes through the
// keys once, in blocks of 128 (online softmax):
//
//   1. scores[key][query]   = keys · queriesᵀ               vdpbf16ps on pairs of neighbouring features
//   2. reference[query]     the maximum of the first block; raised only where a later score exceeds it by
//                           kHeadroom powers of two, and then sums and outputs so far are scaled down
//   3. probabilities        = 2^(scores · scale · log2(e) − reference), as bf16 pairs of neighbouring keys
//   4. sums[query]          += probabilities                of the rounded ones, so that rounding cancels
//   5. outputs[feature][query] += valuesᵀ · probabilities   vdpbf16ps on pairs of neighbouring keys
//
// and at the end outputs / sums is transposed into [query][feature]. Any reference up to the maximum gives the same
// quotient; one that lags by a few binades costs no accuracy in floating point and saves nearly all of the rescaling.
//
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "softmax_avx512.h"

namespace sdc {
namespace {

/// Keys padded to whole tiles.
int64_t padded(int64_t keys) { return (keys + kRows - 1) / kRows * kRows; }

bool takes(const SdcAttention&) { return true; }

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

/// Packed keys are [padded keys][head_size / 2] pairs; packed values behind them [padded keys / 2][head_size] pairs.
size_t packed_words(const SdcAttention& attention) {
    return static_cast<size_t>(padded(attention.keys) * attention.head_size / 2);
}

size_t packed_bytes(const SdcAttention& attention) {
    return (2 * packed_words(attention) * sizeof(uint32_t) + 63) / 64 * 64;
}

size_t scratch_bytes(const SdcAttention& attention) { return bytes_of_scratch(attention.head_size, 2); }

/// Queries as [pairs of features][16 · vectors]; rows behind the last query are zero.
template <int vectors>
SDC_AVX512 void pack_queries(const SdcTensor& query, const uint16_t* first, int64_t count, int64_t head_size,
                             uint32_t* packed) {
    const int64_t pairs = head_size / 2;
    for (int vector = 0; vector < vectors; ++vector) {
        for (int64_t pair = 0; pair < pairs; pair += kLanes) {
            __m512i rows[kLanes];
            load_query_pairs(query, first, vector * kLanes, count, pair, pairs, rows);
            const int64_t used = std::min<int64_t>(kLanes, pairs - pair);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                if (i < used) _mm512_store_si512(packed + ((pair + i) * vectors + vector) * kLanes, rows[i]);
            }
        }
    }
}

/// A block of keys, as a block of queries sees it.
struct KeyBlock {
    int64_t count;
    int64_t diagonal;  ///< key that the first query sees last, the second one key further on; `count` for no limit
};

/// The queries that may not see a key; all of them if it is padding.
SDC_AVX512_INLINE __mmask16 hidden_lanes(const KeyBlock& block, int64_t key, int vector) {
    return first_lanes(key < block.count ? key - block.diagonal - vector * kLanes : kLanes);
}

/// Step 1. Scores of a block of keys, −∞ where hidden, and their maxima.
template <int vectors>
SDC_AVX512_INLINE void compute_scores(const uint32_t* keys, const KeyBlock& block, int64_t pairs,
                                      const uint32_t* queries, float* scores, __m512 (&maxima)[vectors]) {
    for (int vector = 0; vector < vectors; ++vector) maxima[vector] = _mm512_set1_ps(-kInfinity);
    for (int64_t key = 0; key < padded(block.count); key += kRows) {
        __m512 sums[kRows][vectors] = {};
        multiply<kRows, vectors>(keys + key * pairs, pairs, 1, queries, pairs, sums);
        const bool edge = key + kRows > std::min(block.count, block.diagonal);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
            for (int vector = 0; vector < vectors; ++vector) {
                __m512 score = sums[row][vector];
                if (edge) {
                    const __mmask16 hidden = hidden_lanes(block, key + row, vector);
                    score = _mm512_mask_mov_ps(score, hidden, _mm512_set1_ps(-kInfinity));
                }
                _mm512_store_ps(scores + ((key + row) * vectors + vector) * kLanes, score);
                maxima[vector] = _mm512_max_ps(score, maxima[vector]);  // a NaN leaves the second operand
            }
        }
    }
}

/// Steps 3 and 4.
template <int vectors>
SDC_AVX512_INLINE void compute_probabilities(const float* scores, int64_t pairs, float log2_scale,
                                             uint32_t* probabilities, Softmax<vectors>& softmax) {
    const __m512 scale = _mm512_set1_ps(log2_scale);
    const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
    for (int64_t pair = 0; pair < pairs; ++pair) {
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector) {
            const float* low = scores + (2 * pair * vectors + vector) * kLanes;
            const float* high = low + vectors * kLanes;
            const __m512 reference = softmax.references[vector];
            const __m512i joined = join_pairs(exp2(_mm512_fmsub_ps(_mm512_load_ps(low), scale, reference)),
                                              exp2(_mm512_fmsub_ps(_mm512_load_ps(high), scale, reference)));
            _mm512_store_si512(probabilities + (pair * vectors + vector) * kLanes, joined);
            softmax.sums[vector] =
                _mm512_dpbf16_ps(softmax.sums[vector], reinterpret_cast<__m512bh>(joined), ones);
        }
    }
}

/// Step 5 for `rows` features.
template <int rows, int vectors>
SDC_AVX512_INLINE void add_features(const uint32_t* values, int64_t pairs, int64_t head_size,
                                    const uint32_t* probabilities, bool first, float* outputs) {
    __m512 sums[rows][vectors];
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector) {
            sums[row][vector] =
                first ? _mm512_setzero_ps() : _mm512_load_ps(outputs + (row * vectors + vector) * kLanes);
        }
    }
    multiply<rows, vectors>(values, 1, head_size, probabilities, pairs, sums);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < vectors; ++vector) {
            _mm512_store_ps(outputs + (row * vectors + vector) * kLanes, sums[row][vector]);
        }
    }
}

/// Step 5.
template <int vectors>
SDC_AVX512_INLINE void add_values(const uint32_t* values, int64_t pairs, int64_t head_size,
                                  const uint32_t* probabilities, bool first, float* outputs) {
    int64_t feature = 0;
    for (; feature + kRows <= head_size; feature += kRows) {
        add_features<kRows, vectors>(values + feature, pairs, head_size, probabilities, first,
                                     outputs + feature * vectors * kLanes);
    }
    for (; feature < head_size; feature += 2) {
        add_features<2, vectors>(values + feature, pairs, head_size, probabilities, first,
                                 outputs + feature * vectors * kLanes);
    }
}

/// A block of up to 16 · vectors queries.
template <int vectors>
SDC_AVX512 void attend_block(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_query,
                             const std::byte* packed, std::byte* memory) {
    const int64_t head_size = attention.head_size;
    const int64_t count = std::min(kQueriesPerBlock, attention.queries - first_query);
    const auto* keys = reinterpret_cast<const uint32_t*>(packed);
    const uint32_t* values = keys + packed_words(attention);
    const float log2_scale = attention.scale * kLog2E;
    const Scratch scratch = split_scratch(memory, head_size, 2);
    pack_queries<vectors>(attention.query, row_of(attention.query, batch, head, first_query), count, head_size,
                          scratch.queries);
    Softmax<vectors> softmax = {};
    const int64_t visible =
        attention.causal ? std::min(attention.keys, first_query + count) : attention.keys;
    for (int64_t key = 0; key < visible; key += kKeysPerBlock) {
        const int64_t size = std::min(kKeysPerBlock, visible - key);
        const bool first = key == 0;
        __m512 maxima[vectors];
        compute_scores<vectors>(keys + key * head_size / 2, {size, attention.causal ? first_query - key : size},
                                head_size / 2, scratch.queries, scratch.scores, maxima);
        for (__m512& maximum : maxima) maximum = _mm512_mul_ps(maximum, _mm512_set1_ps(log2_scale));
        raise_references<vectors>(maxima, first, head_size, scratch.outputs, softmax);
        compute_probabilities<vectors>(scratch.scores, padded(size) / 2, log2_scale, scratch.probabilities, softmax);
        add_values<vectors>(values + key / 2 * head_size, padded(size) / 2, head_size, scratch.probabilities, first,
                            scratch.outputs);
    }
    write_outputs<vectors>(attention.output, row_of(attention.output, batch, head, first_query), count, head_size,
                           scratch.outputs, softmax);
}

void attend(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_query, const std::byte* packed,
            std::byte* scratch) {
    constexpr decltype(&attend_block<1>) kernels[] = {attend_block<1>, attend_block<2>, attend_block<3>,
                                                      attend_block<4>};
    const int64_t count = std::min(kQueriesPerBlock, attention.queries - first_query);
    kernels[(count - 1) / kLanes](attention, batch, head, first_query, packed, scratch);
}

/// Two rows of values as pairs; `high` is null for a row of zeros.
SDC_AVX512 void interleave(const uint16_t* low, const uint16_t* high, int64_t size, uint32_t* pairs) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const __mmask16 mask = first_lanes(size - i);
        const __m512i lower = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + i));
        const __m512i upper = high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + i)) : __m512i{};
        _mm512_mask_storeu_epi32(pairs + i, mask, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
    }
}

SDC_AVX512 void pack(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key, std::byte* packed) {
    const int64_t head_size = attention.head_size;
    auto* keys = reinterpret_cast<uint32_t*>(packed);
    uint32_t* values = keys + packed_words(attention);
    const int64_t last = std::min(first_key + kKeysPerChunk, attention.keys);
    const size_t row_bytes = static_cast<size_t>(head_size) * sizeof(uint16_t);
    for (int64_t key = first_key; key < last; ++key) {
        prefetch_row(row_of(attention.key, batch, head, key + kRowsAhead), head_size);
        prefetch_row(row_of(attention.value, batch, head, key), head_size);
        std::memcpy(keys + key * head_size / 2, row_of(attention.key, batch, head, key), row_bytes);
    }
    for (int64_t key = first_key; key < last; key += 2) {
        const uint16_t* high = key + 1 < last ? row_of(attention.value, batch, head, key + 1) : nullptr;
        interleave(row_of(attention.value, batch, head, key), high, head_size, values + key / 2 * head_size);
    }
    if (last < attention.keys) return;
    const int64_t end = padded(attention.keys);
    std::memset(keys + last * head_size / 2, 0, static_cast<size_t>(end - last) * row_bytes);
    const int64_t filled = (last + 1) / 2;
    std::memset(values + filled * head_size, 0, static_cast<size_t>(end / 2 - filled) * 2 * row_bytes);
}

}  // namespace

const Path kAvx512Bf16 = {"AVX512_BF16", takes,         supported, kQueriesPerBlock,
                          packed_bytes,  scratch_bytes, pack,      attend};

}  // namespace sdc
