// Tensors of torch behind the handles of its C interface, which is stable from version to version: for C functions that
// a package of AOTInductor calls in place of ops.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

inline void must(AOTITorchError error, const char* what) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(what);
}

// A tensor behind a handle; sizes of 1 have stride 0.
struct View {
    void* data = nullptr;
    int32_t dtype = 0, device_type = 0, device = 0;
    std::vector<int64_t> sizes, strides;

    explicit View(AtenTensorHandle handle) {
        int64_t dims, *numbers;
        must(aoti_torch_get_dim(handle, &dims), "dim");
        must(aoti_torch_get_sizes(handle, &numbers), "sizes");
        sizes.assign(numbers, numbers + dims);
        must(aoti_torch_get_strides(handle, &numbers), "strides");
        strides.assign(numbers, numbers + dims);
        must(aoti_torch_get_dtype(handle, &dtype), "dtype");
        must(aoti_torch_get_device_type(handle, &device_type), "device");
        must(aoti_torch_get_device_index(handle, &device), "device");
        must(aoti_torch_get_data_ptr(handle, &data), "data");
        for (int64_t d = 0; d < dims; d++)
            if (sizes[d] == 1) strides[d] = 0;
    }
    int64_t numel() const {
        return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
    }
};

// An owned handle.
struct Handle {
    AtenTensorHandle handle = nullptr;
    Handle() = default;
    explicit Handle(AtenTensorHandle owned) : handle(owned) {}
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;
    ~Handle() {
        if (handle) aoti_torch_delete_tensor_object(handle);
    }
    AtenTensorHandle release() { return std::exchange(handle, nullptr); }
};

// Uninitialised, on the device of `like`.
inline AtenTensorHandle empty(const View& like, int32_t dtype, const std::vector<int64_t>& sizes,
                              const std::vector<int64_t>& strides) {
    AtenTensorHandle made;
    must(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, like.device_type, like.device,
                                  &made), "memory");
    return made;
}

// The output of the ops: [B, H, q_len, Dv], laid out in memory as [B, q_len, H, Dv].
inline AtenTensorHandle empty_out(const View& q, const View& v) {
    int64_t heads = q.sizes[1], length = q.sizes[2], dim = v.sizes[3];
    return empty(q, q.dtype, {q.sizes[0], heads, length, dim}, {length * heads * dim, dim, heads * dim, 1});
}

// Run an op: what it throws becomes a line on stderr and an error code, as torch's C interface wants it.
inline AOTITorchError reported(const char* name, AtenTensorHandle* result,
                               const std::function<AtenTensorHandle()>& work) {
    try {
        *result = work();
        return AOTI_TORCH_SUCCESS;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "sparsify::%s: %s\n", name, error.what());
        return AOTI_TORCH_FAILURE;
    }
}

}  // namespace
