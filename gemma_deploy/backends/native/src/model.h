// One step of a model: rows of several sequences go through all layers together.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cache.h"
#include "levels.h"
#include "plan.h"
#include "pool.h"

namespace gemma {

struct Buffers;
struct Token;

// Some tokens that follow a sequence, and which of their logits are wanted.
struct Piece {
  Sequence* sequence;
  const int32_t* tokens;
  int count;
  int wanted;  // of the last tokens, so many
};

class Model {
 public:
  // Raises Error.
  Model(const std::string& plan, const std::string& parameters, const Kernels& level, int threads,
        uint64_t cache_bytes, int32_t cache_form);
  ~Model();

  const Plan& plan() const { return plan_; }
  const CacheLayout& layout() const { return layout_; }
  PagePool* pages() { return &pages_; }
  const Kernels& level() const { return level_; }
  int threads() const { return pool_.size(); }

  // Computes the tokens of all pieces; no sequence is there twice, and each has room (Sequence::Reserve). Logits of the
  // wanted tokens, in their order, go to `logits` [wanted, stride].
  void Step(const std::vector<Piece>& pieces, float* logits);

  // Numbers between two rows of logits.
  size_t stride() const { return static_cast<size_t>(plan_.head.rows); }

 private:
  void One(const std::vector<Token>& tokens, const std::vector<int>& wanted, float* logits);

  Mapped file_;
  Plan plan_;
  CacheLayout layout_;
  PagePool pages_;
  const Kernels& level_;
  Pool pool_;
  std::unique_ptr<Buffers> buffers_;
  int rows_;  // that go through together at most
};

}  // namespace gemma
