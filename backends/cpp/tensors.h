/*
 * Pieces of tensors of any rank: copies, and the order of a row's elements.
 */
#ifndef S3_TENSORS_H
#define S3_TENSORS_H
#include "rows.h"

namespace s3 {
inline namespace S3_ISA {

struct alignas(16) sixteen_bytes { uint64_t low, high; };

/* elements from .. to - 1 */
template <class X>
S3_INLINE void copy_elements(X *out, const X *in, int64_t from, int64_t to) {
  memcpy(out + from, in + from, (size_t)(to - from) * sizeof(X));
}

/*
 * out[j * out_step + i] = in[i * in_step + j] for j < width and i < height, both at most 32: by way of a square in the first cache, so that
 * memory is read and written in runs and long steps do not crowd the same sets of the cache.
 */
template <class X>
S3_INLINE void transpose_square(const X *in, int64_t in_step, int64_t width, X *out, int64_t out_step, int64_t height) {
  alignas(64) X square[32][32];
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < width; ++j) square[j][i] = in[i * in_step + j];
  for (int64_t j = 0; j < width; ++j) memcpy(out + j * out_step, square[j], (size_t)height * sizeof(X));
}

/* heap[0 .. count - 1] in order below `at`: each is before its parent, so the last of all is on top */
template <bool Descending, class X>
S3_INLINE void sink(const X *x, int32_t *heap, int64_t at, int64_t count) {
  const int32_t moved = heap[at];
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= count) break;
    if (child + 1 < count && is_before<Descending>(x, heap[child], heap[child + 1])) ++child;
    if (!is_before<Descending>(x, moved, heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

/* The first `count` of n elements in order, and their places: a heap of the best so far, in the memory of the places, then taken apart. */
template <bool Descending, class X>
void sort_row(const X *x, int64_t n, int64_t count, X *values, int32_t *places) {
  if (count == 0) return;
  for (int64_t i = 0; i < count; ++i) places[i] = (int32_t)i;
  for (int64_t i = count / 2; i-- > 0;) sink<Descending>(x, places, i, count);
  for (int64_t i = count; i < n; ++i) {
    if (!is_before<Descending>(x, (int32_t)i, places[0])) continue;
    places[0] = (int32_t)i;
    sink<Descending>(x, places, 0, count);
  }
  for (int64_t left = count; --left > 0;) {
    const int32_t last = places[0];
    places[0] = places[left];
    places[left] = last;
    sink<Descending>(x, places, 0, left);
  }
  for (int64_t i = 0; i < count; ++i) values[i] = x[places[i]];
}

}  // namespace S3_ISA
}  // namespace s3
#endif
