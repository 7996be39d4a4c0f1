// Selection and attention on Hopper, launched from C++: what hopper_select.py, select.py and hopper.py do around their
// kernels in Python, for plain masks. Two users: packages (hopper_shim.cpp), where there is no Python, and Python itself
// (hopper_native.cpp), where the launches alone took .17 ms a call.
//
// The machine code comes from hopper_code.py; whoever includes this says how kernels are found (`kernel_at`). CUDA's
// driver is looked up while running: nothing of CUDA is needed to compile this. Tensors are those of the callers, and
// so is the memory: each call tells how much it wants. Launches go to the given stream, so CUDA graphs may capture them.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t ROWS = 128, KEYS = 64;  // of a query block, of a key block
constexpr int64_t CHUNK = 32;             // key blocks that peaks are estimated of at once
constexpr int64_t PEAK_PROGRAMS = 2;      // per multiprocessor
constexpr int64_t SAMPLES = 512;          // keys of a head that the scale of e4m3 is taken from
constexpr int64_t CHANNELS = 16;          // that a program samples
constexpr int64_t TILE = 2;               // key blocks of a compute tile
constexpr int64_t LEVELS = 256;           // the queue's counter lies behind so many cursors
constexpr int64_t FACTS = 32;             // blocks whose facts a program gathers
// Of lists in pieces, as in splits.py:
constexpr int64_t MOST_ROWS = 128, MOST_UNITS = 512, FEWEST_KEY_BLOCKS = 64, SHORTEST = 8, MERGED_VALUES = 512;
constexpr double LOG2_E = 1.4426950408889634;

int64_t count_blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }

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

const Kernel& kernel_at(int64_t number);

// A tensor [B, H, L, D] with dense rows.
struct Rows {
    void* data;
    int64_t sizes[4], strides[4];
};

// A mask of keys, bool [rows, S], dense in S; rows 0: none, 1: one for all.
struct Shown {
    void* data;
    int64_t rows, stride;
};

// What selection is called with; strides of q and k are multiples of 16 elements, and so are their addresses of bytes.
struct Selection {
    Rows q, k;
    Shown shown;
    int64_t causal_offset;  // S or more: every row sees every key
    double scale, tolerance, max_density;
    int64_t sinks, local, singles;
    void *kept, *counts;  // results: lists as in blocks.py
    int64_t sample, quantise, estimate, pack;  // kernels
    int64_t device;
};

// What attention is called with, over lists or over every block; tensors as the copy engine addresses them.
struct Attention {
    Rows q, k, v, out;
    Shown shown;
    int64_t causal_offset;
    double scale;
    void *kept, *counts, *lse;  // lists as in blocks.py, or none
    int64_t pieces;             // to cut the lists into, all together; 0: they stay whole
    int64_t attend, order;      // kernels: for lists whole or in pieces, or for none; what queues or cuts the lists
    int64_t facts, merge;
    int64_t device;
};

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// Functions of the driver, under the names that its header gives them.
struct Driver {
    int (*get_device)(int*);
    int (*retain)(void**, int);
    int (*push)(void*);
    int (*pop)(void**);
    int (*get_attribute)(int*, int, int);
    int (*load)(void**, const void*);
    int (*find)(void**, void*, const char*);
    int (*set_attribute)(void*, int, int);
    int (*set_cache)(void*, int);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
    int (*encode)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                  const uint32_t*, int, int, int, int);
    int (*fill)(void*, unsigned, size_t, void*);
    int (*name_of)(int, const char**);

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) throw std::runtime_error("CUDA's driver (libcuda.so.1) cannot be loaded");
        auto take = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            if (!function) throw std::runtime_error(std::string("CUDA's driver is too old: it has no ") + name);
        };
        take(get_device, "cuCtxGetDevice");
        take(retain, "cuDevicePrimaryCtxRetain");
        take(push, "cuCtxPushCurrent_v2");
        take(pop, "cuCtxPopCurrent_v2");
        take(get_attribute, "cuDeviceGetAttribute");
        take(load, "cuModuleLoadData");
        take(find, "cuModuleGetFunction");
        take(set_attribute, "cuFuncSetAttribute");
        take(set_cache, "cuFuncSetCacheConfig");
        take(launch, "cuLaunchKernel");
        take(encode, "cuTensorMapEncodeTiled");
        take(fill, "cuMemsetD32Async");
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

// A device and its kernels, each loaded once.
class Device {
public:
    static Device& of(int64_t number) {
        static std::mutex lock;
        static std::map<int64_t, Device> known;
        std::lock_guard<std::mutex> guard(lock);
        return known.try_emplace(number, number).first->second;
    }

