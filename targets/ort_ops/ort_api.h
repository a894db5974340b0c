// The part of ONNX Runtime's C interface that these operators use. The Python packages of ONNX Runtime hold no headers,
// and the interface promises that what a version shipped keeps its place for ever, so the places are written down here.
//
// The table of functions ("OrtApi") is an array of pointers. Places as of version 17 (ONNX Runtime 1.17); they agree
// with the places that ONNX Runtime's own onnxruntime_c_api.cc asserts for the last function of each version: 101, 118,
// 124, 126, 149, 157, 161, 169, 209, 218, 224, 238, 254, 265.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr std::uint32_t kVersion = 17;

struct Status;
struct Options;
struct Domain;
struct Info;
struct Context;
struct Value;
struct Shape;

enum Type : int { kFloat = 1, kUint8 = 2, kInt32 = 6 };
enum { kInvalidArgument = 2 };

struct Api {
  void* function[275];

  template <typename Result, typename... Arguments>
  Result call(int place, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(function[place])(arguments...);
  }

  Status* fail(const char* why) const { return call<Status*, int, const char*>(0, kInvalidArgument, why); }
  Status* create_domain(const char* name, Domain** out) const { return call<Status*>(26, name, out); }
  Status* add_operator(Domain* domain, const void* op) const { return call<Status*>(27, domain, op); }
  Status* add_domain(Options* options, Domain* domain) const { return call<Status*>(28, options, domain); }
  Status* data(Value* value, void** out) const { return call<Status*>(51, value, out); }
  Status* rank(const Shape* shape, std::size_t* out) const { return call<Status*>(61, shape, out); }
  Status* extents(const Shape* shape, std::int64_t* out, std::size_t count) const {
    return call<Status*>(62, shape, out, count);
  }
  Status* shape(const Value* value, Shape** out) const { return call<Status*>(65, value, out); }
  Status* attribute(const Info* info, const char* name, std::int64_t* out) const {
    return call<Status*>(86, info, name, out);
  }
  Status* input(const Context* context, std::size_t index, const Value** out) const {
    return call<Status*>(90, context, index, out);
  }
  Status* output(Context* context, std::size_t index, const std::int64_t* extents, std::size_t rank, Value** out) const {
    return call<Status*>(91, context, index, extents, rank, out);
  }
  void release(Shape* shape) const { call<void>(99, shape); }
  // Calls `work(user, i)` for i below `count`, shared among the threads of the session.
  Status* parallel(const Context* context, void (*work)(void*, std::size_t), std::size_t count, void* user) const {
    return call<Status*, const Context*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*>(
        274, context, work, count, 0, user);
  }
};

struct ApiBase {
  const Api* (*get)(std::uint32_t version);
  const char* (*version)();
};

// What an operator is: its schema and its kernel. Members that stay null have a meaning by default.
struct Operator {
  std::uint32_t version;
  void* (*create_without_status)(const Operator*, const Api*, const Info*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  Type (*input_type)(const Operator*, std::size_t);
  std::size_t (*inputs)(const Operator*);
  Type (*output_type)(const Operator*, std::size_t);
  std::size_t (*outputs)(const Operator*);
  void (*compute_without_status)(void*, Context*);
  void (*destroy)(void*);
  int (*input_kind)(const Operator*, std::size_t);   // 0: required
  int (*output_kind)(const Operator*, std::size_t);  // as above
  int (*input_memory)(const Operator*, std::size_t);
  int (*least_inputs)(const Operator*);
  int (*inputs_alike)(const Operator*);
  int (*least_outputs)(const Operator*);
  int (*outputs_alike)(const Operator*);
  Status* (*create)(const Operator*, const Api*, const Info*, void** kernel);
  Status* (*compute)(void* kernel, Context*);
  Status* (*infer_shape)(const Operator*, void*);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace ort
