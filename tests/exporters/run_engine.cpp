// Run a TensorRT engine on a GPU: a library for ctypes. Memory and stream are the caller's, by torch.
//
//   open_engine(data, size)                    null where TensorRT refuses the engine or the GPU
//   run_engine(engine, tensors, count, stream) inputs first; true: the work is on the stream
//   close_engine(engine)
//   complaints()                               what went wrong since the last call of this, a line each
//
// Built against the headers of TensorRT and linked with TensorRT-RTX.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "NvInfer.h"

static std::string said;

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, char const* message) noexcept override {
        if (severity <= Severity::kERROR) said.append(message).append("\n");
    }
};

struct Engine {  // freed from the last to the first
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
};

struct Tensor {
    char const* name;
    void* address;
    int64_t rank;
    int64_t sizes[nvinfer1::Dims::MAX_DIMS];
};

extern "C" Engine* open_engine(void const* data, uint64_t size) {
    static Logger logger;  // the library keeps the first that it is given
    auto opened = std::make_unique<Engine>();
    opened->runtime.reset(static_cast<nvinfer1::IRuntime*>(createInferRuntime_INTERNAL(&logger, LIBRARY_VERSION)));
    if (!opened->runtime) return nullptr;
    opened->engine.reset(opened->runtime->deserializeCudaEngine(data, size));
    if (!opened->engine) return nullptr;
    opened->context.reset(opened->engine->createExecutionContext());
    return opened->context ? opened.release() : nullptr;
}

static bool set(Engine& opened, Tensor const& tensor) {
    nvinfer1::Dims given{};
    given.nbDims = static_cast<int32_t>(tensor.rank);
    std::copy_n(tensor.sizes, tensor.rank, given.d);
    if (opened.engine->getTensorIOMode(tensor.name) == nvinfer1::TensorIOMode::kINPUT)
        return opened.context->setInputShape(tensor.name, given) && opened.context->setTensorAddress(tensor.name, tensor.address);
    auto const made = opened.context->getTensorShape(tensor.name);
    if (made.nbDims != given.nbDims || !std::equal(made.d, made.d + made.nbDims, given.d)) {
        said.append(tensor.name).append(" has another shape than there is memory for\n");
        return false;
    }
    return opened.context->setTensorAddress(tensor.name, tensor.address);
}

extern "C" bool run_engine(Engine* opened, Tensor const* tensors, uint64_t count, void* stream) {
    return std::all_of(tensors, tensors + count, [&](Tensor const& tensor) { return set(*opened, tensor); }) &&
           opened->context->enqueueV3(static_cast<cudaStream_t>(stream));
}

extern "C" void close_engine(Engine* opened) { delete opened; }

extern "C" char const* complaints() {
    static std::string handed;
    handed.swap(said);
    said.clear();
    return handed.c_str();
}