    explicit Device(int64_t ordinal) : number(int(ordinal)) {
        constexpr int MULTIPROCESSOR_COUNT = 16;
        int count;
        driver().check(driver().get_attribute(&count, MULTIPROCESSOR_COUNT, number), "cuDeviceGetAttribute");
        driver().check(driver().retain(&context, number), "cuDevicePrimaryCtxRetain");
        multiprocessors = count;
    }

    void* function_of(int64_t number) {
        constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, PREFER_SHARED = 1, USUAL_SHARED = 48 << 10;
        std::lock_guard<std::mutex> guard(lock);
        void*& function = functions[number];
        if (function) return function;
        const Kernel& kernel = kernel_at(number);
        void *module, *found;
        driver().check(driver().load(&module, kernel.image), "cuModuleLoadData");
        driver().check(driver().find(&found, module, kernel.name), "cuModuleGetFunction");
        if (kernel.shared > USUAL_SHARED) {
            driver().check(driver().set_cache(found, PREFER_SHARED), "cuFuncSetCacheConfig");
            driver().check(driver().set_attribute(found, MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared),
                           "cuFuncSetAttribute");
        }
        return function = found;
    }

    const int number;
    int64_t multiprocessors = 0;
    void* context = nullptr;  // torch's, the primary one

private:
    std::mutex lock;
    std::map<int64_t, void*> functions;
};

// While it lives, the calling thread works on a device: threads begin with none, and may work on another.
class Working {
public:
    explicit Working(const Device& device) {
        int now;
        if (!driver().get_device(&now) && now == device.number) return;
        driver().check(driver().push(device.context), "cuCtxPushCurrent");
        pushed = true;
    }
    Working(const Working&) = delete;
    Working& operator=(const Working&) = delete;
    ~Working() {
        void* context;
        if (pushed) driver().pop(&context);
    }

private:
    bool pushed = false;
};

// The parameters of a launch, in the order of the kernel's.
class Launch {
public:
    Launch(Device& device, int64_t number) : kernel(kernel_at(number)), function(device.function_of(number)) {
        values.reserve(72);
    }

    template <class T>
    void pass(T value) {
        auto& room = values.emplace_back();
        static_assert(sizeof value <= sizeof room);
        *reinterpret_cast<T*>(&room) = value;
    }
    template <class... T>
    void pass_pointers(const T*... pointers) {
        (pass(const_cast<void*>(static_cast<const void*>(pointers))), ...);
    }
    void pass_numbers(std::initializer_list<int64_t> numbers) {
        for (int64_t number : numbers) {
            if (number != int32_t(number)) throw std::runtime_error("a length is beyond 32 bits");
            pass(int32_t(number));
        }
    }

    // A tensor for the copy engine, whose sizes and strides follow it.
    void describe(const Rows& x) { describe(x.data, {x.sizes, x.sizes + 4}, {x.strides, x.strides + 4}); }
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

    void run(int64_t x, int64_t y, void* stream) {
        pass_pointers<void, void>(nullptr, nullptr);  // scratch of Triton's own, which these kernels have none of
        void* addresses[96];
        for (size_t i = 0; i < values.size(); i++) addresses[i] = &values[i];
        driver().check(driver().launch(function, x, y, 1, kernel.threads, 1, 1, kernel.shared, stream, addresses,
                                       nullptr), "cuLaunchKernel");
    }

private:
    const Kernel& kernel;
    void* function;
    int boxes = 0;
    std::vector<TensorMap> values;  // each in room for the largest
};

// Memory that a call gives away piece by piece; without any, it measures.
struct Memory {
    char* start = nullptr;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        constexpr int64_t ALIGNMENT = 256;
        char* place = start + used;
        used += (count * int64_t(sizeof(T)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        return reinterpret_cast<T*>(place);
    }
};

// The sizes of a selection, and the memory between its kernels.
struct Summaries {
    int64_t batch, heads, kv_heads, length, kv_len, dim, query_blocks, key_blocks, blocks, room, masks, programs;
    float *ranges, *units, *peaks;
    uint8_t *vectors, *whole;  // e4m3
    int32_t* visible;
    uint16_t* scratch;  // bfloat16

