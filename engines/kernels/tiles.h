// The size of AMX's tiles.
#pragma once

#include <cstdint>

namespace sdc {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileStride = 64;  ///< bytes from a row to the next one
constexpr int64_t kTileBytes = kTileRows * kTileStride;

}  // namespace sdc
