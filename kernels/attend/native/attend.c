// Attention of few queries to a store and to the chunk that follows it, on a CPU.
//
// A task is some tokens of one row and one group of KV heads, TILE at a time: coded ones, or all that are not. Keys, or values,
// may be coded together with those of more heads: a task then takes what its own heads need of them. The codes of a tile become
// numbers, whose product with the basis gives the keys of all heads of the group; these are turned, scored and put through a
// running softmax (Milakov and Gimelshein, arXiv 1805.02867). Values are summed in the latent and become channels once, when a
// segment ends. What is held of a tile stays in a core's own cache: 64 keys of 192 channels are 48 KiB.
//
// Codes of 4 and 2 bits lie in planes here: all low halves of bytes, then all high ones. The rows of the basis are put in that
// order instead of the codes, and a place that no code fills has a row of zeros.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16  // of a vector
#else
#define LANES 8
#endif
#define TILE 64            // tokens
#define STRIP (2 * LANES)  // channels of a product at a time
#define ROWS (LANES / 2)   // tokens of a product at a time: half of the 16 registers, or of 32 with AVX-512, hold its sums

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

typedef struct {
    int64_t bits8, bits4, bits2, row_bytes, heads;  // heads: those that are coded jointly, a multiple of a task's
    const uint8_t *codes;   // [rows, KV heads / heads, slots, row_bytes]
    const int8_t *basis;    // [rows, KV heads / heads, segments, rank, width], of the channels of `heads` heads
    const float *affine;    // [rows, KV heads / heads, segments, 2 rank + width]: steps, scales of the basis, channel weights
    const void *exact;      // [rows, KV heads, exact_places, dim]
    const int8_t *recent;   // [rows, KV heads, ring, dim], or NULL: recent tokens follow the first ones in `exact`
    const uint8_t *sizes;   // [rows, KV heads, ring], of recent tokens
    const float *chunk;     // [rows, KV heads, columns, dim]: what is not padding, side by side
} Side;

typedef struct {
    int64_t before, coded, after;  // tokens in the store, coded ones of these, and those with the chunk
} Row;

typedef struct {
    int64_t rows, groups, heads, dim, queries, columns, segments, pairs, splits;  // heads of a group, queries of a head
    int64_t slots, first, exact_places, ring, exact_bits;  // exact_bits: 32, or 16 of bfloat16
    int64_t position_stride, allowed_row, allowed_column;  // strides
    double scaling, softcap;
    Side key, value;
    const uint8_t *norms;       // [rows, KV heads / value.heads, slots], or NULL
    const int32_t *starts;      // [rows, segments]
    const Row *counts;          // [rows]
    const int32_t *positions;   // [rows, position_stride], of tokens
    const double *frequencies;  // [pairs]
    const float *table;         // [2, TILE, pairs]: cosine and sine of what 0 to TILE - 1 positions turn, times the scaling
    const int32_t *order;       // [dim]: first channels of pairs, then second ones, then those that are not turned
    const uint8_t *allowed;     // of a row and a column: which tokens it sees; NULL: all. Query m has column m % columns
    const float *query;         // [rows, groups, heads, queries, dim], times the scale
    float *out;                 // [rows, groups, heads, queries, dim]: the mean of values by exponentials of scores
    float *log_sum;             // [rows, groups, heads, queries]: the logarithm of the sum of these exponentials
} Step;

// What a task works with, and what is left of it. Arrays of a query have `count` of them, those of all heads of the group.
typedef struct {
    int64_t count, width, key_places, value_places;  // width: channels of a group, padded to STRIP
    float *key_basis, *value_basis;                  // of the segment
    float *latent, *keys, *values, *cosine, *sine, *query, *scores, *mixed;
    uint8_t *row;
    float *best, *sum, *out;  // of each query the largest score, the sum of exponentials, and values times these
} Task;

// A tile's values, as numbers in the latent or as channels, and where they are summed.
typedef struct {
    const float *values;
    float *into;
    int64_t stride, count;  // of `values`, and how many numbers are summed
    int64_t of_head;        // 1: each head has its own numbers
} Mixed;

