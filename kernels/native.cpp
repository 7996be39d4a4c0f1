// Block-sparse attention and its selection on a CPU, in float32. Loaded by native.py, which holds the shapes.
//
// Query rows lie along the vector lanes, one strip of a query block at a time: what a strip needs of scores and weights
// stays in the first-level cache. products.h has the products. Exponentials are powers of two, relative to a reference
// per row that is raised only when scores have grown far beyond it. Work items are claimed from one atomic counter by
// as many threads as call in.
//
// Source: online softmax over blocks as in FlashAttention (arXiv 2205.14135); raising the reference late as in
// FlashAttention-4.

#include <atomic>
#include <cmath>
#include <vector>

#include "products.h"

constexpr uint8_t HIDDEN = 0, WHOLE = 1;  // kinds of blocks; what is neither is seen in part
constexpr float LOWEST = -1e38f;          // reference of a row that has seen nothing yet: -inf - LOWEST is no NaN
constexpr float SLACK = 32;               // binary orders by which a score may exceed the reference
constexpr float LIMIT = 0x1p40f;          // the same, where it is seen by the sum of a block's exponentials
constexpr float LARGEST = 3.3e38f;        // variance: an infinite one times 0 is NaN

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
    float* summaries;    // [B, Hkv, summary_floats]
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

// q of one query block, scaled, as the B of products, strip by strip; and where `squares` is given, its squares.
static void pack_queries(const Problem& P, int64_t b, int64_t h, int64_t tile, vec* scratch, vec* queries,
                         vec* squares) {
    int64_t size = right_size(P.dim);
    for (int64_t first = tile * ROWS; first < std::min(P.q_len, (tile + 1) * ROWS); first += WIDE) {
        for (int j = 0; j < W; j++) {
            int64_t row = first + j * LANES;
            transpose_rows(P.q.at(b, h, row), P.q.row, P.q_len - row, P.dim, scratch + j, W);
        }
        for (int64_t i = 0; i < P.dim * W; i++) scratch[i] *= P.scale;
        right_of(scratch, P.dim, queries);
        queries += size;
        if (!squares) continue;
        for (int64_t i = 0; i < P.dim * W; i++) scratch[i] *= scratch[i];
        right_of(scratch, P.dim, squares);
        squares += size;
    }
}

// Whether causality hides key block j from all rows of the strip that begins at row `first`.
static bool unseen(const Problem& P, int64_t first, int64_t j) {
    return P.causal && j * KEYS > std::min(P.q_len, first + WIDE) - 1 + P.causal_offset;
}

static bool needs_hiding(const Problem& P, const uint8_t* shown, int64_t first, int64_t j) {
    return shown || (j + 1) * KEYS > P.kv_len || (P.causal && j * KEYS + KEYS - 1 > first + P.causal_offset);
}

// Hide from `scores` [KEYS][WIDE] of key block j what the strip that begins at row `first` may not see.
static void hide(const Problem& P, const uint8_t* shown, int64_t first, int64_t j, vec* scores) {
    for (int key = 0; key < KEYS; key++) {
        int64_t position = j * KEYS + key;
        float* s = (float*)(scores + key * W);
        int64_t from = 0;  // first row that sees the key
        if (position >= P.kv_len || (shown && !shown[position])) from = WIDE;
        else if (P.causal) from = std::min<int64_t>(WIDE, std::max<int64_t>(0, position - P.causal_offset - first));
        for (int64_t r = 0; r < from; r++) s[r] = NONE;
    }
}

