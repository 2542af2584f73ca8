// Four accumulator tiles, as the products use them: 16 x 16 x 64 multiply-adds an instruction.
#if defined(__AMX_INT8__)
#include <immintrin.h>

#include <cstdint>

#include "core/kernels.h"
#include "ops/amx.h"

namespace pw::amx {
namespace {

// Tiles of 16 x 64 bytes: accumulators 0 to 3, operands 4 to 7.
void load(const void* bytes) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.colsb[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("" : : "r"(&config), "r"(bytes) : "memory");  // the intrinsics do not say what they read
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
}

}  // namespace

int64_t peak_i8(int64_t repeats) {
  alignas(64) int8_t codes[1024];
  for (int i = 0; i < 1024; ++i) codes[i] = int8_t(i % 97 - 48);
  load(codes);
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return repeats * 4 * 16 * 16 * 64;
}

int64_t peak_bf16(int64_t repeats) {
  alignas(64) uint16_t halves[512];
  for (uint16_t& h : halves) h = 0x3f40;  // 0.75
  load(halves);
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return repeats * 4 * 16 * 16 * 32;
}

}  // namespace pw::amx

#endif  // __AMX_INT8__