static int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t places(const Side *side) {
    return side->bits8 + 2 * ((side->bits4 + 1) / 2) + 4 * ((side->bits2 + 3) / 4);
}

// Codes of n tokens as whole numbers plus a half, around zero: [n, places]. All loops run over whole vectors: what is too much
// is overwritten by what comes next, and `out` has room for it after the last token.
static void numbers(const Side *side, const uint8_t *codes, int64_t n, uint8_t *restrict row, float *restrict out) {
    const int64_t n8 = side->bits8, n4 = (side->bits4 + 1) / 2, n2 = (side->bits2 + 3) / 4;
    for (int64_t t = 0; t < n; t++, codes += side->row_bytes) {
        memcpy(row, codes, side->row_bytes);
        const uint8_t *restrict from = row;
        for (int64_t i = 0; i < n8; i += LANES)
            for (int64_t j = i; j < i + LANES; j++) out[j] = (float)from[j] - 127.5f;
        from += n8, out += n8;
        for (int64_t field = 0; field < 2; field++, out += n4)
            for (int64_t i = 0; i < n4; i += LANES)
                for (int64_t j = i; j < i + LANES; j++) out[j] = (float)((from[j] >> (4 * field)) & 15) - 7.5f;
        from += n4;
        for (int64_t field = 0; field < 4; field++, out += n2)
            for (int64_t i = 0; i < n2; i += LANES)
                for (int64_t j = i; j < i + LANES; j++) out[j] = (float)((from[j] >> (2 * field)) & 3) - 1.5f;
    }
}

// The group of one side, over all rows, in which the heads of a task's group are.
static int64_t group_of(const Step *all, const Side *side, int64_t at) { return at * all->heads / side->heads; }

// What a segment's basis gives of a task's channels, times steps and scales and over channel weights, in the order of `numbers`,
// as strips [width / STRIP, places, STRIP]. The channels of a head come in `order`, or as they are.
static void prepare(const Step *all, const Side *side, int64_t at, int64_t segment, const int32_t *order, float *restrict out) {
    const int64_t rank = side->bits8 + side->bits4 + side->bits2, joint = side->heads * all->dim, rows = places(side);
    const int64_t n4 = (side->bits4 + 1) / 2, n2 = (side->bits2 + 3) / 4, width = all->heads * all->dim;
    const int64_t which = group_of(all, side, at) * all->segments + segment, own = at * all->heads % side->heads * all->dim;
    const int8_t *basis = side->basis + which * rank * joint + own;
    const float *step = side->affine + which * (2 * rank + joint), *scale = step + rank, *weight = scale + rank + own;
    memset(out, 0, sizeof(float) * rows * padded(width, STRIP));
    for (int64_t r = 0; r < rank; r++) {
        int64_t place = r;
        if (r >= side->bits8 + side->bits4) {
            const int64_t code = r - side->bits8 - side->bits4;
            place = side->bits8 + 2 * n4 + code % 4 * n2 + code / 4;
        } else if (r >= side->bits8) {
            place = side->bits8 + (r - side->bits8) % 2 * n4 + (r - side->bits8) / 2;
        }
        for (int64_t w = 0; w < width; w++) {
            const int64_t from = order ? w - w % all->dim + order[w % all->dim] : w;
            out[(w / STRIP * rows + place) * STRIP + w % STRIP] = step[r] * scale[r] * basis[r * joint + from] / weight[from];
        }
    }
}