    Summaries(const Selection& call, Memory& memory, int64_t multiprocessors)
        : batch(call.q.sizes[0]), heads(call.q.sizes[1]), kv_heads(call.k.sizes[1]), length(call.q.sizes[2]),
          kv_len(call.k.sizes[2]), dim(call.q.sizes[3]), query_blocks(count_blocks(length, ROWS)),
          key_blocks(count_blocks(kv_len, KEYS)), blocks(batch * heads * query_blocks),
          room(count_blocks(key_blocks, CHUNK) * CHUNK), masks(std::max<int64_t>(call.shown.rows, 1)),
          programs(std::min(blocks, PEAK_PROGRAMS * multiprocessors)),
          ranges(memory.take<float>(batch * kv_heads * 3 * dim)), units(memory.take<float>(batch * kv_heads * 2)),
          peaks(memory.take<float>(blocks * key_blocks)),
          vectors(memory.take<uint8_t>(batch * kv_heads * (call.singles + 2) * room * dim)),
          whole(memory.take<uint8_t>(batch * kv_heads * room * KEYS * dim)),
          visible(memory.take<int32_t>(masks * room)), scratch(memory.take<uint16_t>(programs * room * ROWS)) {}
};

// Bytes of memory that `select` wants.
int64_t memory_of(const Selection& call) {
    Memory memory;
    Summaries(call, memory, Device::of(call.device).multiprocessors);
    return memory.used;
}

// Summaries, peaks, kept lists.
void select(const Selection& call, void* given, void* stream) {
    Device& device = Device::of(call.device);
    Working working(device);
    Memory memory{static_cast<char*>(given)};
    Summaries s(call, memory, device.multiprocessors);
    const Rows &q = call.q, &k = call.k;
    int64_t kv_rows = s.batch * s.kv_heads, offset = std::min(call.causal_offset, s.kv_len + KEYS);
    bool masked = call.shown.rows, by_row = call.shown.rows > 1;
    const void* shown = masked ? call.shown.data : s.visible;  // what stands for absent tensors is not read
    int64_t mask_stride = by_row ? call.shown.stride : 0;

    Launch sample(device, call.sample);
    sample.pass_pointers(k.data, shown, s.ranges);
    sample.pass(k.strides[0]);
    sample.pass_numbers({k.strides[1], k.strides[2], mask_stride, s.kv_len, s.kv_heads,
                         count_blocks(s.kv_len, SAMPLES)});
    sample.run(s.dim / CHANNELS, kv_rows, stream);

    Launch quantise(device, call.quantise);
    quantise.pass_pointers(k.data, shown, s.ranges, s.vectors, s.whole, s.visible, s.units);
    quantise.pass(k.strides[0]);
    quantise.pass_numbers({k.strides[1], k.strides[2], mask_stride, s.kv_len, s.kv_heads, s.room, s.masks});
    quantise.run(s.key_blocks, kv_rows, stream);

    Launch estimate(device, call.estimate);
    estimate.pass_pointers(q.data);
    estimate.describe(s.vectors, {kv_rows * (call.singles + 2) * s.room, s.dim}, {s.dim, 1});
    estimate.describe(s.whole, {kv_rows * s.room * KEYS, s.dim}, {s.dim, 1});
    estimate.pass_pointers(shown, s.visible, s.units, s.peaks, s.scratch);
    estimate.pass(q.strides[0]);
    estimate.pass_numbers({q.strides[1], q.strides[2], mask_stride, by_row ? s.room : 0, s.batch * s.heads,
                           s.query_blocks, s.key_blocks, s.room, s.heads, s.heads / s.kv_heads, s.length, s.kv_len,
                           offset});
    estimate.pass(float(call.scale * LOG2_E));
    estimate.pass(float(call.scale * call.scale * LOG2_E));
    estimate.pass(float(std::log2(double(KEYS - call.singles))));
    estimate.run(s.programs, 1, stream);

    Launch pack(device, call.pack);
    pack.pass_pointers(s.peaks);
    if (masked) pack.pass_pointers(s.visible, s.visible);  // allowed are blocks with keys in either
    pack.pass_pointers(call.kept, call.counts);
    pack.pass_numbers({by_row ? s.room : 0, s.query_blocks, s.key_blocks,
                       (count_blocks(s.key_blocks, TILE) + 1) * TILE, s.heads, s.length, offset});
    pack.pass(float(call.tolerance));
    pack.pass(float(call.max_density));
    pack.pass_numbers({call.sinks, call.local});
    pack.run(s.blocks, 1, stream);
}

// Pieces to cut the lists of `blocks` query blocks into, all together; 0: none.
int64_t units_for(int64_t blocks, int64_t key_blocks, int64_t device) {
    int64_t programs = Device::of(device).multiprocessors;
    if (2 * blocks > programs || blocks > MOST_ROWS || key_blocks < FEWEST_KEY_BLOCKS) return 0;
    return std::min(programs, MOST_UNITS - MOST_ROWS);
}

// The sizes of an attention, and the memory between its kernels.
struct Order {
    bool walks_all, in_pieces;
    int64_t query_blocks, key_blocks, blocks, units, value_dim;  // units: room for pieces, or query blocks
    int64_t fact_words;                                          // of one row of a key mask
    int64_t *queue, *facts;
    int32_t *cursors, *counter, *firsts;
    float *partial, *sums;

