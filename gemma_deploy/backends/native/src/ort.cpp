// The face for ONNX Runtime: one operator, `gemma.deploy::GemmaDecoder`, that is a whole model.
//
// Inputs:
//   input_ids       int64 [1, tokens]
//   attention_mask  int64 [1, positions], all ones: the tokens are the last of so many positions
//   parameters      uint8 [bytes], an initializer: the parameter file
//   past...         bfloat16 [1, KV heads, room, head_dim]: keys and values of each layer that has its own
// Outputs:
//   logits          float32 [1, 1, vocabulary] of the last token, or [1, tokens, vocabulary]
//   present...      as past
// Attributes:
//   plan            text: what the model is (plan.h)
//   threads         0, or none: as many as there are processors
//   all_logits      1: of all tokens
//
// Where past and present are the same memory, keys and values are written in place; where not, past is copied first.
// What lies in them is this library's own order (flat_cache.h). `room` is never less than `positions`.
//
// GEMMA_DEPLOY_KERNELS in the environment names a level, as gemma_open does.
#include "ort_abi.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "flat_cache.h"
#include "model.h"

namespace gemma {
namespace {

constexpr size_t kIds = 0, kMask = 1, kParameters = 2, kPast = 3;  // inputs
constexpr size_t kLogits = 0, kPresent = 1;                        // outputs
constexpr int64_t kMostPositions = 1 << 30;
constexpr size_t kMostSizes = 4;

// What ONNX Runtime itself had to say against something.
struct Refused {
  ort::Status* status;
};

void Check(ort::Status* status) {
  if (status != nullptr) throw Refused{status};
}

// Nothing that is thrown leaves this library.
template <class F>
ort::Status* Guarded(const ort::Api& api, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const Error& error) {
    return api.CreateStatus(ort::kInvalidArgument, (std::string("GemmaDecoder: ") + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, (std::string("GemmaDecoder: ") + error.what()).c_str());
  }
}

struct Tensor {
  void* data;
  size_t rank;
  int64_t sizes[kMostSizes];

  bool Is(std::initializer_list<int64_t> wanted) const {  // -1: any
    if (wanted.size() != rank) return false;
    size_t i = 0;
    for (int64_t size : wanted)
      if (const int64_t has = sizes[i++]; size >= 0 && size != has) return false;
    return true;
  }
};

std::string Name(const Tensor& tensor) {
  std::string text = "[";
  for (size_t i = 0; i < tensor.rank; i++) text += (i == 0 ? "" : ", ") + std::to_string(tensor.sizes[i]);
  return text + "]";
}

class Decoder {
 public:
  Decoder(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
    const Tensor parameters = Parameters(info);
    const char* name = std::getenv("GEMMA_DEPLOY_KERNELS");
    const Kernels* level = Level(name);
    if (level == nullptr)
      throw Error("this processor has no level '" + std::string(name) + "': it has " + LevelNames());
    int64_t threads = Whole(info, "threads", 0);
    if (threads < 0 || threads > 1024) throw Error("threads: " + std::to_string(threads) + ", not 0 to 1024");
    if (threads == 0) threads = std::clamp(std::thread::hardware_concurrency(), 1u, 1024u);
    all_logits_ = Whole(info, "all_logits", 0) != 0;
    model_ = std::make_unique<Model>(Text(info, "plan"), static_cast<const uint8_t*>(parameters.data),
                                     static_cast<uint64_t>(parameters.sizes[0]), *level, static_cast<int>(threads),
                                     uint64_t{0}, kBFloat16, false);
    cache_ = std::make_unique<FlatCache>(model_->plan().layers);
    size_t inputs = 0, outputs = 0;
    Check(api_.Inputs(info, &inputs));
    Check(api_.Outputs(info, &outputs));
    const size_t caches = 2 * static_cast<size_t>(cache_->own());
    if (inputs != kPast + caches || outputs != kPresent + caches)
      throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                  " outputs, the plan needs " + std::to_string(kPast + caches) + " and " +
                  std::to_string(kPresent + caches));
  }

  const ort::Api& api() const { return api_; }

  void Compute(ort::KernelContext* context) {
    const std::lock_guard<std::mutex> lock(mutex_);  // sessions may be run by several threads at once
    const int count = Tokens(context), total = Positions(context, count);
    Caches(context, total);
    const size_t vocabulary = static_cast<size_t>(model_->plan().vocabulary), stride = model_->stride();
    const int wanted = all_logits_ ? count : 1;
    const int64_t sizes[kMostSizes] = {1, wanted, static_cast<int64_t>(vocabulary)};
    float* logits = static_cast<float*>(Output(context, kLogits, sizes, 3));
    cache_->Begin(total - count, count);
    if (stride == vocabulary) {
      model_->Step({Piece{cache_.get(), tokens_.data(), count, wanted}}, nullptr, logits);
      return;
    }
    padded_.Grow(wanted * stride);
    model_->Step({Piece{cache_.get(), tokens_.data(), count, wanted}}, nullptr, padded_.data());
    for (int i = 0; i < wanted; i++) std::copy_n(&padded_[i * stride], vocabulary, logits + i * vocabulary);
  }

