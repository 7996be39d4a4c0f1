// The ops of exported graphs in plain C++, for packages that run where sparsify and Python are not: planned_attention
// and exact_attention on a CPU, over the handles of torch's C interface, which is stable from version to version.
//
// AOTInductor calls aoti_torch_cpu_planned_attention and aoti_torch_cpu_exact_attention (see the end) and links this
// file into the package. The kernels are those of native.cpp; what Python does around them there (kernels/rule.py,
// blocks.py, native.py, sparsify/ops/exact.py) is done here again: the same sets of blocks, the same kept lists, the
// same choice of exact kernel. tests/kernels/test_shim.py holds the two together.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>

#include "handles.h"
#include "native.cpp"

namespace {

constexpr int TILE = 2;                // key blocks per compute tile
constexpr int64_t LONG_ON_CPU = 1024;  // queries and keys

// Run `work` on every thread that torch would use, at most `items`.
void on_all_threads(int64_t items, const std::function<void()>& work) {
    uint32_t threads = 1;
    must(torch_get_num_threads(&threads), "torch has no threads");
    auto call = [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; i++) (*static_cast<const std::function<void()>*>(context))();
    };
    int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, items));
    must(torch_parallel_for(0, count, 1, call, const_cast<std::function<void()>*>(&work)), "a thread failed");
}

// Run `work(i)` for i below `count`, shared among threads.
void for_each(int64_t count, const std::function<void(int64_t)>& work) {
    auto call = [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; i++) (*static_cast<const std::function<void(int64_t)>*>(context))(i);
    };
    must(torch_parallel_for(0, count, 1, call, const_cast<std::function<void(int64_t)>*>(&work)), "a thread failed");
}

struct half_bits { uint16_t bits; };
float widen(float x) { return x; }
float widen(double x) { return float(x); }
float widen(bfloat16 x) { return added(x); }
float widen(half_bits x) {
    _Float16 y;
    std::memcpy(&y, &x, sizeof y);
    return float(y);
}
float narrow(float x, float) { return x; }
half_bits narrow(float x, half_bits) {
    _Float16 y = _Float16(x);
    half_bits bits;
    std::memcpy(&bits, &y, sizeof y);
    return bits;
}
bfloat16 narrow(float x, bfloat16) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Call `work` with a value of the floating type that a dtype names.
template <class Work>
void with_type(int32_t dtype, Work work) {
    if (dtype == aoti_torch_dtype_float32()) return work(float{});
    if (dtype == aoti_torch_dtype_bfloat16()) return work(bfloat16{});
    if (dtype == aoti_torch_dtype_float16()) return work(half_bits{});
    throw std::runtime_error("attention runs in float32, bfloat16 and float16 here");
}

// [B, H, L, D] in float32 with a dense last dimension: the tensor itself, or a copy.
struct Floats {
    std::vector<float> copy;
    Tensor tensor;
    int64_t batch, heads, length, dim;

    explicit Floats(const View& x) : batch(x.sizes[0]), heads(x.sizes[1]), length(x.sizes[2]), dim(x.sizes[3]) {
        if (x.dtype == aoti_torch_dtype_float32() && (x.strides[3] == 1 || dim == 1)) {
            tensor = {(float*)x.data, x.strides[0], x.strides[1], x.strides[2]};
            return;
        }
        copy.resize(x.numel());
        tensor = {copy.data(), heads * length * dim, length * dim, dim};
        with_type(x.dtype, [&](auto type) {
            for_each(batch * heads, [&](int64_t i) {
                auto from = (const decltype(type)*)x.data + i / heads * x.strides[0] + i % heads * x.strides[1];
                float* to = copy.data() + i * length * dim;
                for (int64_t r = 0; r < length; r++)
                    for (int64_t d = 0; d < dim; d++) *to++ = widen(from[r * x.strides[2] + d * x.strides[3]]);
            });
        });
    }
};

