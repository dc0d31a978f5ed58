// The C ABI. Nothing that a caller passes is believed: handles are looked up, sizes and tokens checked.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "mapped.h"
#include "model.h"
#include "onnx_plan.h"

#define GEMMA_API extern "C" __attribute__((visibility("default")))

namespace {

using gemma::Error;
using gemma::Sequence;

constexpr int kMostTokens = 1 << 20;

// The file of the parameters is no longer what was opened.
struct Cut : Error {
  using Error::Error;
};

struct Handle {
  std::unique_ptr<gemma::Mapped> parameters;
  std::unique_ptr<gemma::Model> model;
  std::map<int, std::unique_ptr<Sequence>> sequences;
  std::map<int, std::shared_ptr<const gemma::Adapter>> adapters;
  int next = 1;
  gemma::Array<float> normed;
  std::string error;
  std::mutex mutex;  // one call at a time
};

int Put(char* text, size_t size, const std::string& what) {
  if (text != nullptr && size > 0) {
    const size_t n = what.size() < size - 1 ? what.size() : size - 1;
    std::memcpy(text, what.data(), n);
    text[n] = 0;
  }
  return 1;
}

// Runs f on an open model: 0, or 1 with a message that gemma_error gives, or 2 where memory for caches is out, or, with a
// message, 3 where a text gets longer than the context, and 4 where the file of the parameters was cut short.
template <class F>
int Call(Handle* handle, const F& f) {
  if (handle == nullptr) return 1;
  const std::lock_guard<std::mutex> lock(handle->mutex);
  try {
    handle->error.clear();
    return f();
  } catch (const gemma::TooLong& error) {
    handle->error = error.what();
    return 3;
  } catch (const Cut& error) {
    handle->error = error.what();
    return 4;
  } catch (const std::exception& error) {
    handle->error = error.what();
    return 1;
  }
}

// Behind whatever reads parameters.
void CheckWhole(const gemma::Mapped& file) {
  if (file.cut()) throw Cut("was cut short, or cannot be read any more, while it was open");
}

Sequence* Find(Handle* handle, int id) {
  const auto found = handle->sequences.find(id);
  if (found == handle->sequences.end()) throw Error("no sequence " + std::to_string(id));
  return found->second.get();
}

void CheckRanks(Handle* handle, const gemma::Ranks* ranks, int rows) {
  const int vocabulary = handle->model->plan().vocabulary;
  if (ranks == nullptr) throw Error("no ranks");
  if (ranks->top < 0 || ranks->top > gemma::kMostRanked || ranks->top > vocabulary)
    throw Error("top " + std::to_string(ranks->top) + ", not 0 to " + std::to_string(std::min(vocabulary, gemma::kMostRanked)));
  if ((ranks->asked == nullptr) != (ranks->asked_logits == nullptr)) throw Error("asked tokens and their logits go together");
  for (int i = 0; ranks->asked != nullptr && i < rows; i++)
    if (ranks->asked[i] < 0 || ranks->asked[i] >= vocabulary)
      throw Error("token " + std::to_string(ranks->asked[i]) + " that is asked for is not in the table");
}

}  // namespace

struct GemmaPiece {
  int32_t sequence;
  int32_t count;
  int32_t wanted;
  int32_t unused;
  const int32_t* tokens;
};

// Copies the plan in model.onnx of an artifact to `plan`: its bytes, also where these are more than `room` and nothing was
// copied. -1, with a message in `error`, where there is none.
GEMMA_API int64_t gemma_plan(const char* graph, char* plan, size_t room, char* error, size_t error_size) {
  try {
    if (graph == nullptr) throw Error("no graph");
    const gemma::Mapped file(graph);
    const std::string found = gemma::PlanIn(file.data(), file.size(), graph);
    CheckWhole(file);
    if (plan != nullptr && found.size() <= room) std::memcpy(plan, found.data(), found.size());
    return static_cast<int64_t>(found.size());
  } catch (const std::exception& what) {
    Put(error, error_size, what.what());
    return -1;
  }
}

// Opens a model; `cache_form`: bfloat16, float32 or int8, null or "" for the plan's own; `exact`: see Model::exact. Null, with a message in `error`, where it can not be.
GEMMA_API Handle* gemma_open(const char* plan, size_t plan_size, const char* parameters, const char* level, int threads,
                             uint64_t cache_bytes, const char* cache_form, int exact, char* error,
                             size_t error_size) {
  try {
    if (plan == nullptr || parameters == nullptr) throw Error("no plan or no parameters");
    const gemma::Kernels* kernels = gemma::Level(level);
    if (kernels == nullptr)
      throw Error("this processor has no level '" + std::string(level) + "': it has " + gemma::LevelNames());
    if (threads < 1 || threads > 1024) throw Error("threads: " + std::to_string(threads) + ", not 1 to 1024");
    const std::string form = cache_form == nullptr ? "" : cache_form;
    const std::map<std::string, int> forms = {
        {"", -1}, {"bfloat16", gemma::kBFloat16}, {"float32", gemma::kFloat32}, {"int8", gemma::kInt8}};
    if (forms.count(form) == 0) throw Error("caches of " + form + " are not known");
    auto handle = std::make_unique<Handle>();
    handle->parameters = std::make_unique<gemma::Mapped>(parameters);
    handle->model = std::make_unique<gemma::Model>(
        std::string(plan, plan_size), handle->parameters->data(), handle->parameters->size(), *kernels, threads,
        cache_bytes, forms.at(form), exact != 0);
    CheckWhole(*handle->parameters);
    return handle.release();
  } catch (const std::exception& what) {
    Put(error, error_size, what.what());
    return nullptr;
  }
}

