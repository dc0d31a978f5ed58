// Caches in memory of somebody else's: two buffers for each layer, as inference runtimes pass them from step to step.
#pragma once

#include <vector>

#include "array.h"
#include "cache.h"

namespace gemma {

// Keys and values of a layer are a buffer each, [KV heads][room][head_dim] in bfloat16. Page p of head h lies in it
// from position h * room + p * kPage on. Positions behind the last whole page of a head, where room is no multiple of
// kPage, are too few for a page: they are packed (flat_cache.cpp), and a page of this cache's own stands for them while
// rows are computed.
//
// Windows are not made use of: all positions are kept, and a text can go back to any length.
class FlatCache : public Cache {
 public:
  // What was there before, and where it is wanted after. Both may be the same memory.
  struct Buffer {
    const uint8_t* past;
    uint8_t* present;
  };

  explicit FlatCache(const std::vector<LayerPlan>& layers);

  // Layers that have keys and values of their own, in their order.
  int own() const { return static_cast<int>(own_.size()); }
  int kv_heads(int own) const { return own_[own].kv_heads; }
  int head_dim(int own) const { return own_[own].head_dim; }

  void Put(int own, size_t room, Buffer keys, Buffer values);
  // Behind `start` positions that are there, `count` will be written; all buffers are put, and have room for them.
  void Begin(int start, int count);

  Page PageOf(int layer, int kv_head, int index) override;
  void Advance(int count) override;

 private:
  struct Own {
    int kv_heads, head_dim;
    size_t room;
    Buffer halves[2];     // keys, values
    Array<uint8_t> tail;  // for each KV head a page: keys, values

    size_t whole() const { return room / kPage; }
    size_t page_bytes() const { return HalfPageBytes(kBFloat16, head_dim); }
    // Where a head's positions from the page `index` on begin, in bytes.
    size_t At(int kv_head, size_t index) const;
    uint8_t* Tail(int kv_head, int half);
  };

  std::vector<Own> own_;
  std::vector<int> own_of_layer_;
};

}  // namespace gemma