// Masks as the op got them, and what is derived of them; see kernels/masks.py.
struct Given {
    const int64_t *causal_offset, *window;
    AtenTensorHandle *key_mask, *query_documents, *key_documents, *attn_mask, *sink_logits, *protected_keys;
    double softcap;
};

struct Blocks {
    int64_t q_len, kv_len, rows, blocks, batch = 1;  // batch: that of the sets below, or 1
    bool causal, windowed, plain;
    int64_t offset, window;
    std::vector<uint8_t> shown;  // [batch of the key mask, kv_len]
    int64_t shown_rows = 0;
    std::vector<int64_t> query_documents, key_documents;
    int64_t query_rows = 0, key_rows = 0;
    std::vector<uint8_t> allowed, kinds;  // [batch, rows, blocks]
    std::vector<int64_t> visible;         // [batch of the key mask or 1, blocks]
    std::vector<uint8_t> guarded;         // [batch of protected keys, blocks]
    int64_t guarded_rows = 0;

    const uint8_t* allowed_at(int64_t b, int64_t row) const {
        return allowed.data() + ((batch > 1 ? b : 0) * rows + row) * blocks;
    }
    bool boundary(int64_t row, int64_t block) const {
        return causal && block * KEYS + KEYS - 1 > row * ROWS + offset;
    }

    Blocks(const Given& given, int64_t queries, int64_t keys) : q_len(queries), kv_len(keys) {
        rows = (q_len + ROWS - 1) / ROWS, blocks = (kv_len + KEYS - 1) / KEYS;
        causal = given.causal_offset, windowed = given.window;
        offset = causal ? *given.causal_offset : 0, window = windowed ? *given.window : 0;
        plain = !windowed && !given.query_documents && !given.attn_mask && !given.softcap && !given.sink_logits;
        if (given.key_mask) shown = read<uint8_t>(*given.key_mask, shown_rows);
        if (given.query_documents) {
            query_documents = read<int64_t>(*given.query_documents, query_rows);
            key_documents = read<int64_t>(*given.key_documents, key_rows);
        }
        count_visible();
        if (given.protected_keys) find_guarded(read<uint8_t>(*given.protected_keys, guarded_rows));
        batch = std::max({int64_t(1), shown_rows, query_rows, key_rows});
        find_sets();
    }

    // [B or 1, length] of bools, int32 or int64, dense.
    template <class T>
    static std::vector<T> read(AtenTensorHandle handle, int64_t& count) {
        View x(handle);
        count = x.sizes[0];
        std::vector<T> made(x.numel());
        auto copy = [&](auto* from) {
            for (int64_t b = 0, i = 0; b < count; b++)
                for (int64_t j = 0; j < x.sizes[1]; j++) made[i++] = T(from[b * x.strides[0] + j * x.strides[1]]);
        };
        if (x.dtype == aoti_torch_dtype_int64()) copy((const int64_t*)x.data);
        else if (x.dtype == aoti_torch_dtype_int32()) copy((const int32_t*)x.data);
        else copy((const uint8_t*)x.data);
        return made;
    }

    void count_visible() {
        int64_t count = std::max<int64_t>(1, shown_rows);
        visible.assign(count * blocks, 0);
        for (int64_t b = 0; b < count; b++)
            for (int64_t key = 0; key < kv_len; key++)
                visible[b * blocks + key / KEYS] += shown_rows ? shown[b * kv_len + key] : 1;
    }

    void find_guarded(const std::vector<uint8_t>& keys) {
        guarded.assign(guarded_rows * blocks, 0);
        for (int64_t b = 0; b < guarded_rows; b++)
            for (int64_t key = 0; key < kv_len; key++) guarded[b * blocks + key / KEYS] |= keys[b * kv_len + key];
    }

    struct Range { int64_t low = INT64_MAX, high = INT64_MIN; };

