// The op of packages for Hopper in C++: hopper_calls.h over the handles of torch's C interface.
//
// AOTInductor calls aoti_torch_cuda_packed_attention_on_hopper (hopper_packed.py) and links this file into the package,
// behind it the machine code that hopper_code.py writes as KERNELS.

#include "handles.h"
#include "hopper_calls.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // of libtorch_cuda

namespace {

extern const Kernel KERNELS[];

const Kernel& kernel_at(int64_t number) { return KERNELS[number]; }

// A tensor [B, H, L, D] as the kernels can address it: rows dense, all else a multiple of `unit` elements; or a copy.
struct Addressable {
    Handle copy;
    View view;

    Addressable(AtenTensorHandle x, int64_t unit) : view(x) {
        bool fits = (view.strides[3] == 1 || view.sizes[3] == 1) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
        for (int d = 0; d < 3; d++)
            fits = fits && view.strides[d] % unit == 0 && (view.strides[d] || view.sizes[d] == 1);
        if (fits) return;
        int64_t heads = view.sizes[1], length = view.sizes[2], dim = view.sizes[3];
        copy.handle = empty(view, view.dtype, view.sizes, {heads * length * dim, length * dim, dim, 1});
        must(aoti_torch_copy_(copy.handle, x, 0), "copy");
        view = View(copy.handle);
    }
};

Rows rows_of(const View& x) {
    Rows rows{x.data, {}, {}};
    std::copy_n(x.sizes.begin(), 4, rows.sizes);
    std::copy_n(x.strides.begin(), 4, rows.strides);
    return rows;
}

// Uninitialised memory on the device of `like`, in elements of a type.
AtenTensorHandle memory_for(const View& like, int32_t dtype, int64_t elements) {
    return empty(like, dtype, {elements}, {1});
}

}  // namespace

// `key_mask`: bool [B or 1, S]; `first`: the number of the first of this site's kernels.
extern "C" AOTITorchError aoti_torch_cuda_packed_attention_on_hopper(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* key_mask, double scale,
    int64_t* causal_offset, double tolerance, double max_density, int64_t sinks, int64_t local, int64_t singles,
    int64_t first, AtenTensorHandle* result) {
    return reported("packed_attention_on_hopper", result, [&] {
        Addressable queries(q, 16), keys(k, 16), values(v, 8);
        const View& x = queries.view;
        Handle dense;
        Shown shown{nullptr, 0, 0};
        if (key_mask) {
            View mask(*key_mask);
            if (mask.strides[1] != 1) {
                dense.handle = empty(mask, mask.dtype, mask.sizes, {mask.sizes[1], 1});
                must(aoti_torch_copy_(dense.handle, *key_mask, 0), "copy");
                mask = View(dense.handle);
            }
            shown = {mask.data, mask.sizes[0], mask.strides[0]};
        }
        int64_t offset = causal_offset ? *causal_offset : INT64_MAX, kv_len = keys.view.sizes[2];
        int64_t blocks = x.sizes[0] * x.sizes[1] * count_blocks(x.sizes[2], ROWS);
        int64_t capacity = (count_blocks(count_blocks(kv_len, KEYS), TILE) + 1) * TILE;
        void* stream;
        must(aoti_torch_get_current_cuda_stream(x.device, &stream), "stream");
        Handle kept(memory_for(x, aoti_torch_dtype_int32(), blocks * capacity));
        Handle counts(memory_for(x, aoti_torch_dtype_int32(), blocks));
        {
            Selection call{rows_of(x), rows_of(keys.view), shown, offset, scale, tolerance, max_density, sinks, local,
                           singles, View(kept.handle).data, View(counts.handle).data, first, first + 1, first + 2,
                           first + 3, x.device};
            Handle memory(memory_for(x, aoti_torch_dtype_uint8(), memory_of(call)));
            select(call, View(memory.handle).data, stream);
        }
        Handle out(empty_out(x, values.view));
        Handle lse(memory_for(x, aoti_torch_dtype_float32(), x.sizes[0] * x.sizes[1] * x.sizes[2]));
        // Kernels in the order of hopper_code.py: four of the selection; those of whole lists, and of lists in pieces,
        // in both last the facts of a key mask, if there is one.
        int64_t whole = first + 4, cut = whole + (key_mask ? 3 : 2);
        int64_t pieces = units_for(blocks, count_blocks(kv_len, KEYS), x.device), used = pieces ? cut : whole;
        Attention call{rows_of(x), rows_of(keys.view), rows_of(values.view), rows_of(View(out.handle)), shown, offset,
                       scale, View(kept.handle).data, View(counts.handle).data, View(lse.handle).data, pieces,
                       used, used + 1, whole + 2, cut + 2, x.device};
        Handle memory(memory_for(x, aoti_torch_dtype_uint8(), memory_of(call)));
        attend(call, View(memory.handle).data, stream);
        return out.release();
    });
}
