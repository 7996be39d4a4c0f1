// Block-sparse attention and its selection on a CPU, in float32. Loaded by native.py, which holds the shapes.
//
// Query rows lie along the vector lanes: a query block is transposed once, then every product reads keys, values and
// summaries in place as broadcast scalars (no packing, no copies), and softmax over keys is vertical arithmetic, with
// no reduction across lanes. Work items are claimed from one atomic counter by as many threads as call in.
//
// Source: online softmax over blocks as in FlashAttention (arXiv 2205.14135); the register tile is the usual outer
// product (Goto and van de Geijn, 2008); exp is Cephes' polynomial.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, COLUMNS = 4;  // 4 x 4 accumulators of the 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, COLUMNS = 2;
#else
constexpr int LANES = 4, COLUMNS = 4;
#endif
constexpr int ROWS = 128;  // query block
constexpr int KEYS = 64;   // key block
constexpr int VECTORS = ROWS / LANES;
constexpr int TALL = 4;    // rows of A per register tile
constexpr uint8_t HIDDEN = 0, WHOLE = 1;  // kinds of blocks; what is neither is seen in part
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t)), may_alias));

struct Buffer {  // vectors on cache-line boundaries
    vec* data;
    explicit Buffer(int64_t count) : data((vec*)std::aligned_alloc(64, (count * sizeof(vec) + 63) / 64 * 64)) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    operator vec*() { return data; }
};

static inline vec splat(float x) { return x - vec{}; }
static inline vec maximum(vec a, vec b) { return a > b ? a : b; }

static inline vec exponential(vec x) {  // for x <= 0; 0 below -87, the smallest normal number; NaN stays NaN
    vec z = x * 1.44269504088896341f;
    vec shifted = z + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vec y = p * r * r + r + 1.0f;
    ivec bits = (ivec)y + (((ivec)shifted - 0x4b400000) << 23);
    return x < -87.0f ? vec{} : x == x ? (vec)bits : x;
}

static inline vec hyperbolic_tangent(vec x) {
    vec size = x < 0.0f ? -x : x, z = x * x;
    vec p = splat(-5.70498872745e-3f);  // Cephes below 0.625: 1 - 2 / (exp + 1) would cancel there
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    vec small = p * z * x + x;
    vec e = exponential(-2.0f * size);
    vec large = (1.0f - e) / (1.0f + e);
    return size < 0.625f ? small : x < 0.0f ? -large : large;
}

// C[M][ROWS] = A[M][K] B[K][ROWS], or += with ADD; element (i, p) of A is a[i * row + p * column].
template <bool ADD, int M>
static inline void tile_product(const float* a, int64_t row, int64_t column, const vec* b, vec* c, int K) {
    for (int first = 0; first < VECTORS; first += COLUMNS) {
        vec sum[M][COLUMNS];
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = ADD ? c[i * VECTORS + first + j] : vec{};
        const vec* from = b + first;
        for (int p = 0; p < K; p++, from += VECTORS) {
            vec columns[COLUMNS];
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) columns[j] = from[j];
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                vec x = splat(a[i * row + p * column]);
#pragma GCC unroll 8
                for (int j = 0; j < COLUMNS; j++) sum[i][j] += x * columns[j];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) c[i * VECTORS + first + j] = sum[i][j];
    }
}

template <bool ADD>
static void product(const float* a, int64_t row, int64_t column, const vec* b, vec* c, int M, int K) {
    int i = 0;
    for (; i + TALL <= M; i += TALL) tile_product<ADD, TALL>(a + i * row, row, column, b, c + i * VECTORS, K);
    for (; i < M; i++) tile_product<ADD, 1>(a + i * row, row, column, b, c + i * VECTORS, K);
}