 private:
  std::string Text(const ort::KernelInfo* info, const char* name) const {
    size_t size = 0;
    Check(api_.Text(info, name, nullptr, &size));
    std::string text(size, 0);
    Check(api_.Text(info, name, &text[0], &size));
    text.resize(size == 0 ? 0 : size - 1);
    return text;
  }

  int64_t Whole(const ort::KernelInfo* info, const char* name, int64_t otherwise) const {
    int64_t value = 0;
    ort::Status* status = api_.Whole(info, name, &value);
    if (status == nullptr) return value;
    api_.ReleaseStatus(status);
    return otherwise;
  }

  Tensor Parameters(const ort::KernelInfo* info) const {
    int constant = 0;
    const ort::Value* value = nullptr;
    Check(api_.Constant(info, kParameters, &constant, &value));
    if (constant == 0 || value == nullptr) throw Error("'parameters' is no initializer");
    const Tensor parameters = Read(value, ort::kUint8Element, "parameters");
    if (parameters.rank != 1) throw Error("'parameters' is " + Name(parameters) + ", not [bytes]");
    if (reinterpret_cast<uintptr_t>(parameters.data) % 64 != 0)
      throw Error("'parameters' lie at an address that is no multiple of 64: their offset in the file has to be one");
    return parameters;
  }

  Tensor Read(const ort::Value* value, int element, const std::string& name) const {
    Tensor tensor{};
    ort::ShapeInfo* shape = nullptr;
    Check(api_.ShapeOf(value, &shape));
    int has = 0;
    ort::Status* status = api_.Element(shape, &has);
    if (status == nullptr) status = api_.Rank(shape, &tensor.rank);
    if (status == nullptr && tensor.rank <= kMostSizes) status = api_.Sizes(shape, tensor.sizes, tensor.rank);
    api_.ReleaseShape(shape);
    Check(status);
    if (has != element || tensor.rank > kMostSizes)
      throw Error("'" + name + "' has " + std::to_string(tensor.rank) + " dimensions of the element type " +
                  std::to_string(has));
    Check(api_.Data(const_cast<ort::Value*>(value), &tensor.data));
    return tensor;
  }

  Tensor Input(ort::KernelContext* context, size_t index, int element, const std::string& name) const {
    const ort::Value* value = nullptr;
    Check(api_.Input(context, index, &value));
    if (value == nullptr) throw Error("'" + name + "' is missing");
    return Read(value, element, name);
  }

  void* Output(ort::KernelContext* context, size_t index, const int64_t (&sizes)[kMostSizes], size_t rank) const {
    ort::Value* value = nullptr;
    void* data = nullptr;
    Check(api_.Output(context, index, sizes, rank, &value));
    if (value == nullptr) throw Error("output " + std::to_string(index) + " is missing");
    Check(api_.Data(value, &data));
    return data;
  }

  // Puts the tokens where the model reads them: how many there are.
  int Tokens(ort::KernelContext* context) {
    const Tensor ids = Input(context, kIds, ort::kInt64Element, "input_ids");
    if (!ids.Is({1, -1}) || ids.sizes[1] < 1 || ids.sizes[1] > kMostPositions)
      throw Error("'input_ids' is " + Name(ids) + ", not [1, tokens]");
    tokens_.clear();
    const int64_t* given = static_cast<const int64_t*>(ids.data);
    for (int64_t i = 0; i < ids.sizes[1]; i++) {
      if (given[i] < 0 || given[i] >= model_->plan().vocabulary)
        throw Error("token " + std::to_string(given[i]) + " at " + std::to_string(i) + " is not in the table of " +
                    std::to_string(model_->plan().vocabulary));
      tokens_.push_back(static_cast<int32_t>(given[i]));
    }
    return static_cast<int>(ids.sizes[1]);
  }

  // How many positions there are with these tokens.
  int Positions(ort::KernelContext* context, int count) const {
    const Tensor mask = Input(context, kMask, ort::kInt64Element, "attention_mask");
    if (!mask.Is({1, -1}) || mask.sizes[1] < count || mask.sizes[1] > kMostPositions)
      throw Error("'attention_mask' is " + Name(mask) + ", not [1, positions] with at least " + std::to_string(count) +
                  " of them");
    const int64_t* given = static_cast<const int64_t*>(mask.data);
    if (mask.sizes[1] > model_->plan().context)
      throw Error(std::to_string(mask.sizes[1]) + " positions, more than the context of " +
                  std::to_string(model_->plan().context));
    for (int64_t i = 0; i < mask.sizes[1]; i++)
      if (given[i] != 1)
        throw Error("'attention_mask' is " + std::to_string(given[i]) + " at " + std::to_string(i) +
                    ", not 1: padding is not known here");
    return static_cast<int>(mask.sizes[1]);
  }

