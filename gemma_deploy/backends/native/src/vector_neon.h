// Sixteen lanes in four registers: ARMv8.2 with dot products of bytes.
#pragma once

#include <arm_neon.h>

#include "layout.h"

namespace gemma {
namespace {

struct NeonDot {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };
  // Weights as signed bytes, code - 128 of the file or code - 8.
  struct B {
    int8x16_t v[4];
  };
  // Four inputs' codes in every lane: high and low bytes.
  struct X {
    int8x16_t high, low;
  };
  static constexpr int kRows = 2, kPanels = 1;
  static constexpr bool kCentred = true, kHalves = false;
  static constexpr int kQueries = 4, kColumns = 1;

  template <class Op>
  static F Each(Op op) {
    return F{{op(0), op(1), op(2), op(3)}};
  }
  static F Set(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return F{{all, all, all, all}};
  }
  static F Load(const float* p) {
    return Each([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void Store(float* p, F a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static F Add(F a, F b) {
    return Each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static F Sub(F a, F b) {
    return Each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static F Mul(F a, F b) {
    return Each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static F Div(F a, F b) {
    return Each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static F Fma(F a, F b, F c) {
    return Each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static F Max(F a, F b) {
    return Each([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
  }
  static F Min(F a, F b) {
    return Each([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
  }
  static F Abs(F a) {
    return Each([&](int i) { return vabsq_f32(a.v[i]); });
  }
  static F Nearest(F a) {
    return Each([&](int i) { return vrndnq_f32(a.v[i]); });
  }
  static F Scale(F x, F n) {
    return Each([&](int i) {
      const int32x4_t e = vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127));
      return vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(e, 23)));
    });
  }
  static float Sum(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
  }
  static float Largest(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
  }
  static F Within(int first, int last, F a, F b) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return Each([&](int i) {
      const int32x4_t lane = vaddq_s32(vld1q_s32(lanes), vdupq_n_s32(4 * i));
      const uint32x4_t in = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(first)), vcleq_s32(lane, vdupq_n_s32(last)));
      return vbslq_f32(in, a.v[i], b.v[i]);
    });
  }
  static F Float(I a) {
    return Each([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static I SetInt(int32_t x) {
    const int32x4_t all = vdupq_n_s32(x);
    return I{{all, all, all, all}};
  }
  static I Sub(I a, I b) {
    return I{{vsubq_s32(a.v[0], b.v[0]), vsubq_s32(a.v[1], b.v[1]), vsubq_s32(a.v[2], b.v[2]),
              vsubq_s32(a.v[3], b.v[3])}};
  }
  static int32_t SumInt(F x) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 4; i++) sum = vaddq_s32(sum, vcvtnq_s32_f32(x.v[i]));
    return vaddvq_s32(sum);
  }

  // 64 inputs: 64 high bytes and 64 low ones.
  static int8_t* At(int8_t* codes, int k) { return codes + 2 * static_cast<size_t>(k / kBlock) * kBlock + k % kBlock; }
  static int8x16_t Bytes(const int32x4_t (&q)[4]) {
    return vcombine_s8(vmovn_s16(vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]))),
                       vmovn_s16(vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]))));
  }
  static void StoreCodes(int8_t* codes, int k, F x) {
    int32x4_t high[4], low[4];
    for (int i = 0; i < 4; i++) {
      const int32x4_t q = vcvtnq_s32_f32(x.v[i]);
      high[i] = vshrq_n_s32(q, 7);
      low[i] = vandq_s32(q, vdupq_n_s32(127));
    }
    vst1q_s8(At(codes, k), Bytes(high));
    vst1q_s8(At(codes, k) + kBlock, Bytes(low));
  }
  static X Codes(const int8_t* codes, int k) {
    const int8_t* at = At(const_cast<int8_t*>(codes), k);
    int32_t high, low;
    __builtin_memcpy(&high, at, 4);
    __builtin_memcpy(&low, at + kBlock, 4);
    return X{vreinterpretq_s8_s32(vdupq_n_s32(high)), vreinterpretq_s8_s32(vdupq_n_s32(low))};
  }
  static B LoadBytes(const uint8_t* p) {
    B w;
    for (int i = 0; i < 4; i++) w.v[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(128)));
    return w;
  }
  static void LoadNibbles(const uint8_t* p, B& low, B& high) {
    for (int i = 0; i < 4; i++) {
      const uint8x16_t both = vld1q_u8(p + 16 * i);
      low.v[i] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), vdupq_n_s8(8));
      high.v[i] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), vdupq_n_s8(8));
    }
  }
  struct Acc {
    int32x4_t high[4], low[4];
  };
  static Acc Begin() {
    Acc acc;
    for (int i = 0; i < 4; i++) acc.high[i] = acc.low[i] = vdupq_n_s32(0);
    return acc;
  }
  static void Dot(Acc& acc, const B& w, const X& x) {
    for (int i = 0; i < 4; i++) {
      acc.high[i] = vdotq_s32(acc.high[i], w.v[i], x.high);
      acc.low[i] = vdotq_s32(acc.low[i], w.v[i], x.low);
    }
  }
  static I Total(const Acc& acc) {
    I sum;
    for (int i = 0; i < 4; i++) sum.v[i] = vaddq_s32(vshlq_n_s32(acc.high[i], 7), acc.low[i]);
    return sum;
  }

  // Four inputs of a panel's rows: halves of codes, of the inputs k..k + 3 and of those 64 behind them, and bytes.
  using Halves = B;
  using ByteCodes = int8x16_t;
  using ByteAcc = I;
  static void LoadHalves(const uint8_t* p, Halves& low, Halves& high) {
    for (int i = 0; i < 4; i++) {
      const uint8x16_t both = vld1q_u8(p + 16 * i);
      low.v[i] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      high.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
  }
  static ByteCodes FourBytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static ByteAcc BeginBytes() { return SetInt(0); }
  static void DotBytes(ByteAcc& acc, const Halves& w, ByteCodes x) {
    for (int i = 0; i < 4; i++) acc.v[i] = vdotq_s32(acc.v[i], w.v[i], x);
  }
  static I TotalBytes(const ByteAcc& high, const ByteAcc& low) {
    I sum;
    for (int i = 0; i < 4; i++) sum.v[i] = vaddq_s32(vshlq_n_s32(high.v[i], 7), low.v[i]);
    return sum;
  }
  // Adds products of 64 inputs with halves of codes (planes of layout.h): of the first 32, and of the others.
  static void LowDots(const uint8_t* p, const int16_t* x, I& first, I& second) {
    const auto eight = [](int32x4_t& to, uint8x8_t w, const int16_t* at) {
      const int16x8_t codes = vreinterpretq_s16_u16(vmovl_u8(w)), with = vld1q_s16(at);
      to = vmlal_s16(to, vget_low_s16(codes), vget_low_s16(with));
      to = vmlal_s16(to, vget_high_s16(codes), vget_high_s16(with));
    };
    for (int i = 0; i < 4; i++) {
      const uint8x8_t both = vld1_u8(p + 8 * i);
      eight(first.v[i], vand_u8(both, vdup_n_u8(15)), x + 8 * i);
      eight(second.v[i], vshr_n_u8(both, 4), x + 32 + 8 * i);
    }
  }

  static F LoadHalf(const uint8_t* p) {
    return Each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
  }
  static F LoadBfloat(const uint8_t* p) {
    return Each([&](int i) {
      return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)), 16));
    });
  }
  static uint32x4_t Pairs(const uint8_t* p, int i) { return vreinterpretq_u32_u8(vld1q_u8(p + 16 * i)); }
  static F First(const uint8_t* p) {
    return Each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(Pairs(p, i), 16)); });
  }
  static F Second(const uint8_t* p) {
    return Each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(Pairs(p, i), vdupq_n_u32(0xffff0000u))); });
  }
  static void StoreBfloat(uint16_t* p, F a) {
    for (int i = 0; i < 4; i++) {
      const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
      vst1_u16(p + 4 * i, vmovn_u32(vshrq_n_u32(up, 16)));
    }
  }
  static void Prefetch(const void* p) { __builtin_prefetch(p); }
};

// For activations of 8 bits: one byte each.
struct NeonDotEight : NeonDot {
  using X = int8x16_t;
  struct Acc {
    int32x4_t v[4];
  };
  static void StoreCodes(int8_t* codes, int k, F x) {
    int32x4_t q[4];
    for (int i = 0; i < 4; i++) q[i] = vcvtnq_s32_f32(x.v[i]);
    vst1q_s8(codes + k, Bytes(q));
  }
  static X Codes(const int8_t* codes, int k) {
    int32_t four;
    __builtin_memcpy(&four, codes + k, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Acc Begin(int32_t from) {
    const int32x4_t all = vdupq_n_s32(from);
    return Acc{{all, all, all, all}};
  }
  static void Dot(Acc& acc, const B& w, const X& x) {
    for (int i = 0; i < 4; i++) acc.v[i] = vdotq_s32(acc.v[i], w.v[i], x);
  }
  static I Total(const Acc& acc) { return I{{acc.v[0], acc.v[1], acc.v[2], acc.v[3]}}; }
};

}  // namespace
}  // namespace gemma