// [n, rank] times strips of [rank, width]: [n, width], n a multiple of ROWS.
static void product(const float *restrict x, int64_t n, int64_t rank, const float *restrict basis, int64_t width,
                    float *restrict out) {
    for (int64_t w = 0; w < width; w += STRIP, basis += rank * STRIP)
        for (int64_t t = 0; t < n; t += ROWS) {
            vector low[ROWS] = {{0}}, high[ROWS] = {{0}};
            for (int64_t r = 0; r < rank; r++) {
                const vector a = *(const vector *)(basis + r * STRIP), b = *(const vector *)(basis + r * STRIP + LANES);
#pragma GCC unroll 8
                for (int64_t i = 0; i < ROWS; i++) {
                    low[i] += x[(t + i) * rank + r] * a;
                    high[i] += x[(t + i) * rank + r] * b;
                }
            }
#pragma GCC unroll 8
            for (int64_t i = 0; i < ROWS; i++) {
                *(vector *)(out + (t + i) * width + w) = low[i];
                *(vector *)(out + (t + i) * width + w + LANES) = high[i];
            }
        }
}

// e to the power of x <= 0, to a few units in the last place: 2 to a whole power times a polynomial on half an octave.
static inline float exponential(float x) {
    const float power = x * 1.44269504f, whole = __builtin_rintf(power > -126 ? power : -126), part = power - whole;
    float y = 1.53533e-4f;
    y = y * part + 1.33988e-3f;
    y = y * part + 9.61844e-3f;
    y = y * part + 5.550332e-2f;
    y = y * part + 2.4022648e-1f;
    y = y * part + 6.9314720e-1f;
    y = y * part + 1.0f;
    union { uint32_t bits; float value; } scale = {.bits = (uint32_t)((int32_t)whole + 127) << 23};
    return power < -126 ? 0 : y * scale.value;
}

static float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Keys of n tokens, turned by how far they are from the first; the table knows positions that run on by one.
static void turn_keys(const Step *all, const Task *s, const int32_t *positions, int64_t n) {
    const int64_t pairs = all->pairs;
    const float *cosine = all->table, *sine = all->table + TILE * pairs;
    int64_t known = 1;
    while (known < n && positions[known] == positions[0] + known) known++;
    if (known < n) {
        for (int64_t t = 0; t < n; t++)
            for (int64_t p = 0; p < pairs; p++) {
                const double angle = ((double)positions[t] - positions[0]) * all->frequencies[p];
                s->cosine[t * pairs + p] = cos(angle) * all->scaling;
                s->sine[t * pairs + p] = sin(angle) * all->scaling;
            }
        cosine = s->cosine, sine = s->sine;
    }
    for (int64_t t = 0; t < n; t++)
        for (int64_t head = 0; head < all->heads; head++) {
            float *restrict a = s->keys + t * s->width + head * all->dim, *restrict b = a + pairs;
            const float *restrict c = cosine + t * pairs, *restrict d = sine + t * pairs;
            for (int64_t p = 0; p < pairs; p++) {
                const float x = a[p], y = b[p];
                a[p] = x * c[p] - y * d[p];
                b[p] = y * c[p] + x * d[p];
            }
        }
}

// Queries [count, dim] in `order`, turned back by the position at which a tile begins: its keys then turn by their distance.
static void turn_queries(const Step *all, const Task *s, const float *query, int32_t position) {
    const int64_t dim = all->dim, pairs = all->pairs;
    for (int64_t p = 0; p < pairs; p++) {
        const float c = cos(position * all->frequencies[p]), d = sin(position * all->frequencies[p]);
        for (int64_t m = 0; m < s->count; m++) {
            const float x = query[m * dim + all->order[p]], y = query[m * dim + all->order[pairs + p]];
            s->query[m * dim + p] = x * c + y * d;
            s->query[m * dim + pairs + p] = y * c - x * d;
        }
    }
    for (int64_t m = 0; m < s->count; m++)
        for (int64_t c = 2 * pairs; c < dim; c++) s->query[m * dim + c] = query[m * dim + all->order[c]];
}

