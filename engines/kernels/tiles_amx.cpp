#include "tiles_amx.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace sdc {
namespace {

/// Asks the system for the tiles' registers, which it saves for processes that use them only.
bool request_tiles() {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM; Linux arch/x86/include/uapi/asm/prctl.h
    constexpr long kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool tiles_supported() {
    static const bool permitted =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("amx-tile") &&
        __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && request_tiles();
    return permitted;
}

}  // namespace sdc
