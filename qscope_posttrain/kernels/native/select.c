/* The k first of each row of a tile, merged with the k first so far: kernels/select.py says in which order. And dot
   products with chosen rows, for kernels/certified.py. Plain C; the compiler makes the versions for wider vectors, of
   which the loader takes the one that the processor has. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64

typedef uint64_t key; /* the value's bits, made monotone, over the complement of the index: all keys of a row differ */

INLINE key make_key(float value, int32_t index) {
    uint32_t bits;
    value += 0.0f; /* -0.0 becomes 0.0 */
    memcpy(&bits, &value, 4);
    if (value != value) bits = 0x7FC00000u; /* one NaN, above +Inf */
    bits = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
    return (key)bits << 32 | (uint32_t)~index;
}

INLINE float key_value(key k) {
    uint32_t bits = k >> 32;
    float value;
    bits = (bits & 0x80000000u) ? bits & 0x7FFFFFFFu : ~bits;
    memcpy(&value, &bits, 4);
    return value;
}

/* Moves the n largest of a[0..count) to the front. */
static void keep_largest(key *a, int64_t count, int64_t n) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        key x = a[low], y = a[(low + high) / 2], z = a[high];
        key pivot = x > y ? (y > z ? y : (x > z ? z : x)) : (x > z ? x : (y > z ? z : y));
        int64_t i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot) i++;
            while (a[j] < pivot) j--;
            if (i <= j) { key t = a[i]; a[i++] = a[j]; a[j--] = t; }
        }
        if (n - 1 <= j) high = j;
        else if (n - 1 >= i) low = i;
        else return;
    }
}

static int descending(const void *left, const void *right) {
    key a = *(const key *)left, b = *(const key *)right;
    return (a < b) - (a > b);
}

static void sort_descending(key *a, int64_t n) {
    if (n > 256) { qsort(a, n, sizeof(key), descending); return; }
    for (int64_t i = 1; i < n; i++) {
        key x = a[i];
        int64_t j = i;
        for (; j > 0 && a[j - 1] < x; j--) a[j] = a[j - 1];
        a[j] = x;
    }
}

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Flags of the elements that may come before the threshold: all that do, all NaN, and none below it. */
INLINE void flag_float(uint8_t *flags, const float *pre, float threshold) {
    for (int i = 0; i < BLOCK; i++) flags[i] = !(pre[i] <= threshold);
}

INLINE int16_t order16(uint16_t half) { return (int16_t)(half ^ (uint16_t)((int16_t)half >> 15 & 0x7FFF)); }

INLINE void flag_bfloat16(uint8_t *flags, const uint16_t *pre, int16_t threshold) {
    for (int i = 0; i < BLOCK; i++)
        flags[i] = (order16(pre[i]) > threshold) | ((uint16_t)(pre[i] & 0x7FFF) > 0x7F80);
}

/* A threshold that k elements are above: below the k-th largest of the maxima of `count` interleaved parts of the row. */
#define LANES 512
#define FEW_LANES 128

/* NaN, with which every element is flagged, where nothing finite is below. */
INLINE float below_float(float value) { return value > -FLT_MAX ? value - fabsf(value) * FLT_EPSILON - FLT_MIN : NAN; }

/* -0.0 has the order -1, and is equal to 0.0. */
INLINE int16_t below_int16(int16_t value) { return value == 0 ? -2 : value > INT16_MIN ? value - 1 : value; }

#define REACHED(name, type, store, order, lowest, below)                                                              \
    INLINE store name(const type *pre, int64_t n, int64_t k, key *scratch, const int count) {                          \
        store lanes[LANES];                                                                                            \
        for (int i = 0; i < count; i++) lanes[i] = lowest;                                                             \
        for (int64_t start = 0; start + count <= n; start += count)                                                    \
            for (int i = 0; i < count; i++) {                                                                          \
                store value = order(pre[start + i]);                                                                   \
                lanes[i] = value > lanes[i] ? value : lanes[i];                                                        \
            }                                                                                                          \
        for (int i = 0; i < count; i++) scratch[i] = make_key((float)lanes[i], i);                                     \
        keep_largest(scratch, count, k);                                                                               \
        key least = scratch[0];                                                                                        \
        for (int64_t i = 1; i < k; i++) least = scratch[i] < least ? scratch[i] : least;                               \
        return below(lanes[(uint32_t)~least]);                                                                         \
    }

