// Tiles of AMX: eight registers of 16 rows of 64 bytes. A test puts plain C++ in their place (tests/native/tiles.cpp).
//
// Instructions are written out: gcc 12's own functions tell the optimiser of 8 bytes of a configuration's 64, and not that
// loads of tiles read memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma {
namespace {

struct AmxTiles {
  // Between Begin and End this thread has tiles.
  static void Begin() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Configuration configuration;
    static_assert(sizeof(Configuration) == 64, "what the processor reads");
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  static void End() { asm volatile("tilerelease"); }

  template <int Tile>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  // Rows of 64 bytes, `stride` bytes apart.
  template <int Tile>
  static void Load(const void* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  static void Store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
  }
  // Sum[m][n] += over k and j: A[m][4 k + j], signed, times B[k][4 n + j], unsigned; 32 bits.
  template <int Sum, int A, int B>
  static void Multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
  }
};

}  // namespace
}  // namespace gemma
