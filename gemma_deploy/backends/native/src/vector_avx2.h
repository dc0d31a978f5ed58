// Sixteen lanes in two registers: AVX2, FMA and F16C; with VNNI of 256 bits where kVnni.
#pragma once

#include <immintrin.h>

#include "layout.h"

namespace gemma {
namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  // Weights of four inputs in every lane, 16 bits each: the first and third, the second and fourth.
  struct B {
    __m256i even[2], odd[2];
  };
  // Four inputs' codes in every lane, 16 bits each: the first and third, the second and fourth.
  struct X {
    __m256i even, odd;
  };
  // One of both: weights of two inputs in every lane.
  struct H {
    __m256i a, b;
  };
  static constexpr bool kCentred = false, kHalves = true;
  static constexpr int kRows = 4, kPanels = 1;
  static constexpr int kQueries = 4, kColumns = 1;

  static F Set(float x) { return F{_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F Load(const float* p) { return F{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void Store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static F Add(F x, F y) { return F{_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F Sub(F x, F y) { return F{_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F Mul(F x, F y) { return F{_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F Div(F x, F y) { return F{_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F Fma(F x, F y, F z) { return F{_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F Max(F x, F y) { return F{_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F Min(F x, F y) { return F{_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F Abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return F{_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static F Nearest(F x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return F{_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
  }
  static __m256 Power(__m256 n) {  // 2^n, n whole and from -126 to 127
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  static F Scale(F x, F n) { return F{_mm256_mul_ps(x.a, Power(n.a)), _mm256_mul_ps(x.b, Power(n.b))}; }
  static float Sum(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
  }
  static float Largest(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
  }
  static __m256 Mask(__m256i lane, int first, int last) {
    const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                        _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(last)));
    return _mm256_castsi256_ps(out);
  }
  static F Within(int first, int last, F x, F y) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return F{_mm256_blendv_ps(x.a, y.a, Mask(low, first, last)), _mm256_blendv_ps(x.b, y.b, Mask(high, first, last))};
  }
  static F Float(I x) { return F{_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I SetInt(int32_t x) { return I{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I Sub(I x, I y) { return I{_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static int32_t SumInt(F x) {
    const __m256i s = _mm256_add_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  }

  // Codes of four inputs: the first, the third, the second, the fourth, 16 bits each.
  static void StoreCodes(int8_t* codes, int k, F x) {
    __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    q = _mm256_permute4x64_epi64(q, 0xd8);
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 2 * static_cast<size_t>(k)), _mm256_shuffle_epi8(q, order));
  }
  static X Codes(const int8_t* codes, int k) {
    int32_t even, odd;
    __builtin_memcpy(&even, codes + 2 * static_cast<size_t>(k), 4);
    __builtin_memcpy(&odd, codes + 2 * static_cast<size_t>(k) + 4, 4);
    return X{_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
  }

  static __m256i Half256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static B LoadBytes(const uint8_t* p) {
    const __m256i a = Half256(p), b = Half256(p + 32), mask = _mm256_set1_epi16(255);
    return B{{_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)}, {_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)}};
  }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    const __m256i mask = _mm256_set1_epi16(15);
    for (int i = 0; i < 2; i++) {
      const __m256i w = Half256(p + 32 * i);
      low.even[i] = _mm256_and_si256(w, mask);
      low.odd[i] = _mm256_and_si256(_mm256_srli_epi16(w, 8), mask);
      high.even[i] = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
      high.odd[i] = _mm256_srli_epi16(w, 12);
    }
  }
  // Of a byte all (0), the low nibble (1) or the high one (2); of even bytes or odd ones.
  template <int part, int odd>
  static __m256i HalfOf256(const uint8_t* p) {
    const __m256i w = Half256(p);
    if constexpr (part == 0) return odd ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(255));
    constexpr int shift = 8 * odd + 4 * (part == 2);
    if constexpr (shift == 12) return _mm256_srli_epi16(w, 12);
    return _mm256_and_si256(_mm256_srli_epi16(w, shift), _mm256_set1_epi16(15));
  }
  template <int part, int odd>
  static H HalfOf(const uint8_t* p) {
    return H{HalfOf256<part, odd>(p), HalfOf256<part, odd>(p + 32)};
  }
  template <int odd>
  static __m256i HalfCodes(const int8_t* codes, int k) {
    int32_t two;
    __builtin_memcpy(&two, codes + 2 * static_cast<size_t>(k) + 4 * odd, 4);
    return _mm256_set1_epi32(two);
  }
  struct Acc {
    __m256i a, b;
  };
  static Acc Begin() { return Acc{_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  // Pairs of bytes of 0 to 255 times codes of 15 bits fit 32 bits; vpmaddubsw on bytes would saturate.
  static __m256i Pairs(__m256i even, __m256i odd, const X& x) {
    return _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
  }
  static void Dot(Acc& acc, const B& w, const X& x) {
    acc.a = _mm256_add_epi32(acc.a, Pairs(w.even[0], w.odd[0], x));
    acc.b = _mm256_add_epi32(acc.b, Pairs(w.even[1], w.odd[1], x));
  }
  // sum += products of pairs. In one piece: compilers else make all products of a block before they add up any, and that
  // takes more registers than there are.
  static void AddPairs(__m256i& sum, __m256i w, __m256i x) {
    __m256i all = sum, pairs;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(all), "=&x"(pairs) : "x"(w), "x"(x));
    sum = all;
  }
  template <int rows>
  static void DotHalf(Acc& acc, const H& w, __m256i x) {
    AddPairs(acc.a, w.a, x);
    AddPairs(acc.b, w.b, x);
  }
  static I Total(const Acc& acc) { return I{acc.a, acc.b}; }
  // Four inputs of a panel's rows: halves of codes, of the inputs k..k + 3 and of those 64 behind them, and bytes.
  struct Halves {
    __m256i a, b;
  };
  using ByteCodes = __m256i;
  using ByteAcc = I;
  static void LoadHalves(const uint8_t* p, Halves& low, Halves& high) {
    const __m256i a = Half256(p), b = Half256(p + 32), mask = _mm256_set1_epi8(15);
    low = Halves{_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
    high = Halves{_mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
  }
  static ByteCodes FourBytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static ByteAcc BeginBytes() { return SetInt(0); }
  // Two products of at most 15 and 127 do not saturate 16 bits.
  static __m256i Fours(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  }
  static void DotBytes(ByteAcc& acc, const Halves& w, ByteCodes x) {
    acc.a = Fours(acc.a, w.a, x);
    acc.b = Fours(acc.b, w.b, x);
  }
  static I TotalBytes(const ByteAcc& high, const ByteAcc& low) {
    return I{_mm256_add_epi32(_mm256_slli_epi32(high.a, 7), low.a), _mm256_add_epi32(_mm256_slli_epi32(high.b, 7), low.b)};
  }
  // Adds products of 64 inputs with halves of codes (planes of layout.h): of the first 32, and of the others.
  static void LowDots(const uint8_t* p, const int16_t* x, I& first, I& second) {
    const auto sixteen = [&](__m256i to, __m256i w, const int16_t* at) {
      return _mm256_add_epi32(to, _mm256_madd_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
    };
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(halves)), mask = _mm256_set1_epi16(15);
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(halves + 1));
    first.a = sixteen(first.a, _mm256_and_si256(a, mask), x);
    first.b = sixteen(first.b, _mm256_and_si256(b, mask), x + 16);
    second.a = sixteen(second.a, _mm256_srli_epi16(a, 4), x + 32);
    second.b = sixteen(second.b, _mm256_srli_epi16(b, 4), x + 48);
  }

  static F LoadHalf(const uint8_t* p) {
    const __m128i* h = reinterpret_cast<const __m128i*>(p);
    return F{_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
  }
  static __m256 Widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  static F LoadBfloat(const uint8_t* p) {
    const __m128i* h = reinterpret_cast<const __m128i*>(p);
    return F{Widen(_mm_loadu_si128(h)), Widen(_mm_loadu_si128(h + 1))};
  }
  static F First(const uint8_t* p) {
    return F{_mm256_castsi256_ps(_mm256_slli_epi32(Half256(p), 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(Half256(p + 32), 16))};
  }
  static F Second(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi32(-65536);
    return F{_mm256_castsi256_ps(_mm256_and_si256(Half256(p), mask)),
             _mm256_castsi256_ps(_mm256_and_si256(Half256(p + 32), mask))};
  }
  static __m256i Round16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  }
  static void StoreBfloat(uint16_t* p, F x) {
    const __m256i both = _mm256_packus_epi32(Round16(x.a), Round16(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
  }
  static void Prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

// For activations of 8 bits, which lie as those of 15: vpmaddubsw would saturate on weights of 8 bits.
struct Avx2Eight : Avx2 {
  static Acc Begin(int32_t from) { return Acc{_mm256_set1_epi32(from), _mm256_set1_epi32(from)}; }
};

#if defined(__AVXVNNI__)
// The same with products of pairs that are added as they are made.
struct AvxVnni : Avx2 {
  static void Dot(Acc& acc, const B& w, const X& x) {
    acc.a = _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(acc.a, w.even[0], x.even), w.odd[0], x.odd);
    acc.b = _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(acc.b, w.even[1], x.even), w.odd[1], x.odd);
  }
  // A sum takes five cycles here and one in Avx2: of few rows too few are under way.
  template <int rows>
  static void DotHalf(Acc& acc, const H& w, __m256i x) {
    if constexpr (rows < 3) return Avx2::DotHalf<rows>(acc, w, x);
    acc.a = _mm256_dpwssd_avx_epi32(acc.a, w.a, x);
    acc.b = _mm256_dpwssd_avx_epi32(acc.b, w.b, x);
  }
  static void DotBytes(ByteAcc& acc, const Halves& w, ByteCodes x) {
    acc.a = _mm256_dpbusd_avx_epi32(acc.a, w.a, x);
    acc.b = _mm256_dpbusd_avx_epi32(acc.b, w.b, x);
  }
};

// For activations of 8 bits: one byte each, four products at once.
struct AvxVnniEight : Avx2 {
  static constexpr bool kHalves = false;
  using X = __m256i;
  struct B {
    __m256i a, b;
  };
  static void StoreCodes(int8_t* codes, int k, F x) {
    const __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i order = _mm256_permute4x64_epi64(q, 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), bytes);
  }
  static X Codes(const int8_t* codes, int k) {
    int32_t four;
    __builtin_memcpy(&four, codes + k, 4);
    return _mm256_set1_epi32(four);
  }
  static B LoadBytes(const uint8_t* p) { return B{Half256(p), Half256(p + 32)}; }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    const __m256i a = Half256(p), b = Half256(p + 32), mask = _mm256_set1_epi8(15);
    low = B{_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
    high = B{_mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
  }
  static Acc Begin(int32_t from) { return Acc{_mm256_set1_epi32(from), _mm256_set1_epi32(from)}; }
  static void Dot(Acc& acc, const B& w, const X& x) {
    acc.a = _mm256_dpbusd_avx_epi32(acc.a, w.a, x);
    acc.b = _mm256_dpbusd_avx_epi32(acc.b, w.b, x);
  }
};
#endif

}  // namespace
}  // namespace gemma
