// Images as the kernels take them.
#pragma once

#include <cstdint>

extern "C" {

/// Images of bf16, [batch, pixels, channels]; strides in elements, that of channels is 1.
struct SdcImages {
    void* data;
    int64_t batch_stride;
    int64_t pixel_stride;
};

/// output = the channels of the left images, then those of the right ones.
struct SdcJoin {
    SdcImages left;
    SdcImages right;
    SdcImages output;
    int64_t batch;
    int64_t pixels;
    int64_t left_channels;
    int64_t right_channels;
};

/// Copies on the threads of the caller's TBB arena. Null, or what went wrong.
const char* sdc_join_channels(const SdcJoin* join);

/// output[2y + a][2x + b] = phases[2a + b][y][x], of images of the same size.
struct SdcInterleave {
    SdcImages phases[4];
    SdcImages output;
    int64_t batch;
    int64_t height;  ///< of a phase
    int64_t width;
    int64_t channels;
};

/// Copies on the threads of the caller's TBB arena. Null, or what went wrong.
const char* sdc_interleave(const SdcInterleave* interleave);

}  // extern "C"

namespace sdc {

inline const uint16_t* pixel_of(const SdcImages& images, int64_t batch, int64_t pixel) {
    return static_cast<const uint16_t*>(images.data) + batch * images.batch_stride + pixel * images.pixel_stride;
}

inline uint16_t* pixel_of_output(const SdcImages& images, int64_t batch, int64_t pixel) {
    return const_cast<uint16_t*>(pixel_of(images, batch, pixel));
}

}  // namespace sdc
