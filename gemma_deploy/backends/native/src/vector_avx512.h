// Sixteen lanes in one register: AVX-512 F, BW, VL, DQ and VNNI.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace gemma {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  // Four inputs' codes in every lane, 16 bits each: the first and third, the second and fourth.
  struct X {
    __m512i even, odd;
  };
  using B = X;
  static constexpr bool kCentred = false, kHalves = false;
  static constexpr int kRows = 6, kPanels = 4;
  static constexpr int kPackedRows = 12, kFewRows = 4, kMostRows = 16;
  static constexpr int kQueries = 6, kColumns = 2;

  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Abs(F a) { return _mm512_abs_ps(a); }
  static F Nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F Scale(F x, F n) { return _mm512_scalef_ps(x, n); }
  static float Sum(F a) { return _mm512_reduce_add_ps(a); }
  static float Largest(F a) { return _mm512_reduce_max_ps(a); }
  static F Within(int first, int last, F a, F b) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 in = _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(first), _MM_CMPINT_NLT) &
                         _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(last), _MM_CMPINT_LE);
    return _mm512_mask_blend_ps(in, b, a);
  }
  static F Float(I a) { return _mm512_cvtepi32_ps(a); }
  static I SetInt(int32_t x) { return _mm512_set1_epi32(x); }
  static I Sub(I a, I b) { return _mm512_sub_epi32(a, b); }

  // Codes of four inputs: the first, the third, the second, the fourth, 16 bits each.
  static void StoreCodes(int8_t* codes, int k, F x) {
    const __m256i q = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 2 * static_cast<size_t>(k)), _mm256_shuffle_epi8(q, order));
  }
  static int32_t SumInt(F x) { return _mm512_reduce_add_epi32(_mm512_cvtps_epi32(x)); }
  static X Codes(const int8_t* codes, int k) {
    int32_t even, odd;
    __builtin_memcpy(&even, codes + 2 * static_cast<size_t>(k), 4);
    __builtin_memcpy(&odd, codes + 2 * static_cast<size_t>(k) + 4, 4);
    return X{_mm512_set1_epi32(even), _mm512_set1_epi32(odd)};
  }
  // Packs the codes of at most eight rows: of every four inputs 8 bytes of each row behind another, `stride` bytes from those
  // of the four before. `inputs` is a multiple of 32; there are eight pointers.
  static void Pack(const int8_t* const* rows, int count, int inputs, int8_t* to, size_t stride) {
    const __mmask8 some = static_cast<__mmask8>((1 << count) - 1);
    for (int at = 0; at < 2 * inputs; at += 64, to += 8 * stride) {
      const auto load = [&](int r) { return _mm512_loadu_si512(rows[r] + at); };
      // Pairs of rows, of even inputs' groups and of odd ones; then four rows, then all.
      const auto four = [](__m512i a, __m512i b, int8_t* at, size_t step, __m512i c, __m512i d, __mmask8 some) {
        const __m512i x = _mm512_shuffle_i64x2(a, b, 0x88), y = _mm512_shuffle_i64x2(a, b, 0xdd);
        const __m512i z = _mm512_shuffle_i64x2(c, d, 0x88), w = _mm512_shuffle_i64x2(c, d, 0xdd);
        _mm512_mask_storeu_epi64(at, some, _mm512_shuffle_i64x2(x, z, 0x88));
        _mm512_mask_storeu_epi64(at + 2 * step, some, _mm512_shuffle_i64x2(y, w, 0x88));
        _mm512_mask_storeu_epi64(at + 4 * step, some, _mm512_shuffle_i64x2(x, z, 0xdd));
        _mm512_mask_storeu_epi64(at + 6 * step, some, _mm512_shuffle_i64x2(y, w, 0xdd));
      };
      const __m512i a = load(0), b = load(1), c = load(2), d = load(3), e = load(4), f = load(5), g = load(6), h = load(7);
      four(_mm512_unpacklo_epi64(a, b), _mm512_unpacklo_epi64(c, d), to, stride, _mm512_unpacklo_epi64(e, f),
           _mm512_unpacklo_epi64(g, h), some);
      four(_mm512_unpackhi_epi64(a, b), _mm512_unpackhi_epi64(c, d), to + stride, stride, _mm512_unpackhi_epi64(e, f),
           _mm512_unpackhi_epi64(g, h), some);
    }
  }
  static X Packed(const int8_t* p) { return Codes(p, 0); }

  static B Split(__m512i w) { return B{_mm512_and_si512(w, _mm512_set1_epi16(255)), _mm512_srli_epi16(w, 8)}; }
  static B LoadBytes(const uint8_t* p) { return Split(_mm512_loadu_si512(p)); }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    const __m512i w = _mm512_loadu_si512(p), mask = _mm512_set1_epi16(15);
    low = B{_mm512_and_si512(w, mask), _mm512_and_si512(_mm512_srli_epi16(w, 8), mask)};
    high = B{_mm512_and_si512(_mm512_srli_epi16(w, 4), mask), _mm512_srli_epi16(w, 12)};
  }
  using Acc = __m512i;
  static Acc Begin() { return _mm512_setzero_si512(); }
  static Acc Begin(int32_t first) { return _mm512_set1_epi32(first); }
  static void Dot(Acc& acc, const B& w, const X& x) {
    acc = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(acc, w.even, x.even), w.odd, x.odd);
  }
  static I Total(const Acc& acc) { return acc; }
  // Four inputs of sixteen panels' rows: halves of codes, of the inputs k..k + 3 and of those 64 behind them, and bytes.
  using Halves = __m512i;
  using ByteCodes = __m512i;
  using ByteAcc = __m512i;
  static void LoadHalves(const uint8_t* p, Halves& low, Halves& high) {
    const __m512i w = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(w, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
  }
  static ByteCodes FourBytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static ByteAcc BeginBytes() { return _mm512_setzero_si512(); }
  static void DotBytes(ByteAcc& acc, Halves w, ByteCodes x) { acc = _mm512_dpbusd_epi32(acc, w, x); }
  static I TotalBytes(ByteAcc high, ByteAcc low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }
  // Adds products of 64 inputs with halves of codes (planes of layout.h): of the first 32, and of the others.
  static void LowDots(const uint8_t* p, const int16_t* x, I& first, I& second) {
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    first = _mm512_dpwssd_epi32(first, _mm512_and_si512(both, _mm512_set1_epi16(15)), _mm512_loadu_si512(x));
    second = _mm512_dpwssd_epi32(second, _mm512_srli_epi16(both, 4), _mm512_loadu_si512(x + 32));
  }

  static F LoadHalf(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F LoadBfloat(const uint8_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static F First(const uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
  static F Second(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
  }
  static void StoreBfloat(uint16_t* p, F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
  // gcc takes a function that only calls _mm_prefetch for one without effect, and leaves it out.
  static void Prefetch(const void* p) { asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }
};

// For activations of 8 bits: one byte each, four products at once.
struct Avx512Eight : Avx512 {
  static constexpr int kRows = 4;  // of 6 the compiler keeps some sums in memory: half as fast
  using X = __m512i;
  using B = __m512i;
  static void StoreCodes(int8_t* codes, int k, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static X Codes(const int8_t* codes, int k) {
    int32_t four;
    __builtin_memcpy(&four, codes + k, 4);
    return _mm512_set1_epi32(four);
  }
  static B LoadBytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    const __m512i w = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(w, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
  }
  static Acc Begin(int32_t from) { return _mm512_set1_epi32(from); }
  static void Dot(Acc& acc, const B& w, const X& x) { acc = _mm512_dpbusd_epi32(acc, w, x); }
  static I LoadInt(const int32_t* p) { return _mm512_loadu_si512(p); }
};

}  // namespace
}  // namespace gemma
