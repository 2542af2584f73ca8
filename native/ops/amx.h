// What all AMX kernels share. For translation units compiled with AMX alone.
#pragma once

#include <cstdint>

namespace pw {
namespace {

struct alignas(64) TileConfig {  // as `ldtilecfg` reads it
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};  // bytes of a row
  uint8_t rows[16] = {};
};

}  // namespace
}  // namespace pw
