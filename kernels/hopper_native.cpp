// hopper_calls.h for Python: hopper_native.py builds this on first use and calls it.

#include <deque>

#include "hopper_calls.h"

namespace {

// A kernel that Python has compiled.
struct Added {
    std::string image, name;
    std::vector<Box> boxes;
    Kernel kernel;
};

std::mutex adding;
std::deque<Added> added;  // whose elements never move

const Kernel& kernel_at(int64_t number) {
    std::lock_guard<std::mutex> guard(adding);
    return added.at(number).kernel;
}

thread_local std::string last_complaint;

template <class Work>
auto told(Work work) -> decltype(work()) {
    try {
        return work();
    } catch (const std::exception& error) {
        last_complaint = error.what();
        return -1;
    }
}

}  // namespace

extern "C" {

// Why the last call of this thread gave -1.
const char* complaint() { return last_complaint.c_str(); }

// Keep a kernel; its number.
int64_t add_kernel(const char* image, int64_t bytes, const char* name, int64_t shared, int64_t threads,
                   const Box* boxes, int64_t count) {
    return told([&]() -> int64_t {
        std::lock_guard<std::mutex> guard(adding);
        Added& one = added.emplace_back();
        one.image.assign(image, bytes), one.name = name, one.boxes.assign(boxes, boxes + count);
        one.kernel = {reinterpret_cast<const unsigned char*>(one.image.data()), one.name.c_str(), unsigned(shared),
                      unsigned(threads), one.boxes.data()};
        return int64_t(added.size()) - 1;
    });
}

int64_t memory_of_selection(const Selection* call) {
    return told([&] { return memory_of(*call); });
}

int64_t memory_of_attention(const Attention* call) {
    return told([&] { return memory_of(*call); });
}

int64_t select_blocks(const Selection* call, void* memory, void* stream) {
    return told([&]() -> int64_t { return select(*call, memory, stream), 0; });
}

int64_t attend_blocks(const Attention* call, void* memory, void* stream) {
    return told([&]() -> int64_t { return attend(*call, memory, stream), 0; });
}

}
