// The functions of one level, made from its vector type. Included by one file a level, compiled with the level's flags.
//
// Everything here and in what it includes has internal linkage: a function that a linker shared between files could
// be the copy that was compiled for a processor with more features.
#pragma once

#include "generic_attention.h"
#include "generic_product.h"
#include "generic_product8.h"
#include "generic_rows.h"
#include "generic_screen.h"
#include "generic_streams.h"

namespace gemma {
namespace {

// Codes by codes of 15 bits or of 8, all else by floats.
template <class Wide, class Narrow>
void ProductOf(const Product& work) {
  const bool narrow = !work.exact && RoundingOf(*work.matrix) > 0;
  return narrow ? Narrow::Run(work) : Wide::Run(work);
}

// V: its vector type; E: the same for activations of 8 bits.
template <class V, class E>
constexpr Kernels TableOf(const char* name) {
  return Kernels{name,
                 Rows<V>::Round,
                 Products8<E>::Round,
                 ProductOf<Products<V>, Products8<E>>,
                 Screens<V>::Run,
                 Screens<V>::Refine,
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