struct Tensor {  // [batch, heads, length, dim], the last dimension dense
    float* data;
    int64_t batch, head, row;  // strides
    float* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

template <class T>
struct Rows {  // [B or 1, length]
    const T* data;  // or null
    int64_t batch;  // stride, 0 for one row
    const T* at(int64_t b) const { return data ? data + b * batch : nullptr; }
};

struct Mask {  // [batch, heads, q_len, kv_len], added to scores
    const void* data;
    int64_t kind;                   // 0: none, 1: bool (true is visible), 2: float32, 3: bfloat16
    int64_t batch, head, row, key;  // strides, 0 where one element serves all
};

struct Problem {
    Tensor q, k, v, out;
    float* lse;          // [B, H, q_len]
    float* vectors;      // [B, Hkv, key blocks, singles + 1, D]: the singles, then the mean of the rest
    float* variance;     // [B, Hkv, key blocks, D]
    int32_t* alone;      // [B, Hkv, key blocks]: singles that are real keys
    int32_t* rest;       // [B, Hkv, key blocks]: keys behind the mean
    float* peaks;        // [B, H, query blocks, key blocks]
    const int32_t* kept;    // [B, H, query blocks, capacity]
    const int32_t* counts;  // [B, H, query blocks]
    const int64_t* order;   // work items, heaviest first; null: as they come
    Rows<uint8_t> shown;    // [B or 1, kv_len]
    Rows<uint8_t> kinds;    // [B or 1, query blocks, key blocks] of HIDDEN, WHOLE or CUT; null where masks are plain
    Rows<int64_t> query_documents, key_documents;
    Mask mask, block_bias;  // attn_mask, and what it adds to the mass of a block
    const float* sinks;     // [H] or null
    int64_t heads, kv_heads, q_len, kv_len, dim, value_dim, capacity, singles, causal_offset, causal, window, windowed;
    int64_t plain;          // nothing but causality and `shown`
    int64_t items;
    float scale, softcap;   // 0: no cap
    std::atomic<int64_t> next;

    int64_t query_blocks() const { return (q_len + ROWS - 1) / ROWS; }
    int64_t key_blocks() const { return (kv_len + KEYS - 1) / KEYS; }
};

// `rows` rows of a tensor, side by side: heads that are interleaved in memory lie a power of two apart, and 64 rows of
// one head would share a few sets of the first-level cache.
static const float* side_by_side(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim,
                                 float* copy) {
    if (x.row == dim) return x.at(b, h, first);
    for (int64_t r = 0; r < rows; r++) std::memcpy(copy + r * dim, x.at(b, h, first + r), dim * sizeof(float));
    return copy;
}

// q of one query block as [dim][ROWS], scaled; rows past the end are zero.
static void transpose_queries(const Problem& P, int64_t b, int64_t h, int64_t tile, vec* queries) {
    float* to = (float*)queries;
    int64_t rows = std::min<int64_t>(ROWS, P.q_len - tile * ROWS);
    if (rows < ROWS) std::memset(to, 0, P.dim * ROWS * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        const float* from = P.q.at(b, h, tile * ROWS + r);
        for (int64_t d = 0; d < P.dim; d++) to[d * ROWS + r] = from[d] * P.scale;
    }
}

// Hide from `scores` [KEYS][ROWS] of key block j what the rows of query block `tile` may not see.
static void hide(const Problem& P, const uint8_t* shown, int64_t tile, int64_t j, vec* scores) {
    for (int key = 0; key < KEYS; key++) {
        int64_t position = j * KEYS + key;
        float* s = (float*)(scores + key * VECTORS);
        int64_t from = 0;  // first row that sees the key
        if (position >= P.kv_len || (shown && !shown[position])) from = ROWS;
        else if (P.causal) from = std::min<int64_t>(ROWS, std::max<int64_t>(0, position - P.causal_offset - tile * ROWS));
        for (int64_t r = 0; r < from; r++) s[r] = NONE;
    }
}

static bool needs_hiding(const Problem& P, const uint8_t* shown, int64_t tile, int64_t j) {
    return shown || (j + 1) * KEYS > P.kv_len || (P.causal && j * KEYS + KEYS - 1 > tile * ROWS + P.causal_offset);
}

// The same where masks are not plain: all that hides a key but the mask tensor.
static void hide_all(const Problem& P, int64_t b, int64_t tile, int64_t j, bool cut, vec* scores) {
    const uint8_t* shown = P.shown.at(b);
    const int64_t *rows = P.query_documents.at(b), *keys = P.key_documents.at(b);
    int64_t count = std::min<int64_t>(ROWS, P.q_len - tile * ROWS);
    for (int key = 0; key < KEYS; key++) {
        int64_t position = j * KEYS + key;
        float* s = (float*)(scores + key * VECTORS);
        bool exists = position < P.kv_len && (!shown || shown[position]);
        int64_t from = exists ? 0 : ROWS, until = ROWS;  // rows that see the key
        if (exists && P.causal && cut) {
            int64_t first = position - P.causal_offset - tile * ROWS;
            from = std::min<int64_t>(ROWS, std::max<int64_t>(0, first));
            if (P.windowed) until = std::min<int64_t>(ROWS, std::max<int64_t>(0, first + P.window));
        }
        for (int64_t r = 0; r < from; r++) s[r] = NONE;
        for (int64_t r = until; r < ROWS; r++) s[r] = NONE;
        if (exists && rows && cut)
            for (int64_t r = 0; r < count; r++) s[r] = rows[tile * ROWS + r] == keys[position] ? s[r] : NONE;
    }
}

static inline float added(uint8_t shown) {  // by table: a branch on a random mask is mispredicted
    static const float ADDED[2] = {NONE, 0};
    return ADDED[shown];
}
static inline float added(float x) { return x; }
struct bfloat16 { uint16_t bits; };
static inline float added(bfloat16 x) {
    uint32_t wide = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &wide, sizeof y);
    return y;
}

