// Low-rank matrices that the tokens of a text are computed with beside a model's own (LoRA): y += up (down x).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "array.h"
#include "plan.h"

namespace gemma {

// The matrices of a layer that may have such beside them.
enum Linear : int { kQ, kK, kV, kO, kGate, kUp, kDown, kLinears };

struct LowRank {
  int rank;         // padded to a multiple of 16; 0: there is nothing beside the matrix
  Matrix down, up;  // [rank, inputs], [outputs, rank], of floats
};

class Adapter {
 public:
  // Reads what `text` says, its `size` bytes; matrices are copied from the `bytes` of `data`. Each line is
  //   adapts layer=0 linear=q form=float32 rank=16 down=0 up=40960
  // with linear one of q, k, v, o, gate, up, down, form float32 or bfloat16, a rank that is a multiple of 16, and two
  // places in `data`, multiples of 64, where panels lie (layout.h): `down` of inputs padded to a multiple of 64, `up` of
  // the rank. How many there are follows from the plan. Raises Error.
  Adapter(const char* text, size_t size, const uint8_t* data, uint64_t bytes, const Plan& plan);

  const LowRank& at(int layer, int linear) const { return all_[static_cast<size_t>(layer) * kLinears + linear]; }
  int most_rank() const { return most_rank_; }

 private:
  Array<uint8_t> data_;
  std::vector<LowRank> all_;
  int most_rank_ = 0;
};

}  // namespace gemma