// A query's scores of n keys enter its softmax: they become exponentials, and what was there before is rescaled.
static void enter(const Step *all, const Task *s, int64_t m, const uint8_t *allowed, int64_t n) {
    const float *keys = s->keys + m / all->queries * all->dim, softcap = all->softcap;
    float *restrict scores = s->scores, best = s->best[m];
    for (int64_t t = 0; t < n; t++) {
        scores[t] = dot(s->query + m * all->dim, keys + t * s->width, all->dim);
        if (softcap != 0) scores[t] = softcap * tanhf(scores[t] / softcap);
        if (allowed && !allowed[t]) scores[t] = -INFINITY;
        best = scores[t] > best || isnan(scores[t]) ? scores[t] : best;
    }
    if (best == -INFINITY) {
        memset(scores, 0, sizeof(float) * n);
        return;
    }
    const float before = exponential(s->best[m] - best);
    float sum = 0;
    for (int64_t t = 0; t < n; t++) scores[t] = exponential(scores[t] - best);
    for (int64_t t = 0; t < n; t++) sum += scores[t];
    s->sum[m] = s->sum[m] * before + sum;
    s->best[m] = best;
    if (before != 1) {
        for (int64_t r = 0; r < s->value_places; r++) s->mixed[m * s->value_places + r] *= before;
        for (int64_t c = 0; c < all->dim; c++) s->out[m * all->dim + c] *= before;
    }
}

// Values of n tokens by exponentials, some tokens at a time for the sake of loads and stores. A token of weight zero may hold
// anything.
static void mix(const float *restrict p, const float *restrict v, int64_t n, int64_t stride, int64_t count, float *restrict out) {
    for (int64_t t = 0; t < n;) {
        const float *restrict a = v + t * stride;
        if (t + 4 <= n && p[t] != 0 && p[t + 1] != 0 && p[t + 2] != 0 && p[t + 3] != 0) {
            const float *restrict b = a + stride, *restrict c = b + stride, *restrict d = c + stride;
            for (int64_t r = 0; r < count; r++) out[r] += p[t] * a[r] + p[t + 1] * b[r] + p[t + 2] * c[r] + p[t + 3] * d[r];
            t += 4;
        } else {
            if (p[t] != 0)
                for (int64_t r = 0; r < count; r++) out[r] += p[t] * a[r];
            t++;
        }
    }
}

// Keys and values of n tokens from `token` on, which the task holds, enter the softmax of every query.
static void attend_tile(const Step *all, const Task *s, int64_t at, int64_t token, int64_t n, Mixed mixed) {
    const int64_t row = at / all->groups;
    const int32_t *positions = all->positions + row * all->position_stride + token;
    turn_keys(all, s, positions, n);
    turn_queries(all, s, all->query + at * s->count * all->dim, positions[0]);
    for (int64_t m = 0; m < s->count; m++) {
        const uint8_t *allowed = all->allowed;
        if (allowed) allowed += row * all->allowed_row + m % all->columns * all->allowed_column + token;
        enter(all, s, m, allowed, n);
        const float *values = mixed.values + mixed.of_head * (m / all->queries) * all->dim;
        mix(s->scores, values, n, mixed.stride, mixed.count, mixed.into + m * mixed.count);
    }
}

// What was summed in the latent becomes channels, and the next segment begins with nothing.
static void leave_segment(const Step *all, const Task *s) {
    for (int64_t m = 0; m < s->count; m++)
        for (int64_t c = 0; c < all->dim; c++) {
            const int64_t w = m / all->queries * all->dim + c;
            const float *column = s->value_basis + w / STRIP * s->value_places * STRIP + w % STRIP;
            float sum = 0;
            for (int64_t r = 0; r < s->value_places; r++) sum += s->mixed[m * s->value_places + r] * column[r * STRIP];
            s->out[m * all->dim + c] += sum;
        }
    memset(s->mixed, 0, sizeof(float) * s->count * s->value_places);
}