GEMMA_API void gemma_close(Handle* handle) {
  if (handle != nullptr) handle->sequences.clear();
  delete handle;
}

GEMMA_API const char* gemma_error(const Handle* handle) { return handle == nullptr ? "no model" : handle->error.c_str(); }
GEMMA_API const char* gemma_level(const Handle* handle) { return handle->model->level().name; }
GEMMA_API uint64_t gemma_stride(const Handle* handle) { return handle->model->stride(); }
GEMMA_API int gemma_hidden(const Handle* handle) { return handle->model->plan().hidden; }
GEMMA_API int gemma_vocabulary(const Handle* handle) { return handle->model->plan().vocabulary; }
GEMMA_API int gemma_context(const Handle* handle) { return handle->model->plan().context; }
GEMMA_API uint64_t gemma_cache_used(const Handle* handle) { return handle->model->pages()->used(); }

// A new sequence, or one with the same text as `like` where that is not 0; its number, at least 1, or 0 for an error.
GEMMA_API int gemma_sequence_new(Handle* handle, int like) {
  int id = 0;
  Call(handle, [&] {
    auto made = like == 0 ? std::make_unique<Sequence>(handle->model->layout(), handle->model->pages())
                          : Find(handle, like)->Fork();
    id = handle->next++;
    handle->sequences[id] = std::move(made);
    return 0;
  });
  return id;
}

// An adapter (adapter.h), of which nothing that the caller passes is kept; its number, at least 1, or 0 for an error.
GEMMA_API int gemma_adapter_load(Handle* handle, const char* text, size_t size, const uint8_t* data, uint64_t bytes) {
  int id = 0;
  Call(handle, [&] {
    if (text == nullptr || (data == nullptr && bytes != 0)) throw Error("no text or no data of an adapter");
    auto made = std::make_shared<const gemma::Adapter>(text, size, data, bytes, handle->model->plan());
    id = handle->next++;
    handle->adapters[id] = std::move(made);
    return 0;
  });
  return id;
}

// Forgets an adapter. Sequences that were begun with it go on with it, and what it takes is free when the last is gone.
GEMMA_API int gemma_adapter_free(Handle* handle, int id) {
  return Call(handle, [&] {
    if (handle->adapters.erase(id) == 0) throw Error("no adapter " + std::to_string(id));
    return 0;
  });
}

// Has a sequence without text computed with an adapter, or with none where that is 0; so are sequences that are made
// like it.
GEMMA_API int gemma_sequence_adapt(Handle* handle, int id, int adapter) {
  return Call(handle, [&] {
    Sequence* sequence = Find(handle, id);
    const auto found = handle->adapters.find(adapter);
    if (adapter != 0 && found == handle->adapters.end()) throw Error("no adapter " + std::to_string(adapter));
    if (sequence->length() != 0)
      throw Error("sequence " + std::to_string(id) + " has " + std::to_string(sequence->length()) +
                  " tokens, which were computed with another adapter or with none");
    sequence->Adapt(adapter == 0 ? nullptr : found->second);
    return 0;
  });
}

GEMMA_API int gemma_sequence_free(Handle* handle, int id) {
  return Call(handle, [&] {
    Find(handle, id);
    handle->sequences.erase(id);
    return 0;
  });
}

GEMMA_API int gemma_sequence_length(Handle* handle, int id) {
  int length = -1;
  Call(handle, [&] {
    length = Find(handle, id)->length();
    return 0;
  });
  return length;
}

GEMMA_API int gemma_sequence_rewind(Handle* handle, int id, int length) {
  return Call(handle, [&] {
    if (!Find(handle, id)->Rewind(length))
      throw Error("sequence " + std::to_string(id) + " can not go back to " + std::to_string(length) + " tokens");
    return 0;
  });
}

