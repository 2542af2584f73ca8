#pragma once

#include <cstdint>

namespace pw {

// CRC-32 (IEEE 802.3, as in zlib) of what came before (its CRC; 0 for nothing) and `size` bytes more.
uint32_t crc32(uint32_t crc, const void* data, int64_t size);

}  // namespace pw
