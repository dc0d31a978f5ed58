// The part of ONNX Runtime's C interface that this library uses. Nothing of ONNX Runtime is needed to build it: the
// interface is a table of functions, and a description of an operator, and both only ever grow at their end.
//
// Places in the table are those of ONNX Runtime 1.22 and of every later one. All used here are in the part that was
// complete with 1.15.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma {
namespace ort {

constexpr uint32_t kVersion = 22;  // of the table and of the description of an operator

// Objects of ONNX Runtime's own.
struct Status;  // null: all went well
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;

enum ElementType : int { kFloatElement = 1, kUint8Element = 2, kInt64Element = 7, kBFloat16Element = 16 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum Characteristic : int { kRequired = 0, kVariadic = 2 };

using Function = void (*)();

// What a library is given to begin with.
struct ApiBase {
  const Function* (*get_api)(uint32_t version);  // null: this ONNX Runtime is older
  const char* (*get_version)();
};

// The table. A function that gives a Status has done nothing where that is not null.
class Api {
 public:
  Api() = default;
  explicit Api(const Function* table) : table_(table) {}

  const Function* table() const { return table_; }

  Status* CreateStatus(ErrorCode code, const char* message) const { return Call<0, Status*>(code, message); }
  void ReleaseStatus(Status* status) const { Call<93, void>(status); }

  Status* CreateDomain(const char* name, Domain** out) const { return Call<26, Status*>(name, out); }
  Status* AddOperator(Domain* domain, const struct Operator* op) const { return Call<27, Status*>(domain, op); }
  Status* AddDomain(SessionOptions* options, Domain* domain) const { return Call<28, Status*>(options, domain); }
  void ReleaseDomain(Domain* domain) const { Call<101, void>(domain); }

  Status* Data(Value* value, void** out) const { return Call<51, Status*>(value, out); }
  Status* ShapeOf(const Value* value, ShapeInfo** out) const { return Call<65, Status*>(value, out); }
  void ReleaseShape(ShapeInfo* shape) const { Call<99, void>(shape); }
  Status* Element(const ShapeInfo* shape, int* out) const { return Call<60, Status*>(shape, out); }
  Status* Rank(const ShapeInfo* shape, size_t* out) const { return Call<61, Status*>(shape, out); }
  Status* Sizes(const ShapeInfo* shape, int64_t* sizes, size_t rank) const {
    return Call<62, Status*>(shape, sizes, rank);
  }

  // Of a node that is being made into a kernel.
  Status* Whole(const KernelInfo* info, const char* name, int64_t* out) const {
    return Call<86, Status*>(info, name, out);
  }
  // `size` counts the zero at the end; no `out`: only the size is asked for.
  Status* Text(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return Call<87, Status*>(info, name, out, size);
  }
  Status* Inputs(const KernelInfo* info, size_t* out) const { return Call<230, Status*>(info, out); }
  Status* Outputs(const KernelInfo* info, size_t* out) const { return Call<231, Status*>(info, out); }
  Status* Constant(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
    return Call<249, Status*>(info, index, is_constant, out);
  }

  // Of a kernel that is run.
  Status* Input(const KernelContext* context, size_t index, const Value** out) const {
    return Call<90, Status*>(context, index, out);
  }
  Status* Output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) const {
    return Call<91, Status*>(context, index, sizes, rank, out);
  }

 private:
  template <int kPlace, class Result, class... Arguments>
  Result Call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[kPlace])(arguments...);
  }

  const Function* table_ = nullptr;
};

// An operator. Functions that are null are not offered.
struct Operator {
  uint32_t version;
  void* (*create_without_status)(const Operator*, const Function* api, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  ElementType (*input_type)(const Operator*, size_t index);
  size_t (*inputs)(const Operator*);
  ElementType (*output_type)(const Operator*, size_t index);
  size_t (*outputs)(const Operator*);
  void (*compute_without_status)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Characteristic (*input_characteristic)(const Operator*, size_t index);
  Characteristic (*output_characteristic)(const Operator*, size_t index);
  int (*input_memory)(const Operator*, size_t index);  // 0: the provider's own
  int (*least_variadic_inputs)(const Operator*);
  int (*same_variadic_inputs)(const Operator*);  // 1: all of one type
  int (*least_variadic_outputs)(const Operator*);
  int (*same_variadic_outputs)(const Operator*);
  Status* (*create)(const Operator*, const Function* api, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, KernelContext*);
  Status* (*infer_shapes)(const Operator*, void* context);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
  // Which inputs and outputs may share memory, and which must.
  size_t (*may_share)(int** inputs, int** outputs);
  void (*release_may_share)(int* inputs, int* outputs);
  size_t (*must_share)(int** inputs, int** outputs);
  void (*release_must_share)(int* inputs, int* outputs);
};

}  // namespace ort
}  // namespace gemma
