// Sixteen lanes in one register, as Avx512; codes of activations lie as two planes, which tiles read as well.
#pragma once

#include "vector_avx512.h"

namespace gemma {
namespace {

struct Amx512 : Avx512 {
  // Four inputs' codes in every lane: bytes code >> 7, and code & 127.
  struct X {
    __m512i high, low;
  };
  using B = __m512i;  // bytes
  struct Acc {
    __m512i high, low;
  };
  static constexpr int kRows = 6, kPanels = 2;

  static size_t At(int k) { return static_cast<size_t>(k / kBlock) * 2 * kBlock + k % kBlock; }
  static void StoreCodes(int8_t* codes, int k, F x) {
    const __m512i q = _mm512_cvtps_epi32(x);
    int8_t* at = codes + At(k);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(_mm512_srai_epi32(q, 7)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at + kBlock),
                     _mm512_cvtepi32_epi8(_mm512_and_si512(q, _mm512_set1_epi32(127))));
  }
  static X Codes(const int8_t* codes, int k) {
    int32_t high, low;
    __builtin_memcpy(&high, codes + At(k), 4);
    __builtin_memcpy(&low, codes + At(k) + kBlock, 4);
    return X{_mm512_set1_epi32(high), _mm512_set1_epi32(low)};
  }
  static B LoadBytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    const __m512i w = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(w, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
  }
  static Acc Begin() { return Acc{_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static void Dot(Acc& acc, const B& w, const X& x) {
    acc.high = _mm512_dpbusd_epi32(acc.high, w, x.high);
    acc.low = _mm512_dpbusd_epi32(acc.low, w, x.low);
  }
  static I Total(const Acc& acc) { return _mm512_add_epi32(_mm512_slli_epi32(acc.high, 7), acc.low); }
  static I Join(const int32_t* high, const int32_t* low) {
    return Total(Acc{_mm512_loadu_si512(high), _mm512_loadu_si512(low)});
  }
};

}  // namespace
}  // namespace gemma
