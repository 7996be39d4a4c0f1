// The Gluon kernels of packages for Hopper, launched from C++: what hopper_select.py and hopper.py do around them in
// Python. For packages that run where sparsify, Triton and Python are not.
//
// AOTInductor calls aoti_torch_cuda_hopper_peaks and aoti_torch_cuda_hopper_attention (see the end), the two ops of
// hopper_packed.py, and links this file into the package, with the machine code that hopper_packed.py writes behind it
// as KERNELS. CUDA's driver is looked up while running: nothing of CUDA is needed to compile this. Launches go to the
// stream that torch has as current, so CUDA graphs may capture them.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>

#include "handles.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // of libtorch_cuda

namespace {

constexpr int64_t ROWS = 128, KEYS = 64;  // of a query block, of a key block
constexpr int64_t CHUNK = 32;             // key blocks that peaks are estimated of at once
constexpr int64_t PEAK_PROGRAMS = 2;      // per multiprocessor
constexpr int64_t TILE = 2;               // key blocks of a compute tile
constexpr int64_t LEVELS = 256;           // the queue's counter lies behind so many cursors
constexpr double LOG2_E = 1.4426950408889634;

// How a kernel wants a tensor described to the copy engine; numbers as the driver takes them.
struct Box {
    int swizzle, element_type, element_bytes, rank;
    uint32_t sizes[4];
};

// Machine code of one kernel; `boxes` in the order of its descriptors.
struct Kernel {
    const unsigned char* image;
    const char* name;
    unsigned shared, threads;
    const Box* boxes;
};

extern const Kernel KERNELS[];

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// Functions of the driver, under the names that its header gives them.
struct Driver {
    int (*get_device)(int*);
    int (*get_attribute)(int*, int, int);
    int (*load)(void**, const void*);
    int (*find)(void**, void*, const char*);
    int (*set_attribute)(void*, int, int);
    int (*set_cache)(void*, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*encode)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                  const uint32_t*, int, int, int, int);
    int (*name_of)(int, const char**);

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) throw std::runtime_error("CUDA's driver (libcuda.so.1) cannot be loaded");
        auto take = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            if (!function) throw std::runtime_error(std::string("CUDA's driver is too old: it has no ") + name);
        };
        take(get_device, "cuCtxGetDevice");
        take(get_attribute, "cuDeviceGetAttribute");
        take(load, "cuModuleLoadData");
        take(find, "cuModuleGetFunction");
        take(set_attribute, "cuFuncSetAttribute");
        take(set_cache, "cuFuncSetCacheConfig");
        take(launch, "cuLaunchKernel");
        take(encode, "cuTensorMapEncodeTiled");
        take(name_of, "cuGetErrorName");
    }

    void check(int error, const char* what) const {
        if (!error) return;
        const char* name = nullptr;
        name_of(error, &name);
        throw std::runtime_error(std::string(what) + " failed: " + (name ? name : "unknown error"));
    }
};

const Driver& driver() {
    static const Driver found;
    return found;
}

int64_t multiprocessors(int device) {
    constexpr int MULTIPROCESSOR_COUNT = 16;
    int count;
    driver().check(driver().get_attribute(&count, MULTIPROCESSOR_COUNT, device), "cuDeviceGetAttribute");
    return count;
}

// A kernel on the current device, loaded once.
void* function_of(int64_t number, int device) {
    constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, PREFER_SHARED = 1;
    static std::mutex lock;
    static std::map<std::pair<int64_t, int>, void*> known;
    std::lock_guard<std::mutex> guard(lock);
    void*& function = known[{number, device}];
    if (function) return function;
    const Kernel& kernel = KERNELS[number];
    void *module, *found;
    driver().check(driver().load(&module, kernel.image), "cuModuleLoadData");
    driver().check(driver().find(&found, module, kernel.name), "cuModuleGetFunction");
    driver().check(driver().set_cache(found, PREFER_SHARED), "cuFuncSetCacheConfig");
    driver().check(driver().set_attribute(found, MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared), "cuFuncSetAttribute");
    return function = found;
}

// The parameters of a launch, in the order of the kernel's.
class Launch {
public:
    explicit Launch(int64_t number, int32_t torch_device) : kernel(KERNELS[number]) {
        driver().check(driver().get_device(&device), "cuCtxGetDevice");
        function = function_of(number, device);
        must(aoti_torch_get_current_cuda_stream(torch_device, &stream), "stream");
    }

