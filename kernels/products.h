// Vectors, exponentials and products of native.cpp, in float32, for what the compiler says the processor has.
//
// Every product is C[M][WIDE] = A[M][K] B[K][WIDE]: WIDE query rows lie along the vector lanes (a strip of a query
// block), so that softmax over keys is vertical arithmetic, with no reduction across lanes. A is keys, values or
// summaries. Two implementations of A (`Left`), B and `multiply`:
//
//   matrix registers  AMX. A float32 is the exact sum of three bfloat16 (8 + 8 + 8 bits of its mantissa); of the nine
//                     products of two such sums the six largest are added up in float32. What is left out is 2^-22
//                     of a term at most, 2^-24 on average: the rounding of float32 itself. An infinity
//                     becomes NaN.
//   vectors           an outer product per step (Goto and van de Geijn, 2008), A read in place as broadcast scalars
//
// Source: splitting as in oneMKL's float_to_bf16x3 mode; exponentials by a minimax polynomial of degree 5 or 6.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define WIDE_VECTORS 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(NO_MATRIX_REGISTERS)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX_REGISTERS 1
#endif
#endif

#if defined(MATRIX_REGISTERS)
constexpr int LANES = 16, W = 1;  // W: vectors of a strip
#elif defined(WIDE_VECTORS)
constexpr int LANES = 16, W = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, W = 2;
#else
constexpr int LANES = 4, W = 4;
#endif
constexpr int ROWS = 128;  // query block
constexpr int KEYS = 64;   // key block
constexpr int VECTORS = ROWS / LANES, WIDE = W * LANES, STRIPS = ROWS / WIDE;
constexpr int GROUP = 16;  // rows of A that are laid out together
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f, LOG_2 = 0.69314718055994531f;

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t)), may_alias));

struct Buffer {  // vectors on cache-line boundaries
    vec* data;
    explicit Buffer(int64_t count) : data((vec*)std::aligned_alloc(64, (count * sizeof(vec) + 63) / 64 * 64)) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator vec*() { return data; }
};

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static inline vec splat(float x) { return x - vec{}; }
static inline vec maximum(vec a, vec b) { return a > b ? a : b; }

static inline bool any_above(vec a, vec b) {
#if defined(WIDE_VECTORS)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
    ivec above = a > b;
    int32_t any = 0;
    for (int l = 0; l < LANES; l++) any |= above[l];
    return any != 0;
#endif
}

// 2^z; 0 where that is no normal number (in a Session); NaN stays NaN. Relative error 1.5e-7, or 3e-6 with ROUGH.
template <bool ROUGH = false>
static inline vec power_of_two(vec z) {
#if defined(WIDE_VECTORS)
    vec r = (vec)_mm512_reduce_ps((__m512)z, 0x09);  // z - floor(z)
    vec p;
    if (ROUGH) {
        p = splat(1.3534167781e-2f);
        p = p * r + 5.2011463791e-2f;
        p = p * r + 2.4144275486e-1f;
        p = p * r + 6.9300383329e-1f;
        p = p * r + 1.0000026226f;
    } else {
        p = splat(1.8775766948e-3f);
        p = p * r + 8.9893406257e-3f;
        p = p * r + 5.5826317519e-2f;
        p = p * r + 2.4015361071e-1f;
        p = p * r + 6.9315308332e-1f;
        p = p * r + 9.9999994040e-1f;
    }
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)z);
#else
    vec within = z < 127.0f ? z : splat(127.0f);
    vec shifted = within + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer; its bits shifted are 2^n's
    vec r = within - (shifted - 12582912.0f);
    vec p;
    if (ROUGH) {
        p = splat(9.5701022074e-3f);
        p = p * r + 5.5917862803e-2f;
        p = p * r + 2.4024744332e-1f;
        p = p * r + 6.9312179089e-1f;
        p = p * r + 9.9999928474e-1f;
    } else {
        p = splat(1.3276472455e-3f);
        p = p * r + 9.6755418926e-3f;
        p = p * r + 5.5507130921e-2f;
        p = p * r + 2.4022120237e-1f;
        p = p * r + 6.9314694405e-1f;
        p = p * r + 1.0f;
    }
    ivec bits = (ivec)p + ((ivec)shifted << 23);
    return z < -126.0f ? vec{} : z == z ? (vec)bits : z;
#endif
}

