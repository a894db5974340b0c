// Run the engine of a bundle that `edgecompile build --target tvm` wrote, without Python:
//
//     ./run [-n CALLS] build/net/model.so output input.npy [input.npy ...]
//
// Inputs are .npy files (C order), one per input of model.onnx and in its order; or raw ones with a type and a shape,
// input.bin:float32:1x3x224x224. The outputs go to output0.npy, output1.npy, ... in the order of the model. Then the
// model is called CALLS times, 20 unless given, and the mean time of a call is printed.
//
// model.so is code: run only those you trust. The library runs on the TVM version that made it, on CPUs with the
// features named under "device" in the bundle's manifest.json.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr size_t kAlignment = 64;    // what compiled kernels take for granted of every tensor
constexpr int kPooledAllocator = 2;  // tvm::runtime::memory::AllocatorType::kPooled

// Memory of a tensor on the CPU.
struct Host {
  void AllocData(DLTensor* tensor) {
    const size_t size = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, size ? size : kAlignment);
    if (!tensor->data) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Empty(const std::vector<int64_t>& shape, DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(Host(), ffi::ShapeView(shape.data(), shape.size()), dtype, DLDevice{kDLCPU, 0});
}

// NumPy's name of a type in .npy files -> ours; both are little-endian on the CPUs that TVM compiles for here.
const std::map<std::string, std::string> kTypes = {
    {"<f4", "float32"}, {"<f2", "float16"}, {"<f8", "float64"}, {"|i1", "int8"},
    {"|u1", "uint8"},   {"<i4", "int32"},   {"<i8", "int64"},   {"|b1", "bool"},
};

// The integers in a text that other characters separate, e.g. "1x3x224x224" or "(1, 3, 224, 224)".
std::vector<int64_t> Integers(const std::string& text) {
  std::vector<int64_t> found;
  for (size_t i = 0; i < text.size();) {
    if (text[i] < '0' || text[i] > '9') {
      ++i;
      continue;
    }
    size_t used = 0;
    found.push_back(std::stoll(text.substr(i), &used));
    i += used;
  }
  return found;
}

// What stands between two texts.
std::string Between(const std::string& text, const std::string& before, const std::string& after) {
  const size_t start = text.find(before);
  const size_t end = start == std::string::npos ? start : text.find(after, start + before.size());
  if (end == std::string::npos) throw std::runtime_error("the header of an .npy file lacks " + before);
  return text.substr(start + before.size(), end - start - before.size());
}

ffi::Tensor Filled(std::ifstream& file, const std::string& name, const std::vector<int64_t>& shape, DLDataType dtype) {
  ffi::Tensor tensor = Empty(shape, dtype);
  const auto size = static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  file.read(static_cast<char*>(tensor.data_ptr()), size);
  if (file.gcount() != size || file.peek() != EOF) throw std::runtime_error(name + " does not have the size of its shape");
  return tensor;
}

// Format of .npy: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
ffi::Tensor Read(const std::string& argument) {
  const std::string name = argument.substr(0, argument.find(':'));
  std::ifstream file(name, std::ios::binary);
  if (!file) throw std::runtime_error(name + " cannot be read");
  if (name != argument) {
    const std::string rest = argument.substr(name.size() + 1), type = rest.substr(0, rest.find(':'));
    return Filled(file, name, Integers(rest.substr(type.size())), ffi::StringToDLDataType(type));
  }
  char magic[8] = {};
  file.read(magic, sizeof magic);
  if (std::memcmp(magic, "\x93NUMPY", 6)) throw std::runtime_error(name + " is not an .npy file");
  unsigned char length[4] = {};
  file.read(reinterpret_cast<char*>(length), magic[6] == 1 ? 2 : 4);
  std::string header(length[0] | length[1] << 8 | length[2] << 16 | length[3] << 24, ' ');
  file.read(&header[0], static_cast<std::streamsize>(header.size()));
  if (header.find("'fortran_order': False") == std::string::npos) throw std::runtime_error(name + " is not in C order");
  const auto type = kTypes.find(Between(header, "'descr': '", "'"));
  if (type == kTypes.end()) throw std::runtime_error(name + " has a type that is not known here");
  return Filled(file, name, Integers(Between(header, "'shape': (", ")")), ffi::StringToDLDataType(type->second));
}

void Write(const std::string& name, const ffi::Tensor& tensor) {
  const std::string type = ffi::DLDataTypeToString(tensor.dtype());
  std::string shape, descr;
  for (const auto& known : kTypes) descr = known.second == type ? known.first : descr;
  for (int64_t extent : tensor.shape()) shape += std::to_string(extent) + ", ";
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append(kAlignment - (10 + header.size() + 1) % kAlignment, ' ').push_back('\n');
  std::ofstream file(name, std::ios::binary);
  file.write("\x93NUMPY\x01\x00", 8);
  file.put(static_cast<char>(header.size() & 255)).put(static_cast<char>(header.size() >> 8));
  file << header;
  file.write(static_cast<const char*>(tensor.data_ptr()),
             static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  if (!file.flush()) throw std::runtime_error(name + " cannot be written");
}

ffi::Function Named(const ffi::Module& module, const std::string& name) {
  const auto found = module->GetFunction(name);
  if (!found.has_value()) throw std::runtime_error("the library has no function " + name);
  return found.value();
}

// Arguments: the library, the begin of the names of the outputs, and the inputs.
void Run(int calls, int count, char** arguments) {
  // The library holds code and weights; its virtual machine is made by the function "vm_load_executable".
  // A name without a folder would be looked for where the system has its libraries.
  ffi::Module library = ffi::Module::LoadFromFile(std::filesystem::absolute(arguments[0]).string());
  ffi::Module machine = Named(library, "vm_load_executable")().cast<ffi::Module>();
  Named(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  ffi::Function main = Named(machine, "main");

  std::vector<ffi::Any> inputs;
  for (int i = 2; i < count; ++i) inputs.emplace_back(Read(arguments[i]));
  std::vector<ffi::AnyView> views(inputs.begin(), inputs.end());
  ffi::Any result;
  main.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);

  std::vector<ffi::Tensor> outputs;  // a model with one output returns it, others return an array
  if (auto tensor = result.as<ffi::Tensor>()) {
    outputs.push_back(*tensor);
  } else {
    for (const ffi::Tensor& tensor : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(tensor);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    Write(std::string(arguments[1]) + std::to_string(i) + ".npy", outputs[i]);
  }

  std::cout << outputs.size() << " outputs";
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) main.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  if (calls) std::cout << ", " << spent.count() / calls << " ms a call (wall clock, mean of " << calls << ")";
  std::cout << '\n';
}

}  // namespace

int main(int count, char** arguments) {
  int calls = 20, first = 1;
  if (count > 2 && !std::strcmp(arguments[1], "-n")) {
    calls = std::atoi(arguments[2]);
    first = 3;
  }
  if (count - first < 3 || calls < 0) {
    std::cerr << "usage: run [-n CALLS] MODEL.so OUTPUT INPUT.npy|INPUT.bin:TYPE:SHAPE...\n";
    return 2;
  }
  try {
    Run(calls, count - first, arguments + first);
  } catch (const std::exception& error) {  // those of TVM are of this kind too
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