    template <class T>
    void pass(T value) {
        auto& room = values.emplace_back();
        static_assert(sizeof value <= sizeof room);
        *reinterpret_cast<T*>(&room) = value;
    }
    void pass_numbers(std::initializer_list<int64_t> numbers) {
        for (int64_t number : numbers) {
            if (number != int32_t(number)) throw std::runtime_error("a length is beyond 32 bits");
            pass(int32_t(number));
        }
    }

    // A tensor for the copy engine, whose sizes and strides follow it.
    void describe(const View& x) { describe(x.data, x.sizes, x.strides); }
    void describe(void* data, const std::vector<int64_t>& own_sizes, std::vector<int64_t> own) {
        const Box& box = kernel.boxes[boxes++];
        int rank = box.rank;
        uint64_t sizes[4], strides[4];  // the engine's order: the last dimension first, and its stride left out
        uint32_t box_sizes[4], steps[4] = {1, 1, 1, 1};
        for (int d = 0; d < rank; d++) {
            // The stride of a dimension of size 1 means nothing to torch, but the engine checks it.
            if (own_sizes[d] == 1) own[d] = d + 1 < rank ? box.sizes[rank - 1] : 1;
            sizes[rank - 1 - d] = own_sizes[d], box_sizes[rank - 1 - d] = box.sizes[d];
            if (d + 1 < rank) strides[rank - 2 - d] = own[d] * box.element_bytes;
        }
        constexpr int NO_INTERLEAVE = 0, PROMOTE_128_BYTES = 2, FILL_WITH_ZEROS = 0;
        auto& map = values.emplace_back();
        driver().check(driver().encode(&map, box.element_type, rank, data, sizes, strides, box_sizes, steps,
                                       NO_INTERLEAVE, box.swizzle, PROMOTE_128_BYTES, FILL_WITH_ZEROS),
                       "cuTensorMapEncodeTiled");
        for (int d = 0; d < rank; d++) pass(int32_t(own_sizes[d]));
        for (int d = 0; d < rank; d++) pass(own[d]);
    }

    int64_t programs(int64_t most, int64_t per_multiprocessor) const {
        return std::min(most, per_multiprocessor * multiprocessors(device));
    }

    void run(int64_t count) {
        pass<void*>(nullptr), pass<void*>(nullptr);  // scratch for Triton's own, which these kernels have none of
        std::vector<void*> addresses;
        for (auto& value : values) addresses.push_back(&value);
        driver().check(driver().launch(function, count, 1, 1, kernel.threads, 1, 1, kernel.shared, stream,
                                       addresses.data(), nullptr), "cuLaunchKernel");
    }

private:
    const Kernel& kernel;
    int device = 0, boxes = 0;
    void *function = nullptr, *stream = nullptr;
    std::vector<TensorMap> values;  // each in room for the largest
};

// A tensor [B, H, L, D] as the kernels can address it: rows dense, all else a multiple of `unit` elements; or a copy.
struct Addressable {
    Handle copy;
    View view;

    Addressable(AtenTensorHandle x, int64_t unit) : view(x) {
        bool fits = (view.strides[3] == 1 || view.sizes[3] == 1) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
        for (int d = 0; d < 3; d++) fits = fits && view.strides[d] % unit == 0 && (view.strides[d] || view.sizes[d] == 1);
        if (fits) return;
        int64_t heads = view.sizes[1], length = view.sizes[2], dim = view.sizes[3];
        copy.handle = empty(view, view.dtype, view.sizes, {heads * length * dim, length * dim, dim, 1});
        must(aoti_torch_copy_(copy.handle, x, 0), "copy");
        view = View(copy.handle);
    }
};

int64_t count_blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Peaks of all key blocks, [B, H, query blocks, key blocks] and flat, as all that hopper_packed.py has made.
AtenTensorHandle estimate(AtenTensorHandle q, const View& vectors, const View& whole, const View* key_mask,
                          const View& counts, const View& units, int64_t kv_len, const int64_t* causal_offset,
                          double scale, int64_t singles, int64_t number) {
    Addressable queries(q, 16);
    const View& x = queries.view;
    int64_t batch = x.sizes[0], heads = x.sizes[1], length = x.sizes[2], dim = x.sizes[3];
    int64_t kv_heads = units.numel() / 2 / batch, query_blocks = count_blocks(length, ROWS);
    int64_t key_blocks = count_blocks(kv_len, KEYS);
    int64_t room = count_blocks(key_blocks, CHUNK) * CHUNK, blocks = batch * heads * query_blocks;
    Launch launch(number, x.device);
    int64_t programs = launch.programs(blocks, PEAK_PROGRAMS);
    Handle out{empty(x, aoti_torch_dtype_float32(), {blocks * key_blocks}, {1})};
    Handle scratch{empty(x, aoti_torch_dtype_bfloat16(), {programs * room * ROWS}, {1})};
    bool by_row = key_mask && key_mask->sizes[0] > 1;
    launch.pass(x.data);
    for (const View* rows : {&vectors, &whole}) launch.describe(rows->data, {rows->numel() / dim, dim}, {dim, 1});
    launch.pass(key_mask ? key_mask->data : counts.data);
    launch.pass(counts.data);
    launch.pass(units.data);
    launch.pass(View(out.handle).data);
    launch.pass(View(scratch.handle).data);
    launch.pass(x.strides[0]);
    launch.pass_numbers({x.strides[1], x.strides[2], by_row ? kv_len : 0, by_row ? room : 0, batch * heads,
                         query_blocks, key_blocks, room, heads, heads / kv_heads, length, kv_len,
                         causal_offset ? *causal_offset : kv_len + KEYS});
    launch.pass(float(scale * LOG2_E));
    launch.pass(float(scale * scale * LOG2_E));
    launch.pass(float(std::log2(double(KEYS - singles))));
    launch.run(programs);
    return out.release();
}

