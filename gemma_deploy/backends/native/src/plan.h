// What a model is, read from a text beside its parameters, every length checked against the parameter file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "error.h"
#include "layout.h"
#include "row_table.h"

namespace gemma {

// What a layer adds of a vector that each token has for it: x += norm(projection(activation(gate(x)) * vector)).
struct AddedPlan {
  Matrix gate, projection;
  const float* norm;  // null: it adds nothing
};

// Small MLPs beside a layer's own, of which every token runs through a few (a mixture of experts). With what attention
// has left, r, the layer adds post_mlp_norm(dense_norm(mlp) + post_norm(sum of weight * expert(norm(r)))); weights are
// the softmax of the `chosen` largest of router(router_norm(r)), times `scales`.
struct ExpertsPlan {
  int count;  // 0: there are none
  int chosen, width;
  Matrix router;
  Matrix gate_up, down;  // of all, one below another: [count * 2 * width, hidden] gates first, [count * hidden, width]
  const float* scales;   // [count]
  const float *router_norm, *dense_norm, *norm, *post_norm;
};

// Streams of which a layer computes one (AltUp): what they are of the embeddings, and of the last hidden state.
struct StreamsPlan {
  int count;  // 0: there is one alone
  int active;
  std::vector<Matrix> enter, leave;  // of all streams but the first
};

// How a layer carries streams s along: with r(x) = tanh(router(norm(x))), s_j += sum over i of
// prediction(r(s_active))_ji s_i, then it makes y of s_active, then s_j += (correction(r(y))_j + 1) (y - s_active).
// Small matrices are of float32.
struct AltUpPlan {
  Matrix router, prediction, correction;
  const float* norm;   // null: there is one stream
  const float* scale;  // of what a token's vector meets
};

// A residual beside attention: with a, what attention reads, the stream is
// (x + post_attention_norm(attention(a)) + a + norm(right(left(a)))) / sqrt(2).
struct LaurelPlan {
  int rank;  // 0: there is none
  Matrix left, right;
  const float* norm;
};

struct LayerPlan {
  int heads, kv_heads, head_dim, width;
  int window;    // positions that a query sees, itself included; 0: all
  float factor;  // of the scores
  float cap;     // of the scores; 0: none
  float scalar;  // of the residual stream behind the layer
  int source;    // the layer whose keys and values it reads; itself where it has its own
  bool value_norm;
  Matrix q, k, v, o, gate, up, down;  // no v where values are keys before their norm
  bool has_v;
  // Null where there is none.
  const float *input_norm, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm, *q_norm, *k_norm;
  const float* frequencies;  // [head_dim / 2]
  // Of caches of codes, null for none: channels of keys and values are divided by them, [kv_heads * head_dim]; and what
  // they are multiplied by to that end.
  const float *key_factor, *value_factor, *key_inverse, *value_inverse;
  bool sparse;     // gates below their mean and `quantile` deviations count as nothing, others as what they are more
  float quantile;
  AddedPlan added;
  ExpertsPlan experts;
  AltUpPlan altup;
  LaurelPlan laurel;
};

// The vectors of a token, one of `size` numbers for each layer:
// (norm(projection(embedding) * projection_factor) + row of the table * table_factor) * factor.
// Tokens that the table has no row for have its first one.
struct VectorsPlan {
  int size;  // 0: there are none
  RowTable table;
  Matrix projection;
  const float* norm;  // of one vector
  float table_factor, projection_factor, factor;
};

struct Plan {
  std::deque<std::vector<float>> norms;  // what they multiply by
  int hidden, vocabulary, activation, context;
  float eps, embed_factor, cap;
  int32_t cache_form;  // of keys and values, where nobody says another
  Matrix table, head;
  int candidates;  // of a head in planes: rows that are read whole for a token, at least; else 0
  const float* final_norm;
  const float* columns;  // what rows of the table are multiplied by as they are looked up, in the place of embed_factor
  VectorsPlan vectors;
  StreamsPlan streams;
  std::vector<LayerPlan> layers;
  int first_sharing;  // this layer and all behind it read others' keys and values; as many as there are layers: none
};

// Reads a plan; `text` is its `size` bytes.
//
// A plan is lines of a word and `key=value` pairs. `model` comes first, then `matrix`, `table` and `vector`, each with a
// name and its place in the parameter file (a vector's size is padded to a multiple of 16), then what all layers share
// (`vectors`, `streams`), then `layer` for each in the model's order and behind it what it has beside attention and MLP
// (`adds`, `experts`, `altup`, `laurel`). Those refer to matrices, tables and vectors by their names.
//
// Raises Error, with the line's number.
Plan ReadPlan(const char* text, size_t size, const uint8_t* data, uint64_t bytes);

}  // namespace gemma
