// One step of a model: rows of several sequences go through all layers together.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "array.h"
#include "cache.h"
#include "levels.h"
#include "plan.h"
#include "pool.h"
#include "ranking.h"
#include "screening.h"

namespace gemma {

struct Buffers;
struct Token;

// Some tokens that follow a text, and which of their logits are wanted.
struct Piece {
  Cache* cache;
  const int32_t* tokens;
  int count;
  int wanted;  // of the last tokens, so many
};

class Model {
 public:
  // `parameters` are the `bytes` of a parameter file, there as long as the model is; `cache_form`: -1 for the plan's own.
  // Raises Error.
  Model(const std::string& plan, const uint8_t* parameters, uint64_t bytes, const Kernels& level, int threads,
        uint64_t cache_bytes, int32_t cache_form, bool exact);
  ~Model();

  const Plan& plan() const { return plan_; }
  const CacheLayout& layout() const { return layout_; }
  PagePool* pages() { return &pages_; }
  const Kernels& level() const { return level_; }
  int threads() const { return pool_.size(); }
  PoolCounts counts() const { return pool_.counts(); }
  ScreenCounts screened() const;
  // Whether codes are computed with in float32, nothing rounded: for a proof, not for speed.
  bool exact() const { return exact_; }

  // Computes the tokens of all pieces; no cache is there twice, and each has room (Sequence::Reserve). What leaves
  // the final norm, of the wanted tokens in their order, goes to `normed` [wanted, hidden], and their logits to `logits`
  // [wanted, stride]; either may be null.
  void Step(const std::vector<Piece>& pieces, float* normed, float* logits);

  // Logits [rows, stride] of what left the final norm, [rows, hidden].
  void Head(const float* normed, int rows, float* logits);

  // As Head; of logits, which nobody gets, what is asked for.
  void Rank(const float* normed, int rows, const Ranks& ranks);

  // Of logits [rows, stride], what is asked for.
  void RankLogits(const float* logits, int rows, const Ranks& ranks);

  // Numbers between two rows of logits.
  size_t stride() const { return static_cast<size_t>(plan_.head.rows); }

 private:
  void One(const std::vector<Token>& tokens, const std::vector<int>& wanted, float* normed, float* logits);

  Plan plan_;
  CacheLayout layout_;
  PagePool pages_;
  const Kernels& level_;
  Pool pool_;
  std::unique_ptr<Buffers> buffers_;
  Array<float> normed_, logits_;
  Ranking ranking_;
  int rows_;  // that go through together at most
  bool exact_;
};

}  // namespace gemma
