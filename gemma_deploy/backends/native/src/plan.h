// What a model is, read from a text beside its parameters, every length checked against the parameter file.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace gemma {

// Something is wrong with what was given: the message says what and where.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file, mapped and only read.
class Mapped {
 public:
  explicit Mapped(const std::string& path);
  ~Mapped();
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
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
};

struct Plan {
  std::deque<std::vector<float>> norms;  // what they multiply by
  int hidden, vocabulary, activation, context;
  float eps, embed_factor, cap;
  Matrix table, head;
  const float* final_norm;
  std::vector<LayerPlan> layers;
};

// Reads a plan; `text` is its `size` bytes.
//
// A plan is lines of a word and `key=value` pairs. `model` comes first, then `matrix` and `vector`, each with a name and
// its place in the parameter file (a vector's size is padded to a multiple of 16), then one `layer` for each in the model's order, which refers to them by their names.
//
// Raises Error, with the line's number.
Plan ReadPlan(const char* text, size_t size, const uint8_t* data, uint64_t bytes);

}  // namespace gemma