template <class T>
static void add_mask(const Mask& mask, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t start, int keys,
                     vec* scores) {
    const T* from = (const T*)mask.data + b * mask.batch + h * mask.head + start * mask.key;
    if (mask.row == 0) {
        for (int key = 0; key < keys; key++) {
            vec x = splat(added(from[key * mask.key]));
            for (int j = 0; j < VECTORS; j++) scores[key * VECTORS + j] += x;
        }
        return;
    }
    float* s = (float*)scores;
    for (int64_t r = 0; r < rows; r++) {
        const T* row = from + (first + r) * mask.row;
        for (int key = 0; key < keys; key++) s[key * ROWS + r] += added(row[key * mask.key]);
    }
}

// From scaled products [KEYS][ROWS] of key block j to scores, where masks are not plain.
static void finish_scores(const Problem& P, int64_t b, int64_t h, int64_t tile, int64_t j, vec* scores) {
    int64_t keys = std::min<int64_t>(KEYS, P.kv_len - j * KEYS), rows = std::min<int64_t>(ROWS, P.q_len - tile * ROWS);
    if (P.softcap > 0)
        for (int i = 0; i < keys * VECTORS; i++) scores[i] = P.softcap * hyperbolic_tangent(scores[i] / P.softcap);
    if (P.mask.kind) {
        auto add = P.mask.kind == 1 ? add_mask<uint8_t> : P.mask.kind == 2 ? add_mask<float> : add_mask<bfloat16>;
        add(P.mask, b, h, tile * ROWS, rows, j * KEYS, keys, scores);
    }
    bool cut = P.kinds.at(b)[tile * P.key_blocks() + j] != WHOLE;
    if (cut || P.shown.data || keys < KEYS) hide_all(P, b, tile, j, cut, scores);
}

static int64_t claim(Problem& P) {
    int64_t i = P.next.fetch_add(1, std::memory_order_relaxed);
    return i < P.items ? (P.order ? P.order[i] : i) : -1;
}