    Order(const Attention& call, Memory& memory)
        : walks_all(!call.kept), in_pieces(call.pieces > 0), query_blocks(count_blocks(call.q.sizes[2], ROWS)),
          key_blocks(count_blocks(call.k.sizes[2], KEYS)), blocks(call.q.sizes[0] * call.q.sizes[1] * query_blocks),
          units(call.pieces + blocks), value_dim(64), fact_words(3 * (key_blocks + TILE)) {
        while (value_dim < call.v.sizes[3]) value_dim *= 2;
        queue = memory.take<int64_t>(walks_all ? 1 : units);
        facts = memory.take<int64_t>(call.shown.rows * fact_words);
        cursors = memory.take<int32_t>(LEVELS + 1);
        counter = cursors + (in_pieces ? 0 : LEVELS);
        firsts = memory.take<int32_t>(in_pieces ? blocks + 1 : 0);
        partial = memory.take<float>(in_pieces ? units * ROWS * value_dim : 0);
        sums = memory.take<float>(in_pieces ? units * ROWS : 0);
    }
};

// Bytes of memory that `attend` wants.
int64_t memory_of(const Attention& call) {
    Memory memory;
    Order(call, memory);
    return memory.used;
}

// Attention over kept lists, whole or in pieces, or over every block that causality shows.
void attend(const Attention& call, void* given, void* stream) {
    Device& device = Device::of(call.device);
    Working working(device);
    Memory memory{static_cast<char*>(given)};
    Order order(call, memory);
    int64_t heads = call.q.sizes[1], kv_heads = call.k.sizes[1], length = call.q.sizes[2], kv_len = call.k.sizes[2];
    int64_t capacity = order.walks_all ? 0 : count_blocks(order.key_blocks, TILE) + 1;
    bool masked = call.shown.rows, by_row = call.shown.rows > 1;

    if (order.in_pieces) {
        Launch cut(device, call.order);
        cut.pass_pointers(call.counts, order.queue, order.firsts, order.counter);
        cut.pass_numbers({order.blocks, order.units, call.pieces, SHORTEST / TILE, device.multiprocessors});
        cut.run(order.blocks, 1, stream);
    } else if (order.walks_all) {
        driver().check(driver().fill(order.counter, 0, 1, stream), "cuMemsetD32Async");
    } else {
        Launch fill(device, call.order);
        fill.pass_pointers(call.counts, order.queue, order.cursors);
        fill.pass_numbers({order.blocks, capacity});
        fill.run(1, 1, stream);
    }

    if (masked) {
        Launch gather(device, call.facts);
        gather.pass_pointers(call.shown.data, order.facts, order.facts);
        gather.pass_numbers({kv_len, order.key_blocks + TILE, by_row ? call.shown.stride : 0, 0});
        gather.run(count_blocks(order.key_blocks + TILE, FACTS), call.shown.rows, stream);
    }

    Launch launch(device, call.attend);
    for (const Rows* x : {&call.q, &call.k, &call.v}) launch.describe(*x);
    if (order.in_pieces) launch.pass_pointers(order.partial, order.sums);
    else launch.describe(call.out), launch.pass_pointers(call.lse);
    launch.pass_pointers(order.walks_all ? order.queue : call.kept, order.queue, order.counter);
    launch.pass_numbers({order.units, capacity, order.query_blocks, heads, heads / kv_heads, length, kv_len,
                         std::min(call.causal_offset, kv_len)});
    launch.pass(float(call.scale * LOG2_E));
    const void* absent = call.q.data;
    launch.pass_numbers({0});                // no window
    launch.pass_pointers(absent, absent);    // nor documents
    launch.pass_numbers({0, 0});
    launch.pass_pointers(absent);            // nor a mask tensor
    launch.pass_numbers({0, 0, 0, 0});
    launch.pass(0.0f);                       // nor a cap
    launch.pass_pointers(absent);            // nor sinks
    launch.pass_pointers(masked ? order.facts : order.queue);
    launch.pass_numbers({by_row ? order.fact_words : 0});
    launch.pass_pointers(order.queue);
    launch.pass_numbers({0});
    launch.run(std::min(order.units, device.multiprocessors), 1, stream);

    if (order.in_pieces) {
        Launch merge(device, call.merge);
        merge.pass_pointers(order.partial, order.sums, order.firsts, order.partial, call.out.data, call.lse);
        merge.pass_numbers({order.query_blocks, heads, length});
        merge.run(order.blocks * (ROWS * order.value_dim / MERGED_VALUES), 1, stream);
    }
}

}  // namespace
