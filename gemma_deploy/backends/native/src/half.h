// float16 in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gemma {
namespace {

// The number that sixteen bits of IEEE 754's binary16 stand for.
inline float FromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {
    const float x = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -x : x;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | mantissa << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace
}  // namespace gemma
