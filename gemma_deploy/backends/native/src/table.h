// The functions of one level, made from its vector type. Included by one file a level, compiled with the level's flags.
//
// Everything here and in what it includes has internal linkage: a function that a linker shared between files could
// be the copy that was compiled for a processor with more features.
#pragma once

#include "generic_attention.h"
#include "generic_product.h"
#include "generic_rows.h"
#include "generic_streams.h"

namespace gemma {
namespace {

template <class V>
constexpr Kernels TableOf(const char* name) {
  return Kernels{name,
                 Rows<V>::Round,
                 Products<V>::Run,
                 Products<V>::ReadRow,
                 Rows<V>::RmsNorm,
                 Rows<V>::AddRmsNorm,
                 Rows<V>::Gated,
                 Rows<V>::Rotate,
                 Attentions<V>::StoreKey,
                 Attentions<V>::StoreValue,
                 Attentions<V>::Attend,
                 Attentions<V>::Combine,
                 Rows<V>::SoftCap,
                 Streams<V>::Mix,
                 Streams<V>::Correct,
                 Streams<V>::Cutoff,
                 Streams<V>::Cut,
                 Rows<V>::Largest,
                 Rows<V>::SumExp};
}

}  // namespace
}  // namespace gemma
