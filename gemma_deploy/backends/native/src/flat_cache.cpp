#include "flat_cache.h"

#include <algorithm>
#include <cstring>

namespace gemma {
namespace {

constexpr size_t kNumber = 2;  // bytes of a bfloat16
constexpr size_t kBlockPositions = 16;

size_t PagesOf(size_t positions) { return (positions + kPage - 1) / kPage; }

// How `n` positions, fewer than kPage, are packed: f(number in the page, number in the packed buffer, how many) for all
// stretches that lie together in both. Numbers keep the order that they have in the page (layout.h), without those of
// other positions; of a last pair of positions whose second is missing, the first comes behind all others.
template <class F>
void KeyRuns(size_t n, size_t head_dim, const F& f) {
  const size_t blocks = n / kBlockPositions, rest = n % kBlockPositions, done = blocks * kBlockPositions * head_dim;
  f(size_t{0}, size_t{0}, done);
  if (rest == 0) return;
  for (size_t pair = 0; pair < head_dim / 2; pair++)
    f(done + pair * kBlockPositions * 2, done + pair * rest * 2, rest * 2);
}

template <class F>
void ValueRuns(size_t n, size_t head_dim, const F& f) {
  const size_t paired = n / 2 * 2;
  for (size_t block = 0; block < head_dim / kLanes; block++)
    f(block * kPage * kLanes, block * paired * kLanes, paired * kLanes);
  if (paired == n) return;
  for (size_t channel = 0; channel < head_dim; channel++) {
    const size_t block = channel / kLanes, lane = channel % kLanes;
    f(block * kPage * kLanes + paired * kLanes + lane * 2, paired * head_dim + channel, size_t{1});
  }
}

template <class F>
void Runs(int half, size_t n, size_t head_dim, const F& f) {
  if (half == 0) {
    KeyRuns(n, head_dim, f);
  } else {
    ValueRuns(n, head_dim, f);
  }
}

void Unpack(int half, size_t n, size_t head_dim, const uint8_t* packed, uint8_t* page) {
  Runs(half, n, head_dim, [&](size_t to, size_t from, size_t count) {
    std::memcpy(page + to * kNumber, packed + from * kNumber, count * kNumber);
  });
}

void Pack(int half, size_t n, size_t head_dim, const uint8_t* page, uint8_t* packed) {
  Runs(half, n, head_dim, [&](size_t from, size_t to, size_t count) {
    std::memcpy(packed + to * kNumber, page + from * kNumber, count * kNumber);
  });
}

}  // namespace

FlatCache::FlatCache(const std::vector<LayerPlan>& layers) {
  for (size_t i = 0; i < layers.size(); i++) {
    const LayerPlan& layer = layers[i];
    if (layer.source == static_cast<int>(i)) {
      own_of_layer_.push_back(own());
      own_.push_back(Own{layer.kv_heads, layer.head_dim, 0, {}, {}});
    } else {
      own_of_layer_.push_back(own_of_layer_[layer.source]);
    }
  }
}

size_t FlatCache::Own::At(int kv_head, size_t index) const {
  return (kv_head * room + index * kPage) * head_dim * kNumber;
}

uint8_t* FlatCache::Own::Tail(int kv_head, int half) {
  return tail.data() + (2 * static_cast<size_t>(kv_head) + half) * page_bytes();
}

void FlatCache::Put(int own, size_t room, Buffer keys, Buffer values) {
  own_[own].room = room;
  own_[own].halves[0] = keys;
  own_[own].halves[1] = values;
}

void FlatCache::Begin(int start, int count) {
  length_ = start;
  const size_t before = static_cast<size_t>(start), after = before + count;
  for (Own& own : own_) {
    const size_t whole = own.whole(), bytes = own.page_bytes(), old = std::min(PagesOf(before), whole);
    const bool has_tail = after > whole * kPage;
    if (has_tail) own.tail.Grow(2 * own.kv_heads * bytes);
    for (int head = 0; head < own.kv_heads; head++) {
      for (int half = 0; half < 2; half++) {
        const uint8_t* past = own.halves[half].past + own.At(head, 0);
        uint8_t* present = own.halves[half].present + own.At(head, 0);
        if (past != present) {
          std::memcpy(present, past, old * bytes);
          std::memset(present + old * bytes, 0, own.At(1, 0) - own.At(0, 0) - old * bytes);
        } else {
          // Attention reads whole pages: what nobody has written yet must be finite numbers.
          std::memset(present + old * bytes, 0, (std::min(PagesOf(after), whole) - old) * bytes);
        }
        if (has_tail && before > whole * kPage)
          Unpack(half, own.room % kPage, own.head_dim, past + whole * bytes, own.Tail(head, half));
      }
    }
  }
}

Page FlatCache::PageOf(int layer, int kv_head, int index) {
  Own& own = own_[own_of_layer_[layer]];
  if (static_cast<size_t>(index) == own.whole())
    return Page{kBFloat16, own.Tail(kv_head, 0), own.Tail(kv_head, 1), nullptr, nullptr};
  const size_t at = own.At(kv_head, index);
  return Page{kBFloat16, own.halves[0].present + at, own.halves[1].present + at, nullptr, nullptr};
}

void FlatCache::Advance(int count) {
  Cache::Advance(count);
  for (Own& own : own_) {
    if (static_cast<size_t>(length_) <= own.whole() * kPage) continue;
    for (int head = 0; head < own.kv_heads; head++)
      for (int half = 0; half < 2; half++)
        Pack(half, own.room % kPage, own.head_dim, own.Tail(head, half),
             own.halves[half].present + own.At(head, own.whole()));
  }
}

}  // namespace gemma