template <bool PLAIN>
static void attend_items(Problem& P) {
    Buffer queries(P.dim * VECTORS), scores(KEYS * VECTORS), mixed(P.value_dim * VECTORS);
    Buffer copy(KEYS * std::max(P.dim, P.value_dim) / LANES + 1);
    int64_t tiles = P.query_blocks(), group = P.heads / P.kv_heads;
    for (int64_t item; (item = claim(P)) >= 0;) {
        int64_t tile = item % tiles, h = item / tiles % P.heads, b = item / tiles / P.heads, kv = h / group;
        const int32_t* list = P.kept + item * P.capacity;
        const uint8_t* shown = P.shown.at(b);
        vec top[VECTORS], total[VECTORS];
        float sink = !PLAIN && P.sinks ? P.sinks[h] : NONE;
        for (int j = 0; j < VECTORS; j++) top[j] = splat(sink), total[j] = splat(sink == NONE ? 0 : 1);
        std::memset(mixed.data, 0, P.value_dim * VECTORS * sizeof(vec));
        transpose_queries(P, b, h, tile, queries);
        for (int32_t entry = 0; entry < P.counts[item]; entry++) {
            int64_t block = list[entry], keys = std::min<int64_t>(KEYS, P.kv_len - block * KEYS);
            if (keys <= 0) continue;  // the padding id
            const float* k = side_by_side(P.k, b, kv, block * KEYS, keys, P.dim, (float*)copy.data);
            product<false>(k, P.dim, 1, queries, scores, keys, P.dim);
            if (!PLAIN) finish_scores(P, b, h, tile, block, scores);
            else if (needs_hiding(P, shown, tile, block)) hide(P, shown, tile, block, scores);
            vec shift[VECTORS], keep[VECTORS];
            for (int j = 0; j < VECTORS; j++) {
                vec highest = top[j];
                for (int key = 0; key < keys; key++) highest = maximum(highest, scores[key * VECTORS + j]);
                // A row that has seen nothing yet keeps a finite shift, so that exp(-inf - shift) is 0 and not NaN.
                shift[j] = maximum(highest, splat(-std::numeric_limits<float>::max()));
                keep[j] = exponential(maximum(top[j], splat(-std::numeric_limits<float>::max())) - shift[j]);
                top[j] = highest;
                vec sum = total[j] * keep[j];
                for (int key = 0; key < keys; key++) {
                    vec& s = scores[key * VECTORS + j];
                    s = exponential(s - shift[j]);
                    sum += s;
                }
                total[j] = sum;
            }
            for (int64_t d = 0; d < P.value_dim; d++)
                for (int j = 0; j < VECTORS; j++) mixed[d * VECTORS + j] *= keep[j];
            const float* v = side_by_side(P.v, b, kv, block * KEYS, keys, P.value_dim, (float*)copy.data);
            product<true>(v, 1, P.value_dim, scores, mixed, P.value_dim, keys);
        }
        int64_t rows = std::min<int64_t>(ROWS, P.q_len - tile * ROWS);
        for (int64_t r = 0; r < rows; r++) {
            float sum = ((float*)total)[r], *out = P.out.at(b, h, tile * ROWS + r);
            float inverse = sum > 0 ? 1 / sum : 0;
            for (int64_t d = 0; d < P.value_dim; d++) out[d] = ((float*)mixed.data)[d * ROWS + r] * inverse;
            P.lse[(b * P.heads + h) * P.q_len + tile * ROWS + r] = sum > 0 ? ((float*)top)[r] + std::log(sum) : NONE;
        }
    }
}

extern "C" void attend(Problem* problem) {
    problem->plain ? attend_items<true>(*problem) : attend_items<false>(*problem);
}