/* `flag` decides on a block, `at` reads one element. With filled = k, an element equal to the k-th comes after it. */
#define MERGE(name, type, threshold_type, threshold_of, reached, flag, at)                                             \
    CLONES void name(float *values, int32_t *indices, const type *pre, int64_t rows, int64_t n, int64_t k,             \
                     int64_t filled, int64_t offset, key *found, int64_t capacity) {                                   \
        for (int64_t row = 0; row < rows; row++, values += k, indices += k, pre += n) {                                \
            int64_t count = filled;                                                                                    \
            for (int64_t i = 0; i < filled; i++) found[i] = make_key(values[i], indices[i]);                           \
            int bounded = filled == k;                                                                                 \
            float kth = bounded ? values[k - 1] : 0;                                                                   \
            if (bounded && kth != kth) continue; /* k NaN already */                                                   \
            threshold_type threshold = bounded ? threshold_of(kth) : 0;                                                \
            if (!bounded && 4 * k <= LANES && n >= 4 * LANES) {                                                        \
                threshold = reached(pre, n, k, found + filled, LANES);                                                 \
                bounded = 1;                                                                                           \
            } else if (!bounded && 2 * k <= FEW_LANES && n >= 2 * FEW_LANES) {                                         \
                threshold = reached(pre, n, k, found + filled, FEW_LANES);                                             \
                bounded = 1;                                                                                           \
            }                                                                                                          \
            for (int64_t start = 0; start < n; start += BLOCK) {                                                       \
                uint8_t flags[BLOCK];                                                                                  \
                uint64_t words[BLOCK / 8];                                                                             \
                int64_t left = n - start;                                                                              \
                if (bounded && left >= BLOCK) flag(flags, pre + start, threshold);                                     \
                else for (int i = 0; i < BLOCK; i++) flags[i] = i < left;                                              \
                memcpy(words, flags, BLOCK);                                                                           \
                uint64_t any = 0;                                                                                      \
                for (int w = 0; w < BLOCK / 8; w++) any |= words[w];                                                   \
                if (!any) continue;                                                                                    \
                for (int w = 0; w < BLOCK / 8; w++)                                                                    \
                    for (uint64_t word = words[w]; word; word &= word - 1) {                                           \
                        int64_t i = start + 8 * w + __builtin_ctzll(word) / 8;                                         \
                        found[count++] = make_key(at(pre[i]), (int32_t)(offset + i));                                  \
                    }                                                                                                  \
                if (count > capacity - BLOCK) {                                                                        \
                    keep_largest(found, count, k);                                                                     \
                    count = k;                                                                                         \
                    key least = found[0];                                                                              \
                    for (int64_t i = 1; i < k; i++) least = found[i] < least ? found[i] : least;                       \
                    kth = key_value(least);                                                                            \
                    if (kth != kth) break;                                                                             \
                    bounded = 1;                                                                                       \
                    threshold = threshold_of(kth);                                                                     \
                }                                                                                                      \
            }                                                                                                          \
            int64_t kept = count < k ? count : k;                                                                      \
            keep_largest(found, count, kept);                                                                          \
            sort_descending(found, kept);                                                                              \
            for (int64_t i = 0; i < kept; i++) {                                                                       \
                values[i] = key_value(found[i]);                                                                       \
                indices[i] = (int32_t)~(uint32_t)found[i];                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }

INLINE float same(float value) { return value; }

REACHED(reached_float, float, float, same, -FLT_MAX, below_float)
REACHED(reached_bfloat16, uint16_t, int16_t, order16, INT16_MIN + 1, below_int16)

INLINE int16_t order_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return order16((uint16_t)(bits >> 16));
}

MERGE(merge_float, float, float, same, reached_float, flag_float, same)
MERGE(merge_bfloat16, uint16_t, int16_t, order_of, reached_bfloat16, flag_bfloat16, widen)

/* out[t][j] = x[t] . W[indices[t][j]] + b[..] for first[t] <= j < last[t]; sums in 64 parts. */
#define DOT(name, type, at)                                                                                            \
    CLONES void name(float *out, const float *x, const type *W, const type *b, const int32_t *indices,                 \
                     const int32_t *first, const int32_t *last, int64_t rows, int64_t m, int64_t d_model) {            \
        for (int64_t t = 0; t < rows; t++)                                                                             \
            for (int64_t j = first[t]; j < last[t]; j++) {                                                             \
                const float *token = x + t * d_model;                                                                  \
                const type *row = W + indices[t * m + j] * d_model;                                                    \
                float parts[BLOCK] = {0}, sum = 0;                                                                     \
                int64_t d = 0;                                                                                         \
                for (; d + BLOCK <= d_model; d += BLOCK)                                                               \
                    for (int i = 0; i < BLOCK; i++) parts[i] += token[d + i] * at(row[d + i]);                         \
                for (; d < d_model; d++) sum += token[d] * at(row[d]);                                                 \
                for (int i = 0; i < BLOCK; i++) sum += parts[i];                                                       \
                out[t * m + j] = sum + at(b[indices[t * m + j]]);                                                      \
            }                                                                                                          \
    }

DOT(dot_float, float, same)
DOT(dot_bfloat16, uint16_t, widen)
