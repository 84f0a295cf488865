// Working memory that a thread keeps from call to call.
#include <cstdlib>

#include "ops.h"

namespace quamba {
namespace {

struct Buffer {
    void *data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(data); }
};

thread_local Buffer buffer;

}  // namespace

void *scratch(int64_t bytes) {
    if (bytes > buffer.bytes) {
        const int64_t rounded = (bytes + 4095) / 4096 * 4096;
        std::free(buffer.data);
        buffer.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
        buffer.bytes = buffer.data ? rounded : 0;
    }
    return buffer.data;
}

}  // namespace quamba