    // Lowest and highest document of every run of `size` positions, of the shown ones alone.
    std::vector<Range> ranges(const std::vector<int64_t>& ids, int64_t b, int64_t count, int64_t length, int64_t size,
                              bool of_keys) const {
        std::vector<Range> found((length + size - 1) / size);
        for (int64_t i = 0; i < length; i++) {
            if (of_keys && shown_rows && !shown[(shown_rows > 1 ? b : 0) * kv_len + i]) continue;
            int64_t id = ids[(count > 1 ? b : 0) * length + i];
            Range& range = found[i / size];
            range.low = std::min(range.low, id), range.high = std::max(range.high, id);
        }
        return found;
    }

    void find_sets() {
        allowed.assign(batch * rows * blocks, 0), kinds.assign(batch * rows * blocks, HIDDEN);
        for (int64_t b = 0; b < batch; b++) {
            std::vector<Range> of_rows, of_keys;
            if (query_rows) {
                of_rows = ranges(query_documents, b, query_rows, q_len, ROWS, false);
                of_keys = ranges(key_documents, b, key_rows, kv_len, KEYS, true);
            }
            const int64_t* seen = visible.data() + (shown_rows > 1 ? b * blocks : 0);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t block = 0; block < blocks; block++) {
                    int64_t first_row = row * ROWS, last_row = std::min(q_len, first_row + ROWS) - 1;
                    int64_t first_key = block * KEYS, last_key = std::min(kv_len, first_key + KEYS) - 1;
                    bool may = seen[block] > 0, cut = boundary(row, block);
                    if (causal) may = may && first_key <= last_row + offset;
                    if (causal && windowed) {
                        may = may && last_key > first_row + offset - window;
                        cut = cut || first_key <= first_row + ROWS - 1 + offset - window;
                    }
                    if (query_rows) {
                        const Range &r = of_rows[row], &k = of_keys[block];
                        may = may && r.low <= k.high && k.low <= r.high;
                        cut = cut || r.low != r.high || k.low != k.high || r.low != k.low;
                    }
                    int64_t place = (b * rows + row) * blocks + block;
                    allowed[place] = may;
                    kinds[place] = may ? (cut ? WHOLE + 1 : WHOLE) : HIDDEN;
                }
        }
    }
};

// attn_mask and sink logits as native.cpp reads them, and what a block of attn_mask adds to the mass of a key block.
struct Biases {
    std::vector<float> copy, block_bias, sinks;
    Mask mask{}, of_blocks{};