extern "C" void summarise(Problem* problem) {
    Problem& P = *problem;
    int64_t blocks = P.key_blocks(), D = P.dim;
    std::vector<float> mean(D), spread(D);
    for (int64_t item; (item = claim(P)) >= 0;) {
        int64_t block = item % blocks, h = item / blocks % P.kv_heads, b = item / blocks / P.kv_heads;
        const uint8_t* shown = P.shown.at(b);
        const float* keys[KEYS];
        float distance[KEYS];
        int count = 0;
        for (int64_t i = block * KEYS; i < std::min<int64_t>(P.kv_len, (block + 1) * KEYS); i++)
            if (!shown || shown[i]) keys[count++] = P.k.at(b, h, i);

        auto average = [&](int n) {
            std::fill(mean.begin(), mean.end(), 0.0f);
            for (int i = 0; i < n; i++)
                for (int64_t d = 0; d < D; d++) mean[d] += keys[i][d];
            for (int64_t d = 0; d < D; d++) mean[d] /= std::max(n, 1);
        };
        average(count);
        for (int i = 0; i < count; i++) {
            vec sum = {};
            int64_t d = 0;
            for (; d + LANES <= D; d += LANES) {
                vec x, m;
                std::memcpy(&x, keys[i] + d, sizeof x), std::memcpy(&m, mean.data() + d, sizeof m);
                sum += (x - m) * (x - m);
            }
            float all = 0;
            for (int l = 0; l < LANES; l++) all += sum[l];
            for (; d < D; d++) all += (keys[i][d] - mean[d]) * (keys[i][d] - mean[d]);
            distance[i] = all;
        }
        float* vectors = P.vectors + item * (P.singles + 1) * D;
        int alone = std::min<int64_t>(count, P.singles);
        for (int s = 0; s < alone; s++) {  // the farthest moves to the end of what is left
            int left = count - s, far = 0;
            for (int i = 1; i < left; i++) far = distance[i] > distance[far] ? i : far;
            std::memcpy(vectors + s * D, keys[far], D * sizeof(float));
            std::swap(keys[far], keys[left - 1]), std::swap(distance[far], distance[left - 1]);
        }
        std::memset(vectors + alone * D, 0, (P.singles + 1 - alone) * D * sizeof(float));
        int rest = count - alone;
        average(rest);
        std::fill(spread.begin(), spread.end(), 0.0f);
        for (int i = 0; i < rest; i++)
            for (int64_t d = 0; d < D; d++) spread[d] += (keys[i][d] - mean[d]) * (keys[i][d] - mean[d]);
        for (int64_t d = 0; d < D; d++) {
            vectors[P.singles * D + d] = mean[d];
            P.variance[item * D + d] = spread[d] / std::max(rest, 1);
        }
        P.alone[item] = alone, P.rest[item] = rest;
    }
}