// The same where masks are not plain: all that hides a key but the mask tensor.
static void hide_all(const Problem& P, int64_t b, int64_t first, int64_t j, bool cut, vec* scores) {
    const uint8_t* shown = P.shown.at(b);
    const int64_t *rows = P.query_documents.at(b), *keys = P.key_documents.at(b);
    int64_t count = std::min<int64_t>(WIDE, P.q_len - first);
    for (int key = 0; key < KEYS; key++) {
        int64_t position = j * KEYS + key;
        float* s = (float*)(scores + key * W);
        bool exists = position < P.kv_len && (!shown || shown[position]);
        int64_t from = exists ? 0 : WIDE, until = WIDE;  // rows that see the key
        if (exists && P.causal && cut) {
            int64_t seen = position - P.causal_offset - first;
            from = std::min<int64_t>(WIDE, std::max<int64_t>(0, seen));
            if (P.windowed) until = std::min<int64_t>(WIDE, std::max<int64_t>(0, seen + P.window));
        }
        for (int64_t r = 0; r < from; r++) s[r] = NONE;
        for (int64_t r = until; r < WIDE; r++) s[r] = NONE;
        if (exists && rows && cut)
            for (int64_t r = 0; r < count; r++) s[r] = rows[first + r] == keys[position] ? s[r] : NONE;
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
            for (int j = 0; j < W; j++) scores[key * W + j] += x;
        }
        return;
    }
    float* s = (float*)scores;
    for (int64_t r = 0; r < rows; r++) {
        const T* row = from + (first + r) * mask.row;
        for (int key = 0; key < keys; key++) s[key * WIDE + r] += added(row[key * mask.key]);
    }
}

// From scaled products [KEYS][WIDE] of key block j to scores, where masks are not plain.
static void finish_scores(const Problem& P, int64_t b, int64_t h, int64_t first, int64_t j, vec* scores) {
    int64_t keys = std::min<int64_t>(KEYS, P.kv_len - j * KEYS), rows = std::min<int64_t>(WIDE, P.q_len - first);
    if (P.softcap > 0)
        for (int i = 0; i < keys * W; i++) scores[i] = P.softcap * hyperbolic_tangent(scores[i] / P.softcap);
    if (P.mask.kind) {
        auto add = P.mask.kind == 1 ? add_mask<uint8_t> : P.mask.kind == 2 ? add_mask<float> : add_mask<bfloat16>;
        add(P.mask, b, h, first, rows, j * KEYS, keys, scores);
    }
    bool cut = P.kinds.at(b)[first / ROWS * P.key_blocks() + j] != WHOLE;
    if (cut || P.shown.data || keys < KEYS) hide_all(P, b, first, j, cut, scores);
}

static int64_t claim(Problem& P) {
    int64_t i = P.next.fetch_add(1, std::memory_order_relaxed);
    return i < P.items ? (P.order ? P.order[i] : i) : -1;
}

// Fetch rows of a tensor, a share of a block per strip, before they are needed: lists jump.
static inline void fetch(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t dim) {
    for (int64_t r = first; r < first + count; r++)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(x.at(b, h, r) + d, 0, 2);
}

static inline vec highest_of(const vec* scores, int64_t step, int64_t count) {
    vec highest = scores[0];
    for (int64_t i = 1; i < count; i++) highest = maximum(highest, scores[i * step]);
    return highest;
}

// From scores [KEYS][W] of some keys to weights, as the B of products, and their sum.
static inline void weigh(vec* scores, int64_t first, int64_t count, const vec* reference, vec* sum, vec* weights) {
    for (int j = 0; j < W; j++)
        for (int64_t key = first; key < first + count; key += 2) {
            vec a = power_of_two(scores[key * W + j] * LOG2_E - reference[j]);
            vec b = power_of_two(scores[(key + 1) * W + j] * LOG2_E - reference[j]);
            sum[j] += a + b;
            put_pair(a, b, key, j, weights);
        }
}

// Rows of a strip, from sums to what they mean.
static void write_rows(const Problem& P, int64_t b, int64_t h, int64_t first, const vec* reference, const vec* total,
                       vec* mixed) {
    for (int j = 0; j < W; j++, first += LANES) {
        int64_t rows = std::min<int64_t>(LANES, P.q_len - first);
        vec inverse = total[j] == 0.0f ? vec{} : 1.0f / total[j];
        for (int64_t d = 0; d < P.value_dim; d++) mixed[d * W + j] *= inverse;
        for (int64_t d = 0; d < P.value_dim; d += LANES) {
            const float* columns[LANES];
            vec out[LANES];
            for (int i = 0; i < LANES; i++) columns[i] = (const float*)(mixed + (d + i) * W + j);
            transpose(columns, out, 1);
            int64_t bytes = std::min<int64_t>(LANES, P.value_dim - d) * sizeof(float);
            for (int64_t r = 0; r < rows; r++) std::memcpy(P.out.at(b, h, first + r) + d, out + r, bytes);
        }
        for (int64_t r = 0; r < rows; r++) {
            float sum = ((const float*)(total + j))[r], from = ((const float*)(reference + j))[r];
            P.lse[(b * P.heads + h) * P.q_len + first + r] = sum == 0 ? NONE : from * LOG_2 + std::log(sum);
        }
    }
}

