#pragma once

#include <atomic>
#include <cstdint>

namespace pw {

// Whether the processor has instructions for it.
bool can_sha256();
// The digest, 32 bytes, of `count` buffers one behind the other; nothing where there are no instructions for it,
// or soon after `stop`.
void sha256(int count, const void* const* data, const int64_t* sizes, uint8_t* digest, const std::atomic<bool>& stop);

}  // namespace pw