template <bool PLAIN>
static void estimate_items(Problem& P) {
    int64_t tiles = P.query_blocks(), blocks = P.key_blocks(), D = P.dim, group = P.heads / P.kv_heads;
    int64_t parts = P.singles + 1;
    constexpr int CHUNK = 4;  // key blocks per step: their scores stay in the first-level cache
    Buffer queries(D * VECTORS), squares(D * VECTORS), scores(std::max<int64_t>(CHUNK * parts, KEYS) * VECTORS);
    Buffer spread(CHUNK * VECTORS), mass(blocks * VECTORS), reference(blocks * VECTORS);
    for (int64_t item; (item = claim(P)) >= 0;) {
        int64_t tile = item % tiles, h = item / tiles % P.heads, b = item / tiles / P.heads, kv = h / group;
        const uint8_t* shown = P.shown.at(b);
        int64_t rows = std::min<int64_t>(ROWS, P.q_len - tile * ROWS);
        int64_t whole = blocks, upto = blocks;  // blocks that every row sees whole; that some row sees
        if (P.causal) {
            auto seen = [&](int64_t row) { return std::max<int64_t>(0, row + P.causal_offset + 1); };
            whole = std::min(blocks, seen(tile * ROWS) / KEYS);
            upto = std::min(blocks, (seen(tile * ROWS + rows - 1) + KEYS - 1) / KEYS);
        }
        transpose_queries(P, b, h, tile, queries);
        for (int64_t i = 0; i < D * VECTORS; i++) squares[i] = queries[i] * queries[i];
        vec top[VECTORS], total[VECTORS];
        float sink = !PLAIN && P.sinks ? P.sinks[h] : NONE;
        for (int j = 0; j < VECTORS; j++) {
            top[j] = splat(std::max(sink, -std::numeric_limits<float>::max()));
            total[j] = splat(sink == NONE ? 0 : 1);
        }

        // The sum of exp(score - top) over the `count` scores of a block; top may rise, earlier sums follow it.
        auto add = [&](int64_t block, const vec* s, int count) {
            for (int j = 0; j < VECTORS; j++) {
                vec highest = top[j];
                for (int i = 0; i < count; i++) highest = maximum(highest, s[i * VECTORS + j]);
                vec sum = {};
                for (int i = 0; i < count; i++) sum += exponential(s[i * VECTORS + j] - highest);
                total[j] = total[j] * exponential(top[j] - highest) + sum;
                top[j] = highest;
                mass[block * VECTORS + j] = sum;
                reference[block * VECTORS + j] = highest;
            }
        };
        int64_t base = (b * P.kv_heads + kv) * blocks;
        auto weigh_whole = [&](int64_t first, int64_t n) {  // at most CHUNK blocks, by their summaries
            product<false>(P.vectors + (base + first) * parts * D, D, 1, queries, scores, n * parts, D);
            product<false>(P.variance + (base + first) * D, D, 1, squares, spread, n, D);
            for (int64_t i = 0; i < n; i++) {
                int32_t alone = P.alone[base + first + i], rest = P.rest[base + first + i];
                vec* s = scores.data + i * parts * VECTORS;
                float log_count = rest ? std::log((float)rest) : 0;
                for (int j = 0; j < VECTORS; j++) {
                    vec variance = spread[i * VECTORS + j], root;
                    for (int l = 0; l < LANES; l++) root[l] = __builtin_sqrtf(2 * log_count * variance[l]);
                    vec bonus = variance < 2 * log_count ? variance * 0.5f : root - log_count;
                    vec middle = s[P.singles * VECTORS + j] + bonus;
                    if (!PLAIN && P.softcap > 0) middle = P.softcap * hyperbolic_tangent(middle / P.softcap);
                    s[alone * VECTORS + j] = rest ? middle + log_count : splat(NONE);
                }
                if (!PLAIN && P.softcap > 0)
                    for (int j = 0; j < alone * VECTORS; j++) s[j] = P.softcap * hyperbolic_tangent(s[j] / P.softcap);
                if (!PLAIN && P.block_bias.kind) {
                    vec bias[VECTORS] = {};
                    add_mask<float>(P.block_bias, b, h, tile * ROWS, rows, first + i, 1, bias);
                    for (int part = 0; part <= alone; part++)
                        for (int j = 0; j < VECTORS; j++) s[part * VECTORS + j] += bias[j];
                }
                add(first + i, s, alone + 1);
            }
        };
        auto weigh_keys = [&](int64_t block) {  // a block that some row sees in part: exact
            int64_t keys = std::min<int64_t>(KEYS, P.kv_len - block * KEYS);
            product<false>(P.k.at(b, kv, block * KEYS), P.k.row, 1, queries, scores, keys, D);
            if (PLAIN) hide(P, shown, tile, block, scores);
            else finish_scores(P, b, h, tile, block, scores);
            add(block, scores, keys);
        };
        const uint8_t* kinds = PLAIN ? nullptr : P.kinds.at(b) + tile * blocks;
        if (PLAIN) {
            for (int64_t first = 0; first < whole; first += CHUNK)
                weigh_whole(first, std::min<int64_t>(CHUNK, whole - first));
            for (int64_t block = whole; block < upto; block++) weigh_keys(block);
        } else {
            upto = blocks;
            for (int64_t block = 0; block < blocks;) {
                int64_t run = 0;
                while (run < CHUNK && block + run < blocks && kinds[block + run] == WHOLE) run++;
                if (run) weigh_whole(block, run);
                else if (kinds[block] != HIDDEN) weigh_keys(block);
                block += std::max<int64_t>(run, 1);
            }
        }
        float* peaks = P.peaks + item * blocks;
        float inside[ROWS];
        for (int64_t r = 0; r < ROWS; r++) inside[r] = r < rows ? 1.0f : 0.0f;
        for (int j = 0; j < VECTORS; j++) {
            vec mine;
            std::memcpy(&mine, inside + j * LANES, sizeof mine);
            total[j] = total[j] > 0.0f ? mine / total[j] : vec{};
        }
        for (int64_t block = 0; block < upto; block++) {
            if (!PLAIN && kinds[block] == HIDDEN) continue;
            vec highest = {};
            for (int j = 0; j < VECTORS; j++)
                highest = maximum(highest, mass[block * VECTORS + j] *
                                               exponential(reference[block * VECTORS + j] - top[j]) * total[j]);
            float peak = 0;
            for (int l = 0; l < LANES; l++) peak = std::max(peak, highest[l]);
            peaks[block] = peak;
        }
    }
}

extern "C" void estimate(Problem* problem) {
    problem->plain ? estimate_items<true>(*problem) : estimate_items<false>(*problem);
}