template <bool PLAIN>
static void attend_items(Problem& P) {
    Session session;
    int64_t query_size = right_size(P.dim), mixed_size = round_up(P.value_dim, GROUP) * W;
    Buffer queries(STRIPS * query_size), scratch(round_up(P.dim, LANES) * W), scores((PIPELINED + 1) * KEYS * W);
    int64_t weight_size = right_size(KEYS);
    Buffer weights(PIPELINED * 2 * weight_size), mixed(STRIPS * mixed_size);
    vec sum[W];
    auto scores_of = [&](int64_t strip) { return scores + (PIPELINED ? strip % 2 : 0) * KEYS * W; };
    auto weights_of = [&](int64_t strip) { return PIPELINED ? weights + strip % 2 * weight_size : scores.data; };
    Buffer key_room(left_size(KEYS, P.dim)), value_room(left_size(P.value_dim, KEYS));
    int64_t tiles = P.query_blocks(), group = P.heads / P.kv_heads;
    for (int64_t item; (item = claim(P)) >= 0;) {
        int64_t tile = item % tiles, h = item / tiles % P.heads, b = item / tiles / P.heads, kv = h / group;
        int64_t strips = (std::min<int64_t>(ROWS, P.q_len - tile * ROWS) + WIDE - 1) / WIDE;
        const int32_t *list = P.kept + item * P.capacity, *end = list + P.counts[item];
        const uint8_t* shown = P.shown.at(b);
        vec reference[VECTORS], total[VECTORS];
        float sink = !PLAIN && P.sinks ? P.sinks[h] : NONE;
        for (int j = 0; j < VECTORS; j++) {
            reference[j] = splat(std::max(sink * LOG2_E, LOWEST));
            total[j] = splat(sink == NONE ? 0 : 1);
        }
        std::memset((void*)mixed.data, 0, STRIPS * mixed_size * sizeof(vec));
        pack_queries(P, b, h, tile, scratch, queries, nullptr);
        for (; list < end; list++) {
            int64_t block = *list, keys = std::min<int64_t>(KEYS, P.kv_len - block * KEYS);
            if (keys <= 0) continue;  // the padding id
            Left k = keys_left(P.k.at(b, kv, block * KEYS), P.k.row, keys, P.dim, key_room);
            Left v = values_left(P.v.at(b, kv, block * KEYS), P.v.row, keys, P.value_dim, value_room);
            int64_t next = list + 1 < end && (list[1] + 1) * (int64_t)KEYS <= P.kv_len ? list[1] * KEYS : -1;
            int64_t from = 0;  // the first strip that sees something
            while (from < strips && unseen(P, tile * ROWS + from * WIDE, block)) from++;

            // Three steps for each strip, each in parts.
            auto score = [&](int64_t strip, int64_t part, int64_t parts) {
                int64_t first = KEYS / parts * part, rows = std::min(KEYS / parts, keys - first);
                if (rows > 0)
                    multiply<false>(from_row(k, first, P.dim), queries + strip * query_size,
                                    scores_of(strip) + first * W, rows, P.dim);
                if (part + 1 < parts) return;
                if (!PLAIN) finish_scores(P, b, h, tile * ROWS + strip * WIDE, block, scores_of(strip));
                else if (needs_hiding(P, shown, tile * ROWS + strip * WIDE, block))
                    hide(P, shown, tile * ROWS + strip * WIDE, block, scores_of(strip));
            };
            auto make_weights = [&](int64_t strip, int64_t part, int64_t parts) {
                vec *s = scores_of(strip), *ref = reference + strip * W, *all = total + strip * W;
                if (next >= 0) {
                    int64_t share = KEYS / STRIPS / parts, first = next + (strip * parts + part) * share;
                    fetch(P.k, b, kv, first, share, P.dim), fetch(P.v, b, kv, first, share, P.value_dim);
                }
                auto raise = [&](int j, vec to) {
                    vec raised = maximum(to, ref[j]), keep = power_of_two(ref[j] - raised);
                    ref[j] = raised, all[j] *= keep;
                    vec* mine = mixed + strip * mixed_size + j;
                    for (int64_t d = 0; d < P.value_dim; d++) mine[d * W] *= keep;
                };
                for (int j = 0; j < W && part == 0; j++) {
                    sum[j] = vec{};
                    if (!PIPELINED || any_above(splat(LOWEST * 0.99f), ref[j])) {
                        vec highest = highest_of(s + j, W, KEYS) * LOG2_E;
                        if (any_above(highest, ref[j] + SLACK)) raise(j, highest);
                    }
                }
                weigh(s, KEYS / parts * part, KEYS / parts, ref, sum, weights_of(strip));
                if (part + 1 < parts) return;
                for (int j = 0; j < W; j++) {
                    if (PIPELINED && any_above(sum[j], splat(LIMIT))) {  // scores are still there: once more
                        raise(j, highest_of(s + j, W, KEYS) * LOG2_E);
                        sum[j] = vec{};
                        weigh(s, 0, KEYS, ref, sum, weights_of(strip));
                    }
                    all[j] += sum[j];
                }
            };
            auto mix = [&](int64_t strip, int64_t part, int64_t parts) {
                int64_t share = round_up((P.value_dim + parts - 1) / parts, GROUP), first = share * part;
                int64_t count = std::min(share, P.value_dim - first);
                vec* to = mixed + strip * mixed_size + first * W;
                if (count > 0) multiply<true>(from_row(v, first, keys), weights_of(strip), to, count, keys);
            };
            if (!PIPELINED)
                for (int64_t strip = from; strip < strips; strip++)
                    score(strip, 0, 1), make_weights(strip, 0, 1), mix(strip, 0, 1);
            else if (from < strips) {  // the products of other strips are in flight while one's weights are made
                score(from, 0, 1);
                for (int64_t strip = from; strip < strips; strip++)
                    for (int64_t part = 0; part < 4; part++) {
                        if (part % 2 == 0 && strip + 1 < strips) score(strip + 1, part / 2, 2);
                        if (part % 2 == 1 && strip > from) mix(strip - 1, part / 2, 2);
                        make_weights(strip, part, 4);
                    }
                mix(strips - 1, 0, 1);
            }
        }
        for (int64_t strip = 0; strip < strips; strip++)
            write_rows(P, b, h, tile * ROWS + strip * WIDE, reference + strip * W, total + strip * W,
                       mixed + strip * mixed_size);
    }
}