    Biases(const Given& given, const Blocks& blocks, bool wants_blocks) {
        if (given.sink_logits) {
            View x(*given.sink_logits);
            with_type(x.dtype, [&](auto type) {
                for (int64_t h = 0; h < x.sizes[0]; h++)
                    sinks.push_back(widen(((const decltype(type)*)x.data)[h * x.strides[0]]));
            });
        }
        if (!given.attn_mask) return;
        View x(*given.attn_mask);
        mask = {x.data, 0, x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
        if (x.dtype == aoti_torch_dtype_bool()) mask.kind = 1;
        else if (x.dtype == aoti_torch_dtype_float32()) mask.kind = 2;
        else if (x.dtype == aoti_torch_dtype_bfloat16()) mask.kind = 3;
        else convert(x);
        if (wants_blocks) average(x, blocks);
    }

    void convert(const View& x) {
        copy.resize(x.numel());
        int64_t h = x.sizes[1], l = x.sizes[2], s = x.sizes[3];
        auto fill = [&](auto* from) {
            for_each(x.sizes[0] * h * l, [&](int64_t i) {
                auto row = from + i / (h * l) * x.strides[0] + i / l % h * x.strides[1] + i % l * x.strides[2];
                for (int64_t key = 0; key < s; key++) copy[i * s + key] = widen(row[key * x.strides[3]]);
            });
        };
        if (x.dtype == aoti_torch_dtype_float64()) fill((const double*)x.data);
        else if (x.dtype == aoti_torch_dtype_float16()) fill((const half_bits*)x.data);
        else throw std::runtime_error("attn_mask must be bool or floating");
        auto stride = [&](int d, int64_t step) { return x.sizes[d] > 1 ? step : 0; };
        mask = {copy.data(), 2, stride(0, h * l * s), stride(1, l * s), stride(2, s), stride(3, 1)};
    }

    float at(int64_t b, int64_t h, int64_t row, int64_t key) const {
        int64_t place = b * mask.batch + h * mask.head + row * mask.row + key * mask.key;
        return mask.kind == 1 ? added(((const uint8_t*)mask.data)[place])
             : mask.kind == 2 ? ((const float*)mask.data)[place] : added(((const bfloat16*)mask.data)[place]);
    }

    // log of the mean of exp(attn_mask) over the visible keys of every block.
    void average(const View& x, const Blocks& blocks) {
        int64_t batch = std::max(x.sizes[0], std::max<int64_t>(1, blocks.shown_rows));
        int64_t heads = x.sizes[1], rows = x.sizes[2], count = blocks.blocks;
        block_bias.resize(batch * heads * rows * count);
        for_each(batch * heads * rows, [&](int64_t i) {
            int64_t b = i / (heads * rows), h = i / rows % heads, row = i % rows;
            int64_t shown_row = blocks.shown_rows > 1 ? b : 0;
            const uint8_t* shown = blocks.shown_rows ? blocks.shown.data() + shown_row * blocks.kv_len : nullptr;
            for (int64_t block = 0; block < count; block++) {
                int64_t last = std::min(blocks.kv_len, (block + 1) * KEYS);
                float highest = NONE;
                for (int64_t key = block * KEYS; key < last; key++)
                    if (!shown || shown[key]) highest = std::max(highest, at(b, h, row, key));
                double sum = 0;
                for (int64_t key = block * KEYS; key < last && highest > NONE; key++)
                    if (!shown || shown[key]) sum += std::exp(at(b, h, row, key) - highest);
                int64_t visible = std::max<int64_t>(1, blocks.visible[shown_row * count + block]);
                block_bias[i * count + block] =
                    highest > NONE ? highest + float(std::log(sum)) - std::log(float(visible)) : NONE;
            }
        });
        auto stride = [](int64_t size, int64_t step) { return size > 1 ? step : 0; };
        of_blocks = {block_bias.data(), 2, stride(batch, heads * rows * count), stride(heads, rows * count),
                     stride(rows, count), stride(count, 1)};
    }
};

// One call: its tensors, masks and kept lists.
struct Call {
    Floats q, k, v;
    Blocks blocks;
    Biases biases;
    double scale, softcap;
    int64_t rows, capacity;
    std::vector<int32_t> kept, counts;  // [B, H, rows, capacity], [B, H, rows]

    Call(const View& q, const View& k, const View& v, double scale, const Given& given, bool selects)
        : q(q), k(k), v(v), blocks(given, q.sizes[2], k.sizes[2]), biases(given, blocks, selects), scale(scale),
          softcap(given.softcap), rows(blocks.rows), capacity((blocks.blocks + TILE - 1) / TILE * TILE + TILE),
          kept(lists() * capacity), counts(lists()) {}

    int64_t lists() const { return q.batch * q.heads * rows; }

