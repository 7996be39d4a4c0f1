// A CUDA driver that runs nothing and keeps what it was given: the launches of hopper_calls.h, on a machine without a
// GPU. Loaded under the name that they look for.

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using Parameter = std::array<unsigned char, 128>;

struct Launched {
    std::string name;
    std::vector<Parameter> parameters;
    unsigned grid[2], threads, shared;
};

std::map<std::string, std::vector<int>> sizes;  // of the parameters of each kernel
std::vector<Launched> launches;
int depth = 0;                             // of contexts
std::map<const void*, std::string> names;  // of functions, which are what modules are: images

}  // namespace

extern "C" {

void expect(const char* name, const int* wanted, int count) { sizes[name].assign(wanted, wanted + count); }
int launched() { return int(launches.size()); }
void forget() { launches.clear(); }
int contexts() { return depth; }
const char* read_launch(int number, unsigned char* parameters, unsigned* numbers) {
    const Launched& one = launches.at(number);
    std::memcpy(parameters, one.parameters.data(), one.parameters.size() * sizeof(Parameter));
    numbers[0] = one.grid[0], numbers[1] = one.grid[1], numbers[2] = one.threads, numbers[3] = one.shared;
    return one.name.c_str();
}

int cuCtxGetDevice(int* device) {
    *device = 0;
    return depth ? 0 : 201;  // CUDA_ERROR_INVALID_CONTEXT, as in a thread that has not met CUDA
}
int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &depth;
    return 0;
}
int cuCtxPushCurrent_v2(void* context) { return context == &depth ? (depth++, 0) : 201; }
int cuCtxPopCurrent_v2(void** context) {
    *context = &depth;
    return depth ? (depth--, 0) : 201;
}
int cuDeviceGetAttribute(int* value, int, int) {
    *value = 132;
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    *module = const_cast<void*>(image);
    return std::memcmp(image, "\177ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = module;
    names[module] = name;
    return sizes.count(name) ? 0 : 500;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuMemsetD32Async(unsigned* memory, unsigned value, size_t count, void*) {
    for (size_t i = 0; i < count; i++) memory[i] = value;
    return 0;
}
int cuGetErrorName(int, const char** name) {
    *name = "CUDA_ERROR_OF_A_TEST";
    return 0;
}

// In place of a map, what it would be made of.
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t*, int, int swizzle, int, int) {
    uint64_t words[16] = {reinterpret_cast<uint64_t>(address), rank, uint64_t(type), uint64_t(swizzle)};
    for (uint32_t d = 0; d < rank; d++) words[4 + d] = dims[d], words[8 + d] = box[d];
    for (uint32_t d = 0; d + 1 < rank; d++) words[12 + d] = strides[d];
    std::memcpy(map, words, sizeof words);
    return 0;
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned, unsigned width, unsigned, unsigned,
                   unsigned bytes, void*, void** given, void**) {
    if (!depth) return 201;
    Launched one{names[function], {}, {x, y}, width, bytes};
    for (int size : sizes[one.name]) std::memcpy(one.parameters.emplace_back().data(), *given++, size);
    launches.push_back(one);
    return 0;
}

// Of libtorch_cuda, which a torch for CPUs has not.
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}

}