extern "C" void attend(Problem* problem) {
    problem->plain ? attend_items<true>(*problem) : attend_items<false>(*problem);
}

extern "C" int64_t ready() { return processor_is_ready(); }

extern "C" int64_t uses_matrix_registers() {
#if defined(MATRIX_REGISTERS)
    return 1;
#else
    return 0;
#endif
}

// Summaries of GROUP key blocks lie together: the first single of each, the second, ..., the means, the variances.
extern "C" int64_t summary_floats(int64_t blocks, int64_t singles, int64_t dim) {  // of one KV head
    return round_up(blocks, GROUP) / GROUP * (singles + 2) * left_size(GROUP, dim) * LANES;
}

extern "C" void summarise(Problem* problem) {
    Problem& P = *problem;
    int64_t blocks = P.key_blocks(), D = P.dim, size = left_size(GROUP, D) * LANES;
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
        float* groups = P.summaries + (b * P.kv_heads + h) * summary_floats(blocks, P.singles, D)
                        + block / GROUP * (P.singles + 2) * size;
        auto put = [&](int64_t part, const float* row) { put_row(groups + part * size, block % GROUP, row, D); };
        int alone = std::min<int64_t>(count, P.singles);
        for (int s = 0; s < alone; s++) {  // the farthest moves to the end of what is left
            int left = count - s, far = 0;
            for (int i = 1; i < left; i++) far = distance[i] > distance[far] ? i : far;
            put(s, keys[far]);
            std::swap(keys[far], keys[left - 1]), std::swap(distance[far], distance[left - 1]);
        }
        std::fill(spread.begin(), spread.end(), 0.0f);
        for (int64_t s = alone; s < P.singles; s++) put(s, spread.data());
        int rest = count - alone;
        average(rest);
        for (int i = 0; i < rest; i++)
            for (int64_t d = 0; d < D; d++) spread[d] += (keys[i][d] - mean[d]) * (keys[i][d] - mean[d]);
        for (int64_t d = 0; d < D; d++) spread[d] = std::min(spread[d] / std::max(rest, 1), LARGEST);
        put(P.singles, mean.data()), put(P.singles + 1, spread.data());
        P.alone[item] = alone, P.rest[item] = rest;
    }
}

