// What the C interfaces of the kernels share: memory of a thread, and how work is cut into blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sdc {

/// How many blocks cover so many elements; the last one may have fewer.
inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/// Memory of one thread that grows and is kept, so that calls after the first one allocate nothing.
class Workspace {
  public:
    /// At least that many bytes, aligned to a cache line. What they held before is lost when they grow.
    std::byte* reserve(size_t bytes) {
        if (bytes > size_) {
            size_ = 0;
            const size_t rounded = (bytes + 63) / 64 * 64;
            memory_.reset(static_cast<std::byte*>(std::aligned_alloc(64, rounded)));
            if (!memory_) throw std::bad_alloc();
            size_ = rounded;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(std::byte* memory) const { std::free(memory); }
    };
    std::unique_ptr<std::byte, Free> memory_;
    size_t size_ = 0;
};

}  // namespace sdc