// Coded tokens in the slots from `first` to `last`.
static void attend_coded(const Step *all, const Task *s, int64_t at, int64_t first, int64_t last) {
    const int32_t *starts = all->starts + at / all->groups * all->segments;
    int64_t segment = 0, n;
    while (segment + 1 < all->segments && starts[segment + 1] <= first) segment++;
    for (int64_t slot = first, fresh = 1; slot < last; slot += n) {
        if (fresh) {
            prepare(all, &all->key, at, segment, all->order, s->key_basis);
            prepare(all, &all->value, at, segment, NULL, s->value_basis);
        }
        const int64_t end = segment + 1 < all->segments ? least(starts[segment + 1], last) : last;
        const int64_t key = group_of(all, &all->key, at) * all->slots + slot;
        const int64_t value = group_of(all, &all->value, at) * all->slots + slot;
        n = least(end - slot, TILE);
        numbers(&all->key, all->key.codes + key * all->key.row_bytes, n, s->row, s->latent);
        product(s->latent, padded(n, ROWS), s->key_places, s->key_basis, s->width, s->keys);
        numbers(&all->value, all->value.codes + value * all->value.row_bytes, n, s->row, s->latent);
        for (int64_t t = 0; all->norms && t < n; t++) {
            const float norm = exp2f((all->norms[value + t] - 128) / 8.0f);
            for (int64_t r = 0; r < s->value_places; r++) s->latent[t * s->value_places + r] *= norm;
        }
        attend_tile(all, s, at, all->first + slot, n, (Mixed){s->latent, s->mixed, s->value_places, s->value_places, 0});
        fresh = slot + n == end;
        if (fresh) leave_segment(all, s), segment++;
    }
}

// Channels of one head of a token that is not coded.
static void load(const Step *all, const Side *side, int64_t row, int64_t head, int64_t token, float *restrict out) {
    const int64_t before = all->counts[row].before, kv = row * all->groups * all->heads + head, dim = all->dim;
    if (token >= before) {
        memcpy(out, side->chunk + (kv * all->columns + token - before) * dim, sizeof(float) * dim);
        return;
    }
    int64_t place = token;
    if (token >= all->first) {
        place = (token - all->first) % all->ring;
        if (side->recent) {
            const float size = exp2f((side->sizes[kv * all->ring + place] - 192) / 8.0f);
            const int8_t *restrict from = side->recent + (kv * all->ring + place) * dim;
            for (int64_t c = 0; c < dim; c++) out[c] = from[c] * size;
            return;
        }
        place += all->first;
    }
    const int64_t from = (kv * all->exact_places + place) * dim;
    if (all->exact_bits == 32) {
        memcpy(out, (const float *)side->exact + from, sizeof(float) * dim);
    } else {
        for (int64_t c = 0; c < dim; c++) {
            union { uint32_t bits; float value; } wide = {.bits = (uint32_t)((const uint16_t *)side->exact)[from + c] << 16};
            out[c] = wide.value;
        }
    }
}

// First tokens, recent ones and the chunk.
static void attend_exact(const Step *all, const Task *s, int64_t at) {
    const int64_t row = at / all->groups, group = at % all->groups;
    const Row counts = all->counts[row];
    const int64_t first = least(counts.before, all->first);
    const int64_t spans[2][2] = {{0, first}, {first + counts.coded, counts.after}};
    for (int64_t i = 0; i < 2; i++)
        for (int64_t token = spans[i][0], n; token < spans[i][1]; token += n) {
            n = least(spans[i][1] - token, TILE);
            for (int64_t t = 0; t < n; t++)
                for (int64_t head = 0; head < all->heads; head++) {
                    const int64_t to = t * s->width + head * all->dim;
                    float *restrict key = s->keys + to, *restrict plain = s->scores;
                    load(all, &all->key, row, group * all->heads + head, token + t, plain);
                    for (int64_t c = 0; c < all->dim; c++) key[c] = plain[all->order[c]];
                    load(all, &all->value, row, group * all->heads + head, token + t, s->values + to);
                }
            attend_tile(all, s, at, token, n, (Mixed){s->values, s->out, s->width, all->dim, 1});
        }
}