// What a caller says of pieces, looked at: raises Error, or reserves room for their tokens and gives 0, or gives 2 where
// there is none, and nothing is changed.
static int Admit(Handle* handle, const GemmaPiece* given, int count, int rows, std::vector<gemma::Piece>* pieces) {
  if (count < 1 || count > 4096 || given == nullptr) throw Error("pieces: 1 to 4096");
  std::vector<Sequence*> sequences;
  const gemma::Plan& plan = handle->model->plan();
  int wanted = 0;
  for (int i = 0; i < count; i++) {
    const GemmaPiece& p = given[i];
    Sequence* sequence = Find(handle, p.sequence);
    for (const Sequence* other : sequences)
      if (other == sequence) throw Error("sequence " + std::to_string(p.sequence) + " is there twice");
    if (p.count < 1 || p.count > kMostTokens || p.tokens == nullptr || p.wanted < 0 || p.wanted > p.count)
      throw Error("piece " + std::to_string(i) + ": " + std::to_string(p.count) + " tokens, " +
                  std::to_string(p.wanted) + " wanted");
    if (sequence->length() > plan.context - p.count)
      throw gemma::TooLong("a text of " + std::to_string(sequence->length()) + " tokens and " +
                           std::to_string(p.count) + " more is longer than the context of " +
                           std::to_string(plan.context) + " tokens");
    for (int t = 0; t < p.count; t++)
      if (p.tokens[t] < 0 || p.tokens[t] >= plan.vocabulary)
        throw Error("piece " + std::to_string(i) + ": token " + std::to_string(p.tokens[t]) + " is not in the table");
    sequences.push_back(sequence);
    pieces->push_back(gemma::Piece{sequence, p.tokens, p.count, p.wanted});
    wanted += p.wanted;
  }
  if (wanted > rows) throw Error("there is room for " + std::to_string(rows) + " rows, not " + std::to_string(wanted));
  size_t reserved = 0;
  while (reserved < pieces->size() && sequences[reserved]->Reserve((*pieces)[reserved].count)) reserved++;
  if (reserved == pieces->size()) return 0;
  for (size_t i = 0; i < reserved; i++) sequences[i]->Rewind(sequences[i]->length());
  return 2;
}

// Computes tokens of several sequences together. `normed` has room for `rows` rows of the hidden size, `logits` for as
// many of gemma_stride numbers: one for each wanted token; either may be null. 2: there is no memory for their caches,
// and nothing was done.
GEMMA_API int gemma_step(Handle* handle, const GemmaPiece* given, int count, float* normed, float* logits, int rows) {
  return Call(handle, [&] {
    std::vector<gemma::Piece> pieces;
    const int status = Admit(handle, given, count, rows, &pieces);
    if (status == 0) handle->model->Step(pieces, normed, logits);
    CheckWhole(*handle->parameters);
    return status;
  });
}

// As gemma_step, and of the logits of every wanted token only what `ranks` asks for (ranking.h), which has room for
// `rows` of them.
GEMMA_API int gemma_step_ranked(Handle* handle, const GemmaPiece* given, int count, const gemma::Ranks* ranks, int rows) {
  return Call(handle, [&] {
    CheckRanks(handle, ranks, rows);
    std::vector<gemma::Piece> pieces;
    const int status = Admit(handle, given, count, rows, &pieces);
    if (status != 0) return status;
    int wanted = 0;
    for (const gemma::Piece& piece : pieces) wanted += piece.wanted;
    handle->normed.Grow(static_cast<size_t>(wanted) * handle->model->plan().hidden);
    handle->model->Step(pieces, handle->normed.data(), nullptr);
    handle->model->Rank(handle->normed.data(), wanted, *ranks);
    CheckWhole(*handle->parameters);
    return 0;
  });
}

// What became of work that threads share (PoolCounts): pieces, pieces done by helpers, how often helpers were sent to
// rest because they did not pay off, and nanoseconds waited for them; `numbers` has room for four.
GEMMA_API int gemma_threads(Handle* handle, uint64_t* numbers) {
  return Call(handle, [&] {
    if (numbers == nullptr) throw Error("no room for the numbers");
    const gemma::PoolCounts counts = handle->model->counts();
    const uint64_t all[] = {counts.pieces, counts.helped, counts.rests, static_cast<uint64_t>(counts.waited * 1e9)};
    std::memcpy(numbers, all, sizeof all);
    return 0;
  });
}

// What a screened head read (ScreenCounts): tokens, rows of the table that were read whole for them, tokens for which it
// took more than the candidates, and how many more; `numbers` has room for four. All are 0 for another head.
GEMMA_API int gemma_screened(Handle* handle, uint64_t* numbers) {
  return Call(handle, [&] {
    if (numbers == nullptr) throw Error("no room for the numbers");
    const gemma::ScreenCounts counts = handle->model->screened();
    const uint64_t all[] = {counts.tokens, counts.rows, counts.proofs, counts.more};
    std::memcpy(numbers, all, sizeof all);
    return 0;
  });
}

// Logits [rows, gemma_stride] of what left the final norm, [rows, hidden].
GEMMA_API int gemma_head(Handle* handle, const float* normed, int rows, float* logits) {
  return Call(handle, [&] {
    if (normed == nullptr || logits == nullptr || rows < 1 || rows > kMostTokens) throw Error("rows: 1 or more");
    handle->model->Head(normed, rows, logits);
    CheckWhole(*handle->parameters);
    return 0;
  });
}

// Of logits [rows, gemma_stride] that gemma_step or gemma_head gave, what `ranks` asks for.
GEMMA_API int gemma_rank(Handle* handle, const float* logits, int rows, const gemma::Ranks* ranks) {
  return Call(handle, [&] {
    if (logits == nullptr || rows < 1 || rows > kMostTokens) throw Error("rows: 1 or more");
    CheckRanks(handle, ranks, rows);
    handle->model->RankLogits(logits, rows, *ranks);
    return 0;
  });
}
