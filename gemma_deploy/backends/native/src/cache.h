// Where a pass finds keys and values, and how sequences keep them: in pages of kPage positions that they may share.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "adapter.h"
#include "plan.h"

namespace gemma {

// The keys and values of one text. Who computes rows asks for pages, and does not see how they are kept.
class Cache {
 public:
  virtual ~Cache() = default;

  int length() const { return length_; }

  // What its tokens are computed with beside the model; null: nothing. Keys and values belong to it.
  const Adapter* adapter() const { return adapter_.get(); }
  void Adapt(std::shared_ptr<const Adapter> adapter) { adapter_ = std::move(adapter); }

  // Positions index * kPage and on of one KV head. A layer that reads another's keys and values gets that one's.
  virtual Page PageOf(int layer, int kv_head, int index) = 0;
  // So many positions more are written.
  virtual void Advance(int count) { length_ += count; }

 protected:
  int length_ = 0;
  std::shared_ptr<const Adapter> adapter_;
};

// The first position that a query sees, behind a window of that many positions, itself included; 0: it sees all.
inline int FirstSeen(int window, int position) {
  const int first = window == 0 ? 0 : position - window + 1;
  return first < 0 ? 0 : first;
}

// Layers with the same window keep and give back positions together: their keys and values of kPage positions are one
// page of memory. Within it each layer has a part for each KV head (layout.h).
struct CacheKind {
  int window;    // 0: all positions are kept
  size_t bytes;  // of a page
};

struct CachePlace {
  int kind;       // of `CacheLayout::kinds`
  size_t offset;  // in a page, of the layer's first KV head
  int head_dim;
};

struct CacheLayout {
  std::vector<CacheKind> kinds;
  std::vector<CachePlace> layers;  // a layer that reads another's has that one's place

  int32_t form;  // of all pages

  CacheLayout(const std::vector<LayerPlan>& layers, int32_t form);
};

// Memory for pages, not more than a limit. Its pages hold finite numbers from the beginning.
class PagePool {
 public:
  struct Block {
    uint8_t* data;
    int kind;
    int users;
  };

  PagePool(const CacheLayout& layout, uint64_t limit) : kinds_(layout.kinds), free_(kinds_.size()), limit_(limit) {}
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // A page with one user; null where there is no memory left under the limit.
  Block* Take(int kind);
  void Release(Block* block);
  uint64_t used() const { return used_; }

 private:
  std::vector<CacheKind> kinds_;
  std::vector<std::vector<Block*>> free_;
  std::vector<std::unique_ptr<Block>> all_;
  std::vector<Block*> empty_;  // of these, without memory
  uint64_t limit_, used_ = 0, reserved_ = 0;
};

// A text in pages of a pool.
class Sequence : public Cache {
 public:
  Sequence(const CacheLayout& layout, PagePool* pool);
  ~Sequence() override;
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  Page PageOf(int layer, int kv_head, int index) override {
    const CachePlace& place = layout_->layers[layer];
    const size_t at = place.offset + kv_head * PageBytes(layout_->form, place.head_dim);
    return PageAt(pages_[place.kind][index]->data + at, layout_->form, place.head_dim);
  }

  // Makes room for `count` more positions; false, and nothing is changed, where the pool has none.
  bool Reserve(int count);
  // Gives back what no later query sees.
  void Advance(int count) override;
  // Forgets what comes after `length` positions; false where a window no longer has what it would see there.
  bool Rewind(int length);
  // A sequence with the same positions. Pages are shared until one of both writes.
  std::unique_ptr<Sequence> Fork() const;

 private:
  void Drop(int kind, size_t index);

  const CacheLayout* layout_;
  PagePool* pool_;
  std::vector<std::vector<PagePool::Block*>> pages_;  // by kind and position / kPage; null: given back
};

}  // namespace gemma