// Tasks of a row and group in one softmax.
static void merge(const Step *all, const Task *tasks, int64_t at) {
    const int64_t count = tasks->count, dim = all->dim;
    for (int64_t m = 0; m < count; m++) {
        float best = -INFINITY, sum = 0, *restrict out = all->out + (at * count + m) * dim;
        for (int64_t i = 0; i <= all->splits; i++)
            best = tasks[i].best[m] > best || isnan(tasks[i].best[m]) ? tasks[i].best[m] : best;
        memset(out, 0, sizeof(float) * dim);
        for (int64_t i = 0; i <= all->splits && best != -INFINITY; i++) {
            const float weight = exponential(tasks[i].best[m] - best);
            sum += tasks[i].sum[m] * weight;
            for (int64_t c = 0; c < dim && weight != 0; c++) out[c] += tasks[i].out[m * dim + c] * weight;
        }
        for (int64_t c = 0; c < dim && sum != 0; c++) out[c] /= sum;
        all->log_sum[at * count + m] = sum != 0 ? best + logf(sum) : -INFINITY;
    }
}

static float *take(float *memory, int64_t *used, int64_t count) {
    float *taken = memory ? memory + *used : NULL;
    *used += padded(count, LANES);
    return taken;
}

// Memory of a task, apart from what is left of it; where `memory` is NULL, how many floats that takes.
static int64_t lay_out(const Step *all, Task *s, float *memory) {
    const int64_t most = s->key_places > s->value_places ? s->key_places : s->value_places;
    const int64_t bytes = (all->key.row_bytes > all->value.row_bytes ? all->key.row_bytes : all->value.row_bytes) + LANES;
    int64_t used = 0;
    s->key_basis = take(memory, &used, s->key_places * s->width);
    s->value_basis = take(memory, &used, s->value_places * s->width);
    s->latent = take(memory, &used, TILE * most + LANES);
    s->keys = take(memory, &used, TILE * s->width);
    s->values = take(memory, &used, TILE * s->width);
    s->cosine = take(memory, &used, TILE * all->pairs);
    s->sine = take(memory, &used, TILE * all->pairs);
    s->query = take(memory, &used, s->count * all->dim);
    s->scores = take(memory, &used, TILE > all->dim ? TILE : all->dim);
    s->mixed = take(memory, &used, s->count * s->value_places);
    s->row = (uint8_t *)take(memory, &used, padded(bytes, sizeof(float)) / sizeof(float));
    return used;
}

// Of every query what `Step` says. Returns 0, or 1 where there is not enough memory.
int attend(const Step *all) {
    const int64_t tasks = all->rows * all->groups, each = all->splits + 1, count = all->heads * all->queries;
    const int64_t left = padded(count * (2 + all->dim), LANES);
    Task shape = {.count = count,
                  .width = padded(all->heads * all->dim, STRIP),
                  .key_places = places(&all->key),
                  .value_places = places(&all->value)};
    float *results = malloc(sizeof(float) * tasks * each * left);
    Task *done = malloc(sizeof(Task) * tasks * each);
    int failed = !results || !done;
#pragma omp parallel if (!failed)
    {
        Task mine = shape;
        float *memory = malloc(sizeof(float) * lay_out(all, &mine, NULL));
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        } else {
            lay_out(all, &mine, memory);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks * each; i++) {
            if (!memory || !results || !done) continue;
            mine.best = results + i * left;
            mine.sum = mine.best + count;
            mine.out = mine.sum + count;
            done[i] = mine;
            memset(mine.sum, 0, sizeof(float) * count * (1 + all->dim));
            memset(mine.mixed, 0, sizeof(float) * count * mine.value_places);
            for (int64_t m = 0; m < count; m++) mine.best[m] = -INFINITY;
            const int64_t at = i / each, part = i % each;
            if (part < all->splits) {
                const int64_t coded = all->counts[at / all->groups].coded;
                const int64_t span = padded((coded + all->splits - 1) / all->splits, TILE);
                attend_coded(all, &mine, at, part * span, least((part + 1) * span, coded));
            } else {
                attend_exact(all, &mine, at);
            }
        }
        free(memory);
    }
    for (int64_t at = 0; at < tasks && !failed; at++) merge(all, done + at * each, at);
    free(results);
    free(done);
    return failed;
}