static inline vec hyperbolic_tangent(vec x) {
    vec size = x < 0.0f ? -x : x, z = x * x;
    vec p = splat(-5.70498872745e-3f);  // Cephes below 0.625: 1 - 2 / (exp + 1) would cancel there
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    vec small = p * z * x + x;
    vec e = power_of_two(-2.0f * LOG2_E * size);
    vec large = (1.0f - e) / (1.0f + e);
    return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// out[i * stride][r] = rows[r][i]: LANES rows of LANES elements.
static inline void transpose(const float* const* rows, vec* out, int64_t stride) {
#if defined(WIDE_VECTORS)
    for (int i = 0; i < LANES; i += 4) {
        __m512 m[4];  // lane l of m[r]: elements i to i + 3 of row 4 l + r
        for (int r = 0; r < 4; r++) {
            m[r] = _mm512_castps128_ps512(_mm_loadu_ps(rows[r] + i));
            m[r] = _mm512_insertf32x4(m[r], _mm_loadu_ps(rows[r + 4] + i), 1);
            m[r] = _mm512_insertf32x4(m[r], _mm_loadu_ps(rows[r + 8] + i), 2);
            m[r] = _mm512_insertf32x4(m[r], _mm_loadu_ps(rows[r + 12] + i), 3);
        }
        __m512d low01 = (__m512d)_mm512_unpacklo_ps(m[0], m[1]), high01 = (__m512d)_mm512_unpackhi_ps(m[0], m[1]);
        __m512d low23 = (__m512d)_mm512_unpacklo_ps(m[2], m[3]), high23 = (__m512d)_mm512_unpackhi_ps(m[2], m[3]);
        out[(i + 0) * stride] = (vec)_mm512_unpacklo_pd(low01, low23);
        out[(i + 1) * stride] = (vec)_mm512_unpackhi_pd(low01, low23);
        out[(i + 2) * stride] = (vec)_mm512_unpacklo_pd(high01, high23);
        out[(i + 3) * stride] = (vec)_mm512_unpackhi_pd(high01, high23);
    }
#else
    for (int r = 0; r < LANES; r++)
        for (int i = 0; i < LANES; i++) ((float*)(out + i * stride))[r] = rows[r][i];
#endif
}

// The same for `count` rows of `width` elements, zeros around them: writes round_up(width, LANES) vectors.
static inline void transpose_rows(const float* from, int64_t row, int64_t count, int64_t width, vec* out,
                                  int64_t stride) {
    for (int64_t i = 0; i < width; i += LANES) {
        const float* rows[LANES];
        for (int64_t r = 0; r < LANES; r++) rows[r] = from + r * row + i;
        if (count >= LANES && i + LANES <= width) {
            transpose(rows, out + i * stride, stride);
            continue;
        }
        float copy[LANES][LANES] = {};
        for (int64_t r = 0; r < LANES; r++) {
            if (r < count) std::memcpy(copy[r], rows[r], std::min<int64_t>(LANES, width - i) * sizeof(float));
            rows[r] = copy[r];
        }
        transpose(rows, out + i * stride, stride);
    }
}

struct Rounding {  // denormal numbers are zeros until it ends: they cost a hundred cycles each
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    Rounding() { _mm_setcsr(before | 0x8040); }
    ~Rounding() { _mm_setcsr(before); }
#else
    Rounding() {}
#endif
    Rounding(const Rounding&) = delete;
};

#if defined(MATRIX_REGISTERS)

static_assert(W == 1, "B is one vector wide here");
constexpr int STEP = 32;               // of K: what one instruction multiplies
constexpr bool PIPELINED = true;       // products run beside the arithmetic of vectors
constexpr int TERMS = 3;               // bfloat16 of a float32
constexpr int64_t REGISTER = GROUP;    // vectors in one matrix register

static inline bool processor_is_ready() {  // the kernel grants the registers to a process that asks
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

struct alignas(64) RegisterShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const RegisterShapes SHAPES;

struct Session : Rounding {  // of one thread
    Session() { _tile_loadconfig(&SHAPES); }
    ~Session() { _tile_release(); }
};

struct Left {  // [groups of 16 rows][steps][TERMS] matrix registers
    const vec* data;
};
static inline int64_t left_size(int64_t m, int64_t k) { return round_up(m, GROUP) * round_up(k, STEP) / STEP * TERMS; }
static inline int64_t right_size(int64_t k) { return round_up(k, STEP) / STEP * TERMS * REGISTER; }

// The bfloat16 that truncation makes of a and b, one behind the other or alternating; a and b keep the remainders.
template <bool ALTERNATING>
static inline vec take_term(vec& a, vec& b) {
    alignas(64) static const uint16_t BEHIND[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    alignas(64) static const uint16_t ALTERNATE[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                                                       17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
    __m512i halves = _mm512_load_si512(ALTERNATING ? ALTERNATE : BEHIND);
    vec both = (vec)_mm512_permutex2var_epi16((__m512i)a, halves, (__m512i)b);
    a -= (vec)((ivec)a & (int32_t)0xffff0000), b -= (vec)((ivec)b & (int32_t)0xffff0000);
    return both;
}

// One row of a group's registers: A's are [16 rows][32 of K], B's [16 pairs of K][16 columns of C][2].
static inline void store_row(vec a, vec b, vec* to) {
    for (int term = 0; term < TERMS; term++) to[term * REGISTER] = take_term<false>(a, b);
}
static inline void store_pair(vec a, vec b, vec* to) {
    for (int term = 0; term < TERMS; term++) to[term * REGISTER] = take_term<true>(a, b);
}

static inline vec load_some(const float* from, int64_t count) {  // zeros behind them
    __mmask16 some = count >= LANES ? 0xffff : count > 0 ? (1 << count) - 1 : 0;
    return (vec)_mm512_maskz_loadu_ps(some, from);
}

// Row i of a group.
static inline void put_row(float* group, int64_t i, const float* row, int64_t k) {
    vec* to = (vec*)group + i;
    int64_t p = 0;
    for (; p + STEP <= k; p += STEP, to += TERMS * REGISTER)
        store_row((vec)_mm512_loadu_ps(row + p), (vec)_mm512_loadu_ps(row + p + LANES), to);
    if (p < k) store_row(load_some(row + p, k - p), load_some(row + p + LANES, k - p - LANES), to);
}

static inline Left left_of(const float* group, int64_t) { return {(const vec*)group}; }
static inline Left from_row(const Left& a, int64_t row, int64_t k) { return {a.data + left_size(row, k)}; }

// A = the rows of keys.
static inline Left keys_left(const float* keys, int64_t row, int64_t count, int64_t dim, Buffer& room) {
    int64_t group = left_size(GROUP, dim);
    for (int64_t key = 0; key < count; key++)
        put_row((float*)(room.data + key / GROUP * group), key % GROUP, keys + key * row, dim);
    return {room.data};
}

// A = values, transposed; K is rounded up, with zeros.
static inline Left values_left(const float* values, int64_t row, int64_t count, int64_t dim, Buffer& room) {
    int64_t steps = round_up(count, STEP) / STEP;
    for (int64_t first = 0; first < dim; first += GROUP)
        for (int64_t key = 0; key < count; key += STEP) {
            vec a[LANES], b[LANES];
            int64_t width = std::min<int64_t>(LANES, dim - first);
            transpose_rows(values + key * row + first, row, count - key, width, a, 1);
            transpose_rows(values + (key + LANES) * row + first, row, count - key - LANES, width, b, 1);
            vec* to = room.data + (first / GROUP * steps + key / STEP) * TERMS * REGISTER;
            for (int i = 0; i < GROUP; i++) store_row(a[i], b[i], to + i);
        }
    return {room.data};
}

// Rows p and p + 1 of B.
static inline void put_pair(vec a, vec b, int64_t p, int64_t, vec* to) {
    store_pair(a, b, to + p / STEP * TERMS * REGISTER + p % STEP / 2);
}

// B from x [K][W]; K is rounded up, with zeros.
static inline void right_of(const vec* x, int64_t k, vec* to) {
    for (int64_t p = 0; p < round_up(k, STEP); p += 2)
        put_pair(p < k ? x[p] : vec{}, p + 1 < k ? x[p + 1] : vec{}, p, 0, to);
}

// Two groups at a time: C is in registers 0 and 1, A in 2 to 4, B in 5 to 7. Numbers of registers are literals.
#define MULTIPLY_GROUP(g, at)           \
    _tile_loadd(2, at, 64);             \
    _tile_dpbf16ps(g, 2, 5);            \
    _tile_loadd(3, at + REGISTER, 64);  \
    _tile_dpbf16ps(g, 2, 6);            \
    _tile_dpbf16ps(g, 3, 5);            \
    _tile_loadd(4, at + 2 * REGISTER, 64); \
    _tile_dpbf16ps(g, 2, 7);            \
    _tile_dpbf16ps(g, 3, 6);            \
    _tile_dpbf16ps(g, 4, 5);

template <bool ADD, int N>
static inline void multiply_groups(const vec* a, const vec* b, vec* c, int64_t steps) {
    if (ADD) {
        _tile_loadd(0, c, 64);
        if (N == 2) { _tile_loadd(1, c + GROUP, 64); }
    } else {
        _tile_zero(0);
        if (N == 2) { _tile_zero(1); }
    }
    const vec* a2 = a + steps * TERMS * REGISTER;
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(5, b, 64);
        _tile_loadd(6, b + REGISTER, 64);
        _tile_loadd(7, b + 2 * REGISTER, 64);
        MULTIPLY_GROUP(0, a)
        if (N == 2) { MULTIPLY_GROUP(1, a2) }
        a += TERMS * REGISTER, a2 += TERMS * REGISTER, b += TERMS * REGISTER;
    }
    _tile_stored(0, c, 64);
    if (N == 2) { _tile_stored(1, c + GROUP, 64); }
}

// C has room for M rounded up to GROUP.
template <bool ADD>
static inline void multiply(const Left& left, const vec* b, vec* c, int64_t m, int64_t k) {
    int64_t steps = round_up(k, STEP) / STEP, groups = round_up(m, GROUP) / GROUP;
    const vec* a = left.data;
    asm volatile("" ::: "memory");  // the intrinsics of GCC 12 do not say that they read memory
    for (; groups >= 2; groups -= 2, a += 2 * steps * TERMS * REGISTER, c += 2 * GROUP)
        multiply_groups<ADD, 2>(a, b, c, steps);
    if (groups) multiply_groups<ADD, 1>(a, b, c, steps);
    asm volatile("" ::: "memory");
}

#else

static inline bool processor_is_ready() { return true; }
constexpr bool PIPELINED = false;
typedef Rounding Session;

struct Left {  // element (i, p) is data[i * row + p * column]
    const float* data;
    int64_t row, column;
};
static inline int64_t left_size(int64_t m, int64_t k) { return (m * k + LANES - 1) / LANES; }
static inline int64_t right_size(int64_t k) { return k * W; }

static inline void put_row(float* group, int64_t i, const float* row, int64_t k) {
    std::memcpy(group + i * k, row, k * sizeof(float));
}
static inline Left left_of(const float* group, int64_t k) { return {group, k, 1}; }
static inline Left from_row(const Left& a, int64_t row, int64_t) { return {a.data + row * a.row, a.row, a.column}; }

// Rows of a tensor, side by side: heads that are interleaved in memory lie a power of two apart, and 64 rows of one
// head would share a few sets of the first-level cache.
static inline const float* side_by_side(const float* from, int64_t row, int64_t count, int64_t dim, Buffer& room) {
    if (row == dim) return from;
    for (int64_t r = 0; r < count; r++) std::memcpy((float*)room.data + r * dim, from + r * row, dim * sizeof(float));
    return (float*)room.data;
}
static inline Left keys_left(const float* keys, int64_t row, int64_t count, int64_t dim, Buffer& room) {
    return {side_by_side(keys, row, count, dim, room), dim, 1};
}
static inline Left values_left(const float* values, int64_t row, int64_t count, int64_t dim, Buffer& room) {
    return {side_by_side(values, row, count, dim, room), 1, dim};
}

static inline void put_pair(vec a, vec b, int64_t p, int64_t j, vec* to) { to[p * W + j] = a, to[(p + 1) * W + j] = b; }
static inline void right_of(const vec* x, int64_t k, vec* to) { std::memcpy((void*)to, x, k * W * sizeof(vec)); }

template <bool ADD, int TALL>
static inline void multiply_rows(const float* a, int64_t row, int64_t column, const vec* b, vec* c, int64_t k) {
    vec sum[TALL][W];
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
        for (int j = 0; j < W; j++) sum[i][j] = ADD ? c[i * W + j] : vec{};
    for (int64_t p = 0; p < k; p++, b += W) {
        vec columns[W];
#pragma GCC unroll 8
        for (int j = 0; j < W; j++) columns[j] = b[j];
#pragma GCC unroll 8
        for (int i = 0; i < TALL; i++) {
            vec x = splat(a[i * row + p * column]);
#pragma GCC unroll 8
            for (int j = 0; j < W; j++) sum[i][j] += x * columns[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 8
        for (int j = 0; j < W; j++) c[i * W + j] = sum[i][j];
}

template <bool ADD>
static inline void multiply(const Left& a, const vec* b, vec* c, int64_t m, int64_t k) {
    constexpr int TALL = LANES > 4 ? 6 : 4;  // rows of A per register tile
    int64_t i = 0;
    auto some = [&](auto tall) {
        for (; i + tall <= m; i += tall)
            multiply_rows<ADD, tall>(a.data + i * a.row, a.row, a.column, b, c + i * W, k);
    };
    some(std::integral_constant<int, TALL>()), some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
}

#endif