  void Caches(ort::KernelContext* context, int total) {
    std::vector<Tensor> past;
    for (int i = 0; i < 2 * cache_->own(); i++) {
      const int own = i / 2;
      const std::string name = "past " + std::string(i % 2 == 0 ? "key " : "value ") + std::to_string(own);
      past.push_back(Input(context, kPast + i, ort::kBFloat16Element, name));
      if (!past[i].Is({1, cache_->kv_heads(own), -1, cache_->head_dim(own)}))
        throw Error("'" + name + "' is " + Name(past[i]) + ", not [1, " + std::to_string(cache_->kv_heads(own)) +
                    ", room, " + std::to_string(cache_->head_dim(own)) + "]");
      if (past[i].sizes[2] < total)
        throw Error("'" + name + "' has room for " + std::to_string(past[i].sizes[2]) + " positions, not for " +
                    std::to_string(total) + ": caches have their full length from the beginning " +
                    "(past_present_share_buffer)");
      if (past[i].sizes[2] != past[i / 2 * 2].sizes[2])
        throw Error("keys and values of cache " + std::to_string(own) + " differ in their room");
    }
    for (int own = 0; own < cache_->own(); own++) {
      FlatCache::Buffer halves[2];
      for (int half = 0; half < 2; half++) {
        const Tensor& from = past[2 * own + half];
        void* to = Output(context, kPresent + 2 * own + half, from.sizes, from.rank);
        halves[half] = FlatCache::Buffer{static_cast<const uint8_t*>(from.data), static_cast<uint8_t*>(to)};
      }
      cache_->Put(own, static_cast<size_t>(past[2 * own].sizes[2]), halves[0], halves[1]);
    }
  }

  const ort::Api api_;
  std::mutex mutex_;
  bool all_logits_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<FlatCache> cache_;
  std::vector<int32_t> tokens_;
  Array<float> padded_;  // logits, where the head has more rows than there are tokens
};

// The description of the operator. Its functions are called by ONNX Runtime.
constexpr ort::Operator kOperator = [] {
  using ort::Operator;
  Operator op{};
  op.version = ort::kVersion;
  op.name = [](const Operator*) { return "GemmaDecoder"; };
  op.provider = [](const Operator*) { return "CPUExecutionProvider"; };
  op.inputs = [](const Operator*) { return kPast + 1; };
  op.outputs = [](const Operator*) { return kPresent + 1; };
  op.input_type = [](const Operator*, size_t index) {
    return index == kParameters ? ort::kUint8Element : index < kPast ? ort::kInt64Element : ort::kBFloat16Element;
  };
  op.output_type = [](const Operator*, size_t index) {
    return index == kLogits ? ort::kFloatElement : ort::kBFloat16Element;
  };
  op.input_characteristic = [](const Operator*, size_t index) {
    return index < kPast ? ort::kRequired : ort::kVariadic;
  };
  op.output_characteristic = [](const Operator*, size_t index) {
    return index < kPresent ? ort::kRequired : ort::kVariadic;
  };
  op.input_memory = [](const Operator*, size_t) { return 0; };
  op.least_variadic_inputs = op.least_variadic_outputs = [](const Operator*) { return 2; };
  op.same_variadic_inputs = op.same_variadic_outputs = [](const Operator*) { return 1; };
  op.first_version = op.last_version = [](const Operator*) { return 1; };
  op.create = [](const Operator*, const ort::Function* table, const ort::KernelInfo* info, void** kernel) {
    const ort::Api api(table);
    return Guarded(api, [&] { *kernel = new Decoder(api, info); });
  };
  op.compute = [](void* kernel, ort::KernelContext* context) {
    Decoder* decoder = static_cast<Decoder*>(kernel);
    return Guarded(decoder->api(), [&] { decoder->Compute(context); });
  };
  // ONNX Runtime unloads the library when a session closes: no thread of ours may be in it any more.
  op.destroy = [](void* kernel) { delete static_cast<Decoder*>(kernel); };
  return op;
}();

// The domain of the operator: one for all sessions, as long as the library is loaded.
class Domain {
 public:
  ~Domain() {
    if (domain_ != nullptr) api_.ReleaseDomain(domain_);
  }

  void AddTo(ort::SessionOptions* options, const ort::Api& api) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (domain_ == nullptr) {
      ort::Domain* made = nullptr;
      Check(api.CreateDomain("gemma.deploy", &made));
      if (ort::Status* status = api.AddOperator(made, &kOperator)) {
        api.ReleaseDomain(made);
        throw Refused{status};
      }
      api_ = api;
      domain_ = made;
    }
    Check(api.AddDomain(options, domain_));
  }

 private:
  std::mutex mutex_;
  ort::Api api_;
  ort::Domain* domain_ = nullptr;
};

}  // namespace
}  // namespace gemma

extern "C" __attribute__((visibility("default"))) gemma::ort::Status* RegisterCustomOps(
    gemma::ort::SessionOptions* options, const gemma::ort::ApiBase* base) {
  static gemma::Domain domain;
  const gemma::ort::Api api(base->get_api(gemma::ort::kVersion));
  if (api.table() == nullptr) {
    // Every ONNX Runtime has the first table.
    const std::string what = std::string("this library needs ONNX Runtime 1.22, this is ") + base->get_version();
    return gemma::ort::Api(base->get_api(1)).CreateStatus(gemma::ort::kFail, what.c_str());
  }
  return gemma::Guarded(api, [&] { domain.AddTo(options, api); });
}
