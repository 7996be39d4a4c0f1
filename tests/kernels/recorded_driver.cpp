// A CUDA driver that runs nothing and keeps what it was given: the launches of hopper_shim.cpp, on a machine without a
// GPU. Loaded under the name that the shim looks for.

#include <cstdint>
#include <cstring>

namespace {
constexpr int MOST = 128;
int sizes[MOST], count = 0;                // of the parameters of the next launch
unsigned char parameters[MOST][128];       // of the last launch
unsigned grid = 0, threads = 0, shared = 0;
}  // namespace

extern "C" {
void expect(const int* wanted, int number) {
    std::memcpy(sizes, wanted, number * sizeof(int));
    count = number;
}
void recorded(unsigned char* copy, unsigned* numbers) {
    std::memcpy(copy, parameters, sizeof parameters);
    numbers[0] = grid, numbers[1] = threads, numbers[2] = shared;
}

int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int, int) {
    *value = 132;
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    *module = const_cast<void*>(image);
    return std::memcmp(image, "\177ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char*) {
    *function = module;
    return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
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

int cuLaunchKernel(void*, unsigned x, unsigned, unsigned, unsigned width, unsigned, unsigned, unsigned bytes, void*,
                   void** given, void**) {
    grid = x, threads = width, shared = bytes;
    for (int i = 0; i < count; i++) std::memcpy(parameters[i], given[i], sizes[i]);
    return 0;
}

// Of libtorch_cuda, which a torch for CPUs has not.
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
}