// Attention over kept lists, in the order of the queue; `key_facts` of hopper_facts.py under a key mask.
AtenTensorHandle attend(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, const View& kept, const View& queue,
                        const View& cursors, const View* key_facts, const int64_t* causal_offset, double scale,
                        int64_t number) {
    Addressable queries(q, 8), keys(k, 8), values(v, 8);
    const View& x = queries.view;
    int64_t batch = x.sizes[0], heads = x.sizes[1], length = x.sizes[2], kv_heads = keys.view.sizes[1];
    int64_t kv_len = keys.view.sizes[2], query_blocks = count_blocks(length, ROWS);
    int64_t key_blocks = count_blocks(kv_len, KEYS), blocks = batch * heads * query_blocks;
    int64_t facts = 3 * (key_blocks + TILE);  // of one row of a key mask
    Handle out{empty_out(x, values.view)};
    Handle lse{empty(x, aoti_torch_dtype_float32(), {batch, heads, length}, {heads * length, length, 1})};
    Launch launch(number, x.device);
    launch.describe(x);
    launch.describe(keys.view);
    launch.describe(values.view);
    launch.describe(View(out.handle));
    launch.pass(View(lse.handle).data);
    launch.pass(kept.data);
    launch.pass(queue.data);
    launch.pass<void*>(static_cast<int32_t*>(cursors.data) + LEVELS);
    launch.pass_numbers({blocks, count_blocks(key_blocks, TILE) + 1, query_blocks, heads, heads / kv_heads, length, kv_len,
                         causal_offset ? *causal_offset : kv_len});
    launch.pass(float(scale * LOG2_E));
    launch.pass_numbers({0});          // no window
    launch.pass(x.data), launch.pass(x.data);  // nor documents: what stands for absent tensors is not read
    launch.pass_numbers({0, 0});
    launch.pass(x.data);               // nor a mask tensor
    launch.pass_numbers({0, 0, 0, 0});
    launch.pass(0.0f);                 // nor a cap
    launch.pass(x.data);               // nor sinks
    launch.pass(key_facts ? key_facts->data : queue.data);
    launch.pass_numbers({key_facts && key_facts->numel() > facts ? facts : 0});
    launch.pass(queue.data);
    launch.pass_numbers({0});
    launch.run(launch.programs(blocks, 1));
    return out.release();
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cuda_hopper_peaks(
    AtenTensorHandle q, AtenTensorHandle vectors, AtenTensorHandle whole, AtenTensorHandle* key_mask,
    AtenTensorHandle counts, AtenTensorHandle units, int64_t kv_len, int64_t* causal_offset, double scale,
    int64_t singles, int64_t kernel, AtenTensorHandle* result) {
    return reported("hopper_peaks", result, [&] {
        std::vector<View> mask;
        if (key_mask) mask.emplace_back(*key_mask);
        return estimate(q, View(vectors), View(whole), key_mask ? &mask[0] : nullptr, View(counts), View(units), kv_len,
                        causal_offset, scale, singles, kernel);
    });
}

extern "C" AOTITorchError aoti_torch_cuda_hopper_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle kept, AtenTensorHandle queue,
    AtenTensorHandle cursors, AtenTensorHandle* key_facts, int64_t* causal_offset, double scale, int64_t kernel,
    AtenTensorHandle* result) {
    return reported("hopper_attention", result, [&] {
        std::vector<View> facts;
        if (key_facts) facts.emplace_back(*key_facts);
        return attend(q, k, v, View(kept), View(queue), View(cursors), key_facts ? &facts[0] : nullptr, causal_offset,
                      scale, kernel);
    });
}