template <bool PLAIN>
static void estimate_items(Problem& P) {
    Session session;
    int64_t tiles = P.query_blocks(), blocks = P.key_blocks(), D = P.dim, group = P.heads / P.kv_heads;
    int64_t parts = P.singles + 1, query_size = right_size(D), group_size = left_size(GROUP, D) * LANES;
    constexpr int PART = GROUP * W;  // scores of one part of GROUP blocks
    Buffer queries(STRIPS * query_size), squares(STRIPS * query_size), scratch(round_up(D, LANES) * W);
    Buffer scores(std::max<int64_t>(parts * PART, KEYS * W)), spread(PART), mass(blocks * VECTORS);
    Buffer key_room(left_size(KEYS, D));
    float logs[KEYS + 1] = {};
    for (int i = 1; i <= KEYS; i++) logs[i] = std::log((float)i);
    for (int64_t item; (item = claim(P)) >= 0;) {
        int64_t tile = item % tiles, h = item / tiles % P.heads, b = item / tiles / P.heads, kv = h / group;
        const uint8_t* shown = P.shown.at(b);
        int64_t rows = std::min<int64_t>(ROWS, P.q_len - tile * ROWS), strips = (rows + WIDE - 1) / WIDE;
        int64_t whole = blocks, upto = blocks;  // blocks that every row sees whole; that some row sees
        if (PLAIN && P.causal) {
            auto seen = [&](int64_t row) { return std::max<int64_t>(0, row + P.causal_offset + 1); };
            whole = std::min(blocks, seen(tile * ROWS) / KEYS);
            upto = std::min(blocks, (seen(tile * ROWS + rows - 1) + KEYS - 1) / KEYS);
        }
        pack_queries(P, b, h, tile, scratch, queries, squares);
        vec reference[VECTORS], total[VECTORS];
        float sink = !PLAIN && P.sinks ? P.sinks[h] : NONE;
        for (int j = 0; j < VECTORS; j++) {
            reference[j] = splat(std::max(sink * LOG2_E, LOWEST));
            total[j] = splat(sink == NONE ? 0 : 1);
        }

        // The mass of a block for vector j of the rows: the sum over its `count` scores, `step` vectors apart.
        auto add = [&](int64_t block, int64_t j, const vec* s, int64_t step, int64_t count) {
            auto sum_up = [&] {
                vec sum = {};
                for (int64_t i = 0; i < count; i++) sum += power_of_two<true>(s[i * step] * LOG2_E - reference[j]);
                return sum;
            };
            vec sum = sum_up();
            if (any_above(sum, splat(LIMIT))) {  // those rows take the highest score as their reference
                vec raised = maximum(highest_of(s, step, count) * LOG2_E, reference[j]);
                raised = sum > LIMIT ? raised : reference[j];
                vec keep = power_of_two(reference[j] - raised);
                if (any_above(total[j], vec{}))
                    for (int64_t i = 0; i < blocks; i++) mass[i * VECTORS + j] *= keep;
                total[j] *= keep;
                reference[j] = raised;
                sum = sum_up();
            }
            mass[block * VECTORS + j] = sum;
            total[j] += sum;
        };
        const float* groups = P.summaries + (b * P.kv_heads + kv) * summary_floats(blocks, P.singles, D);
        const int32_t* alone = P.alone + (b * P.kv_heads + kv) * blocks;
        const int32_t* rest = P.rest + (b * P.kv_heads + kv) * blocks;
        const uint8_t* kinds = PLAIN ? nullptr : P.kinds.at(b) + tile * blocks;

        // Up to GROUP blocks, from `start` on, by their summaries.
        auto weigh_whole = [&](int64_t start, int64_t n) {
            const float* from = groups + start / GROUP * (P.singles + 2) * group_size;
            for (int64_t strip = 0; strip < strips; strip++) {
                const vec* q = queries + strip * query_size;
                if (n == GROUP) multiply<false>(left_of(from, D), q, scores, parts * GROUP, D);
                else
                    for (int64_t part = 0; part < parts; part++)
                        multiply<false>(left_of(from + part * group_size, D), q, scores + part * PART, n, D);
                multiply<false>(left_of(from + parts * group_size, D), squares + strip * query_size, spread, n, D);
                for (int64_t i = 0; i < n; i++) {
                    int64_t block = start + i;
                    if (!PLAIN && kinds[block] != WHOLE) continue;
                    float log_count = logs[rest[block]];
                    vec bias[W] = {};
                    if (!PLAIN && P.block_bias.kind) {
                        int64_t first = tile * ROWS + strip * WIDE;
                        add_mask<float>(P.block_bias, b, h, first, std::min<int64_t>(WIDE, P.q_len - first), block, 1,
                                        bias);
                    }
                    for (int j = 0; j < W; j++) {
                        vec variance = spread[i * W + j], bonus = variance * 0.5f;
                        if (any_above(variance, splat(2 * log_count))) {
                            vec root;
                            for (int l = 0; l < LANES; l++) root[l] = __builtin_sqrtf(2 * log_count * variance[l]);
                            bonus = variance < 2 * log_count ? bonus : root - log_count;
                        }
                        vec* s = scores + i * W + j;
                        vec middle = s[P.singles * PART] + bonus;
                        if (!PLAIN && P.softcap > 0) {
                            middle = P.softcap * hyperbolic_tangent(middle / P.softcap);
                            for (int64_t part = 0; part < alone[block]; part++)
                                s[part * PART] = P.softcap * hyperbolic_tangent(s[part * PART] / P.softcap);
                        }
                        s[alone[block] * PART] = rest[block] ? middle + log_count : splat(NONE);
                        if (!PLAIN && P.block_bias.kind)
                            for (int64_t part = 0; part <= alone[block]; part++) s[part * PART] += bias[j];
                        add(block, strip * W + j, s, PART, alone[block] + 1);
                    }
                }
            }
        };
        auto weigh_keys = [&](int64_t block) {  // a block that some row sees in part: exact
            int64_t keys = std::min<int64_t>(KEYS, P.kv_len - block * KEYS);
            Left k = keys_left(P.k.at(b, kv, block * KEYS), P.k.row, keys, D, key_room);
            for (int64_t strip = 0; strip < strips; strip++) {
                int64_t first = tile * ROWS + strip * WIDE;
                if (unseen(P, first, block)) {
                    for (int j = 0; j < W; j++) mass[block * VECTORS + strip * W + j] = vec{};
                    continue;
                }
                multiply<false>(k, queries + strip * query_size, scores, keys, D);
                if (PLAIN) hide(P, shown, first, block, scores);
                else finish_scores(P, b, h, first, block, scores);
                for (int j = 0; j < W; j++) add(block, strip * W + j, scores + j, W, keys);
            }
        };
        // What is exact comes first: most rows find a reference there that needs no raising.
        for (int64_t block = PLAIN ? whole : 0; block < upto; block++)
            if (PLAIN || (kinds[block] != WHOLE && kinds[block] != HIDDEN)) weigh_keys(block);
        for (int64_t start = 0; start < whole; start += GROUP) {
            int64_t n = std::min<int64_t>(GROUP, whole - start);
            bool some = PLAIN;
            for (int64_t i = 0; i < n && !some; i++) some = kinds[start + i] == WHOLE;
            if (some) weigh_whole(start, n);
        }

        float* peaks = P.peaks + item * blocks;
        for (int64_t r = 0; r < strips * WIDE; r++) {  // to the inverse, 0 for rows past the end
            float& sum = ((float*)total)[r];
            sum = r < rows && sum > 0 ? 1 / sum : 0;
        }
        for (int64_t block = 0; block < upto; block++) {
            if (!PLAIN && kinds[block] == HIDDEN) continue;
            vec highest = {};
            for (int64_t j = 0; j < strips * W; j++) highest = maximum(highest, mass[block * VECTORS + j] * total[j]);
            float peak = 0;
            for (int l = 0; l < LANES; l++) peak = std::max(peak, highest[l]);
            peaks[block] = peak;
        }
    }
}

extern "C" void estimate(Problem* problem) {
    problem->plain ? estimate_items<true>(*problem) : estimate_items<false>(*problem);
}