    void describe(Problem& p, int64_t items) const {
        p.q = q.tensor, p.k = k.tensor, p.v = v.tensor;
        p.heads = q.heads, p.kv_heads = k.heads, p.q_len = q.length, p.kv_len = k.length, p.dim = q.dim;
        p.value_dim = v.dim, p.capacity = capacity, p.items = items;
        p.causal = blocks.causal, p.causal_offset = blocks.offset;
        p.windowed = blocks.windowed, p.window = blocks.window, p.plain = blocks.plain;
        p.scale = float(scale), p.softcap = float(softcap);
        auto rows_of = [](auto& data, int64_t count, int64_t length) {
            using T = std::remove_const_t<std::remove_reference_t<decltype(data[0])>>;
            return Rows<T>{count ? data.data() : nullptr, count > 1 ? length : 0};
        };
        p.shown = rows_of(blocks.shown, blocks.shown_rows, k.length);
        if (!blocks.plain) {
            p.kinds = {blocks.kinds.data(), blocks.batch > 1 ? rows * blocks.blocks : 0};
            p.query_documents = rows_of(blocks.query_documents, blocks.query_rows, q.length);
            p.key_documents = rows_of(blocks.key_documents, blocks.key_rows, k.length);
            p.mask = biases.mask, p.block_bias = biases.of_blocks;
            p.sinks = biases.sinks.empty() ? nullptr : biases.sinks.data();
        }
    }

    // Kept lists of all allowed blocks.
    void keep_everything() {
        for_each(lists(), [&](int64_t item) {
            const uint8_t* allowed = blocks.allowed_at(item / rows / q.heads, item % rows);
            write(item, [&](int64_t block) { return allowed[block]; });
        });
    }

    // Kept lists of the blocks with a peak, as kernels/rule.py makes them.
    void select(float tolerance, float max_density, int64_t sinks, int64_t local, int64_t singles,
                const double* shifts) {
        int64_t count = blocks.blocks, items = k.batch * k.heads * count;
        std::vector<float> summaries(k.batch * k.heads * summary_floats(count, singles, k.dim) + 16);
        std::vector<int32_t> alone(items), rest(items);
        std::vector<float> peaks(lists() * count);
        Problem p{};
        describe(p, items);
        auto aligned = [](float* data) { return (float*)(((uintptr_t)data + 63) / 64 * 64); };
        p.singles = singles, p.summaries = aligned(summaries.data()), p.alone = alone.data(), p.rest = rest.data();
        p.peaks = peaks.data();
        on_all_threads(items, [&] { summarise(&p); });
        p.items = lists(), p.next = 0;
        on_all_threads(p.items, [&] { estimate(&p); });
        for_each(lists(), [&](int64_t item) {
            int64_t row = item % rows, h = item / rows % q.heads, b = item / rows / q.heads;
            float threshold = shifts ? tolerance * float(shifts[h]) : tolerance;
            keep(item, b, row, peaks.data() + item * count, threshold, max_density, sinks, local);
        });
    }

    void keep(int64_t item, int64_t b, int64_t row, const float* peaks, float threshold, float max_density,
              int64_t sinks, int64_t local) {
        int64_t count = blocks.blocks, number = 0, total = 0, first_cut = count;
        const uint8_t* allowed = blocks.allowed_at(b, row);
        const uint8_t* guarded = blocks.guarded_rows ? blocks.guarded.data() + (blocks.guarded_rows > 1 ? b * count : 0)
                                                     : nullptr;
        for (int64_t j = count - 1; j >= 0 && blocks.boundary(row, j); j--) first_cut = j;
        std::vector<uint8_t> mine(count);
        for (int64_t j = 0; j < count; j++) {
            if (!allowed[j]) continue;
            total++;
            bool forced = total <= sinks || (first_cut < count && j >= first_cut - local) || (guarded && guarded[j]);
            mine[j] = forced || peaks[j] >= threshold;
            number += mine[j];
        }
        if (float(number) > max_density * float(total)) {
            for (int64_t j = 0; j < count; j++) mine[j] = allowed[j];
            number = total;
        }
        if (number % TILE == 1) {  // evened out by the best of the rest, of equal ones the last
            int64_t best = -1;
            for (int64_t j = 0; j < count; j++)
                if (allowed[j] && !mine[j] && (best < 0 || peaks[j] >= peaks[best])) best = j;
            if (best >= 0) mine[best] = 1;
        }
        write(item, [&](int64_t block) { return mine[block]; });
    }

