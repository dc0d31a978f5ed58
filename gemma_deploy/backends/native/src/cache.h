// Keys and values of sequences, in pages of kPage positions that sequences may share.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "plan.h"

namespace gemma {

// Layers with the same window keep and give back positions together: their keys and values of kPage positions are one
// page of memory. Within it each layer has a part for each KV head (layout.h).
struct CacheKind {
  int window;    // 0: all positions are kept
  size_t bytes;  // of a page
};

struct CachePlace {
  int kind;       // of `CacheLayout::kinds`
  size_t offset;  // in a page, of the layer's first KV head
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
  uint64_t limit_, used_ = 0, reserved_ = 0;
};

// One text: how long it is, and the pages that hold it.
class Sequence {
 public:
  Sequence(const CacheLayout& layout, PagePool* pool);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  int length() const { return length_; }

  // Makes room for `count` more positions; false, and nothing is changed, where the pool has none.
  bool Reserve(int count);
  // The positions that Reserve made room for are written. Gives back what no later query sees.
  void Advance(int count);
  // Forgets what comes after `length` positions; false where a window no longer has what it would see there.
  bool Rewind(int length);
  // A sequence with the same positions. Pages are shared until one of both writes.
  std::unique_ptr<Sequence> Fork() const;

  uint8_t* page(int kind, int index) const { return pages_[kind][index]->data; }

 private:
  void Drop(int kind, size_t index);

  const CacheLayout* layout_;
  PagePool* pool_;
  int length_ = 0;
  std::vector<std::vector<PagePool::Block*>> pages_;  // by kind and position / kPage; null: given back
};

}  // namespace gemma
