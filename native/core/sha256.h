#pragma once

#include <cstdint>

namespace pw {

// The digest, 32 bytes, of `count` buffers one behind the other. False where the processor has no instructions for it.
bool sha256(int count, const void* const* data, const int64_t* sizes, uint8_t* digest);

}  // namespace pw