    template <class Keeps>
    void write(int64_t item, Keeps keeps) {
        int32_t *list = kept.data() + item * capacity, number = 0;
        for (int64_t j = 0; j < blocks.blocks; j++)
            if (keeps(j)) list[number++] = int32_t(j);
        int padding = number == 0 ? TILE : number % TILE;
        for (int extra = 0; extra < padding; extra++) list[number++] = int32_t(blocks.blocks + extra);
        counts[item] = number;
    }

    // Attention over the lists, into [B, q_len, H, Dv].
    void attend_lists(void* out, int32_t dtype) {
        std::vector<float> lse(q.batch * q.heads * q.length), wide;
        std::vector<int64_t> order(lists());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
        Problem p{};
        describe(p, lists());
        int64_t size = q.batch * q.length * q.heads * v.dim;
        bool in_place = dtype == aoti_torch_dtype_float32();
        if (!in_place) wide.resize(size);
        p.out = {in_place ? (float*)out : wide.data(), q.length * q.heads * v.dim, v.dim, q.heads * v.dim};
        p.lse = lse.data(), p.kept = kept.data(), p.counts = counts.data(), p.order = order.data();
        on_all_threads(p.items, [&] { attend(&p); });
        if (in_place) return;
        with_type(dtype, [&](auto type) {
            auto to = (decltype(type)*)out;
            for (int64_t i = 0; i < size; i++) to[i] = narrow(wide[i], type);
        });
    }
};

// KV heads, each repeated for its group of query heads.
AtenTensorHandle repeated(AtenTensorHandle x, int64_t heads) {
    View from(x);
    int64_t kv = from.sizes[1], length = from.sizes[2], dim = from.sizes[3];
    Handle made{empty(from, from.dtype, {from.sizes[0], heads, length, dim},
                      {heads * length * dim, length * dim, dim, 1})};
    View to(made.handle);
    size_t bytes = aoti_torch_dtype_element_size(from.dtype);
    for_each(from.sizes[0] * heads, [&](int64_t i) {
        int64_t head = i % heads / (heads / kv);
        const char* source = (const char*)from.data + (i / heads * from.strides[0] + head * from.strides[1]) * bytes;
        char* target = (char*)to.data + i * length * dim * bytes;
        for (int64_t r = 0; r < length; r++)
            for (int64_t d = 0; d < dim; d++, target += bytes)
                std::memcpy(target, source + (r * from.strides[2] + d * from.strides[3]) * bytes, bytes);
    });
    return made.release();
}

AtenTensorHandle sdpa(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale, bool causal) {
    View shape(q), keys(k), values(v);
    Handle more_keys, more_values, made, lse;
    if (keys.sizes[1] != shape.sizes[1]) {
        k = more_keys.handle = repeated(k, shape.sizes[1]);
        v = more_values.handle = repeated(v, shape.sizes[1]);
    }
    must(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, nullptr, &scale, &made.handle,
                                                                    &lse.handle), "scaled_dot_product_attention");
    View from(made.handle);
    Handle out{empty_out(shape, values)};
    View to(out.handle);
    bool same = true;
    for (int d = 0; d < 4; d++) same = same && from.strides[d] == to.strides[d];
    if (same) return made.release();
    int64_t heads = from.sizes[1], length = from.sizes[2], dim = from.sizes[3];
    size_t bytes = aoti_torch_dtype_element_size(from.dtype);
    for_each(from.sizes[0] * length, [&](int64_t i) {
        char* target = (char*)to.data + i * heads * dim * bytes;
        int64_t start = i / length * from.strides[0] + i % length * from.strides[2];
        const char* source = (const char*)from.data + start * bytes;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < dim; d++, target += bytes)
                std::memcpy(target, source + (h * from.strides[1] + d * from.strides[3]) * bytes, bytes);
    });
    return out.release();
}

