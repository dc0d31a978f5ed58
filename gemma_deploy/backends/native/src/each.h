// Loops that are written out by the compiler.
#pragma once

#include <utility>

#define GEMMA_INLINE __attribute__((always_inline))

namespace gemma {
namespace {

template <class F, int... i>
GEMMA_INLINE inline void EachOf(std::integer_sequence<int, i...>, const F& f) {
  (f(std::integral_constant<int, i>()), ...);
}

// f(0), ... f(n - 1), each a constant: arrays that nothing else indexes lie in registers.
template <int n, class F>
GEMMA_INLINE inline void Each(const F& f) {
  EachOf(std::make_integer_sequence<int, n>(), f);
}

}  // namespace
}  // namespace gemma
