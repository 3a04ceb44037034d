// Keys, values and queries on their way to the tiles of attention_amx.cpp.
#include <algorithm>

#include "attention_amx.h"

namespace sdc::amx {
namespace {

constexpr uint16_t kOne = 0x3f80;  ///< as bf16

/// Float's order is that of its bits but for the sign, and NaN is the largest: it is not lost among maxima.
SDC_AMX_INLINE __m512i larger_magnitude(__m512i largest, __m512i pairs) {
    const __m512i low = reinterpret_cast<__m512i>(_mm512_abs_ps(float_from_low(pairs)));
    const __m512i high = reinterpret_cast<__m512i>(_mm512_abs_ps(float_from_high(pairs)));
    return _mm512_max_epi32(largest, _mm512_max_epi32(low, high));
}

/// Two tiles of keys for each step, [pairs of features][16 keys]. The keys of a group are dealt to them by fours, so that
/// packing the integers of both yields probabilities in the keys' order. Behind the last key it is repeated.
SDC_AMX __m512i pack_keys(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key,
                          const Layout& layout, uint32_t* packed) {
    const int64_t pairs = attention.head_size / 2;
    __m512i largest = _mm512_setzero_si512();
    for (int64_t tile = 0; tile < 2; ++tile) {
        const uint16_t* keys[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t key = first_key + lane / 4 * 8 + tile * 4 + lane % 4;
            keys[lane] = row_of(attention.key, batch, head, std::min(key, attention.keys - 1));
        }
        for (int64_t step = 0; step < layout.steps; ++step) {
            const int64_t pair = step * kLanes;
            __m512i rows[kLanes];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes; ++lane) {
                rows[lane] = _mm512_maskz_loadu_epi32(first_lanes(pairs - pair), keys[lane] + 2 * pair);
                largest = larger_magnitude(largest, rows[lane]);
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int row = 0; row < kLanes; ++row) {
                _mm512_store_si512(packed + (2 * step + tile) * kTileWords + row * kLanes, rows[row]);
            }
        }
    }
    return largest;
}

/// A tile of values for each 16 features, [pairs of keys][16 features].
SDC_AMX void pack_values(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key,
                         const Layout& layout, uint32_t* packed) {
    const int64_t size = attention.head_size;
    const auto load = [&](int64_t key, int64_t tile) SDC_AMX {
        if (key >= attention.keys) return _mm512_setzero_si512();
        const int64_t feature = tile * kLanes;
        const uint16_t* row = row_of(attention.value, batch, head, key);
        const __mmask16 mask = first_lanes(size - feature);
        const __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + feature));
        const __mmask16 behind_last = size / kLanes == tile ? static_cast<__mmask16>(1U << size % kLanes) : __mmask16{0};
        return _mm512_mask_mov_epi32(values, behind_last, _mm512_set1_epi32(kOne));
    };
    for (int64_t row = 0; row < kTileRows; ++row) {
        const int64_t key = first_key + 2 * row;
        for (int64_t tile = 0; tile < layout.value_tiles; ++tile) {
            const __m512i high = _mm512_slli_epi32(load(key + 1, tile), 16);
            _mm512_store_si512(packed + tile * kTileWords + row * kLanes, _mm512_or_si512(load(key, tile), high));
        }
    }
}

}  // namespace

size_t packed_bytes(const SdcAttention& attention) {
    const Layout layout = layout_of(attention);
    return static_cast<size_t>(layout.magnitudes() + blocks(layout.chunks, kLanes) * kLanes) * sizeof(uint32_t);
}

SDC_AMX void pack_chunk(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key, std::byte* packed) {
    const Layout layout = layout_of(attention);
    auto* words = reinterpret_cast<uint32_t*>(packed);
    const int64_t last = std::min(first_key + kKeysPerChunk, attention.keys);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t key = first_key; key < last; key += kKeysPerGroup) {
        uint32_t* group = words + key / kKeysPerGroup * layout.group_words();
        for (int64_t next = key + kKeysPerGroup; next < std::min(key + 2 * kKeysPerGroup, attention.keys); ++next) {
            prefetch_row(row_of(attention.key, batch, head, next), attention.head_size);
            prefetch_row(row_of(attention.value, batch, head, next), attention.head_size);
        }
        largest = _mm512_max_epi32(largest, pack_keys(attention, batch, head, key, layout, group));
        pack_values(attention, batch, head, key, layout, group + layout.values());
    }
    words[layout.magnitudes() + first_key / kKeysPerChunk] = static_cast<uint32_t>(_mm512_reduce_max_epi32(largest));
}

SDC_AMX void pack_queries(const SdcAttention& attention, const uint16_t* first, int64_t count, const Layout& layout,
                          uint32_t* packed, float (&magnitudes)[kQueriesPerBlock]) {
    for (int64_t query = 0; query < kQueriesPerBlock; ++query) {
        __m512i largest = _mm512_setzero_si512();
        const uint16_t* row = first + std::min(query, count - 1) * attention.query.row_stride;
        for (int64_t step = 0; step < layout.steps; ++step) {
            const int64_t pair = step * kLanes;
            const __mmask16 mask = query < count ? first_lanes(attention.head_size / 2 - pair) : __mmask16{0};
            const __m512i pairs = _mm512_maskz_loadu_epi32(mask, row + 2 * pair);
            largest = larger_magnitude(largest, pairs);
            const int64_t tile = 2 * step + query / kTileRows;
            _mm512_store_si512(packed + tile * kTileWords + query % kTileRows * kLanes, pairs);
        }
        magnitudes[query] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
    }
}

}  // namespace sdc::amx