// Nothing is dropped; the kernel that `usual_kernel` of sparsify/ops/exact.py names, lists for what it leaves to plain
// torch.
AtenTensorHandle attend_all(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale,
                            const Given& given) {
    View queries(q), keys(k), values(v);
    int64_t q_len = queries.sizes[2], kv_len = keys.sizes[2];
    bool plain = !given.window && !given.query_documents && !given.attn_mask && !given.softcap && !given.sink_logits
                 && !given.key_mask;
    bool sees_all = !given.causal_offset || *given.causal_offset >= kv_len - 1;
    bool top_left = given.causal_offset && *given.causal_offset == 0 && q_len == kv_len;
    bool ours = uses_matrix_registers() && queries.dtype == aoti_torch_dtype_float32()
                && std::min(q_len, kv_len) >= LONG_ON_CPU;
    if (plain && (sees_all || top_left) && !ours && queries.sizes[3] == values.sizes[3])
        return sdpa(q, k, v, scale, top_left);
    Call call(queries, keys, values, scale, given, false);
    call.keep_everything();
    Handle out{empty_out(queries, values)};
    call.attend_lists(View(out.handle).data, queries.dtype);
    return out.release();
}

// Run an op, where the processor can.
AOTITorchError guarded(const char* name, AtenTensorHandle* result, const std::function<AtenTensorHandle()>& work) {
    static const bool is_ready = processor_is_ready();
    return reported(name, result, [&] {
        if (!is_ready) throw std::runtime_error("the system keeps the matrix registers from this process");
        return work();
    });
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" EXPORTED AOTITorchError aoti_torch_cpu_exact_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale, int64_t* causal_offset, int64_t* window,
    AtenTensorHandle* key_mask, AtenTensorHandle* query_documents, AtenTensorHandle* key_documents,
    AtenTensorHandle* attn_mask, double softcap, AtenTensorHandle* sink_logits, int64_t,
    AtenTensorHandle* result) {
    Given given{causal_offset, window, key_mask, query_documents, key_documents, attn_mask, sink_logits, nullptr,
                softcap};
    return guarded("exact_attention", result, [&] { return attend_all(q, k, v, scale, given); });
}

constexpr int64_t FEW_QUERIES = 32;  // as in sparsify/ops/planned.py

extern "C" EXPORTED AOTITorchError aoti_torch_cpu_planned_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, double scale, int64_t* causal_offset, int64_t* window,
    AtenTensorHandle* key_mask, AtenTensorHandle* query_documents, AtenTensorHandle* key_documents,
    AtenTensorHandle* attn_mask, double softcap, AtenTensorHandle* sink_logits, const int64_t* edges,
    int64_t edge_count, const double* tolerances, int64_t, const double* max_densities, int64_t, const int64_t* sinks,
    int64_t,
    const int64_t* local, int64_t, const int64_t* singles, int64_t, const double*, int64_t, int64_t, int64_t, const double** shifts, int64_t, AtenTensorHandle* protected_keys, AtenTensorHandle* result) {
    Given given{causal_offset, window, key_mask, query_documents, key_documents, attn_mask, sink_logits, protected_keys,
                softcap};
    return guarded("planned_attention", result, [&] {
        View queries(q), keys(k), values(v);
        int64_t bucket = std::upper_bound(edges, edges + edge_count, keys.sizes[2]) - edges;
        if (tolerances[bucket] == 0 || queries.sizes[2] <= FEW_QUERIES) return attend_all(q, k, v, scale, given);
        Call call(queries, keys, values, scale, given, true);
        call.select(float(tolerances[bucket]), float(max_densities[bucket]), sinks[bucket], local[bucket],
                    singles[bucket], shifts ? *shifts + bucket * queries.sizes[1] : nullptr);
        Handle out{empty_out(queries, values)};
        call.attend_lists(View(out.handle).data, queries.dtype);
        return out.release();
    });
}
