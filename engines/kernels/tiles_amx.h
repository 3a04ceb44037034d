// The tiles of AMX: registers of 16 rows of 64 bytes, and instructions that multiply two of them.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, ch. 18.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "avx512.h"
#include "tiles.h"

#define SDC_AMX \
    __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")))
#define SDC_AMX_INLINE SDC_AMX __attribute__((always_inline)) inline

namespace sdc {

constexpr int64_t kTileWords = kTileRows * kLanes;  ///< floats, pairs of bf16, or fours of bytes

/// Whether the processor has all that SDC_AMX stands for, and the system lets this process use it.
bool tiles_supported();

/// What stands before a load of tiles is in memory: compilers may not know that the instruction reads it.
SDC_AMX_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

/// Eight tiles of 16 rows of 64 bytes, as long as it lives.
class Tiles {
  public:
    SDC_AMX Tiles() {
        Configuration configuration{};
        configuration.palette = 1;
        std::fill_n(configuration.row_bytes, 8, static_cast<uint16_t>(kTileStride));
        std::fill_n(configuration.rows, 8, static_cast<uint8_t>(kTileRows));
        settle_memory();
        _tile_loadconfig(&configuration);
    }
    SDC_AMX ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    struct Configuration {
        uint8_t palette;
        uint8_t start_row;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Configuration) == 64);
};

}  // namespace sdc
