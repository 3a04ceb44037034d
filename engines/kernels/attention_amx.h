// How AMX reads what attention is computed of. attention_amx.cpp says what for.
#pragma once

#include "attention.h"
#include "tiles_amx.h"
#include "workspace.h"

namespace sdc::amx {

constexpr int64_t kFeaturesPerStep = 32;
constexpr int64_t kQueriesPerBlock = 2 * kTileRows;
constexpr int64_t kKeysPerGroup = 2 * kTileRows;
static_assert(kKeysPerChunk % kKeysPerGroup == 0);

/// How a head's keys and values are packed: a group of 32 keys is `steps` times two tiles of keys, then a tile of values
/// for each 16 features. Behind the last group, the largest magnitude of each chunk of keys.
struct Layout {
    int64_t groups;
    int64_t steps;        ///< of 32 features of queries and keys, the last one padded
    int64_t value_tiles;  ///< of 16 features of values, one of them all ones
    int64_t chunks;

    int64_t group_words() const { return (2 * steps + value_tiles) * kTileWords; }
    int64_t values() const { return 2 * steps * kTileWords; }
    int64_t magnitudes() const { return groups * group_words(); }
};

inline Layout layout_of(const SdcAttention& attention) {
    return {blocks(attention.keys, kKeysPerGroup), blocks(attention.head_size, kFeaturesPerStep),
            blocks(attention.head_size + 1, kTileRows), blocks(attention.keys, kKeysPerChunk)};
}

/// Bytes of one head's packed keys and values.
size_t packed_bytes(const SdcAttention& attention);

/// Packs the chunk of a head's keys and values from `first_key` on.
void pack_chunk(const SdcAttention& attention, int64_t batch, int64_t head, int64_t first_key, std::byte* packed);

/// Two tiles of queries for each step, [16 queries][pairs of features]; zeros behind the last one. Each query's largest
/// magnitude is written with it.
void pack_queries(const SdcAttention& attention, const uint16_t* first, int64_t count, const Layout& layout,
                  uint32_t* packed, float (&magnitudes)[kQueriesPerBlock]);

}  // namespace sdc::amx
