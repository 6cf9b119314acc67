/*
 * Rows of a launch, split over the threads of the team, and reductions of a row.
 *
 * A reduction adds in 16 lanes (element i in lane i mod 16) and then the lanes in a tree: the same bits on every instruction set, whatever
 * the other rows are and however many threads there are.
 */
#ifndef S3_ROWS_H
#define S3_ROWS_H
#include "scalar.h"

/* before a loop: no iteration reads what another writes (a kernel's results never overlap its operands) */
#if defined(__clang__)
#define S3_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define S3_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace s3 {
inline namespace S3_ISA {

/* rows of all segments together, and what the graph's symbol of that number is */
S3_INLINE int64_t all_tokens(const s3_call *c) {
  int64_t tokens = 0;
  for (uint32_t i = 0; i < c->segments; ++i) tokens += c->heads[i].rows;
  return tokens;
}
S3_INLINE int64_t size_of(const s3_call *c, uint32_t symbol) { return c->dims[symbol]; }

/*
 * The part of this thread of all (row, tile) pairs of a launch, in order: `for (rows r = ...; r.next();)`. A tile is a part of the columns.
 * `row` counts over all segments: segment i starts at row i * stride * per_token.
 */
struct rows {
  int64_t row = 0, tile = 0;

  /* `per_token` rows for each token of each segment */
  static S3_INLINE rows of_tokens(const s3_call *c, int64_t per_token, int64_t tiles) {
    rows r(c, per_token, (int64_t)c->stride * per_token, c->segments, tiles);
    int64_t units = 0;
    for (uint32_t i = 0; i < c->segments; ++i) units += r.size(i) * tiles;
    r.start(c, units);
    return r;
  }

  /* a number of rows that has nothing to do with tokens */
  static S3_INLINE rows fixed(const s3_call *c, int64_t count, int64_t tiles) {
    rows r(nullptr, count, count, 1, tiles);
    r.start(c, count * tiles);
    return r;
  }

  S3_INLINE bool next() {
    if (left == 0) return false;
    --left;
    if (++tile < tiles) return true;
    tile = 0;
    for (++row; row == end;) {
      ++segment;
      row = (int64_t)segment * distance;
      end = row + size(segment);
    }
    return true;
  }

 private:
  const s3_call *call;
  int64_t per_token, distance, tiles, end = 0, left = 0;
  uint32_t segments, segment = 0;

  S3_INLINE rows(const s3_call *c, int64_t per_token, int64_t distance, uint32_t segments, int64_t tiles)
      : call(c), per_token(per_token), distance(distance), tiles(tiles), segments(segments) {}

  S3_INLINE int64_t size(uint32_t i) const { return call == nullptr ? per_token : (int64_t)call->heads[i].rows * per_token; }

  /* stands one before the first pair of this thread */
  S3_INLINE void start(const s3_call *c, int64_t units) {
    int64_t first = units * c->thread / c->threads;
    left = units * (c->thread + 1) / c->threads - first;
    if (left == 0) return;
    while (first >= size(segment) * tiles) first -= size(segment++) * tiles;
    row = (int64_t)segment * distance + first / tiles;
    end = (int64_t)segment * distance + size(segment);
    tile = first % tiles - 1;
  }
};

/* --- reductions ------------------------------------------------------------------------------------------------------------- */

typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));

S3_INLINE float sum(const float *x, int64_t n) {
  four_floats a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const four_floats *const p = (const four_floats *)(x + i);
    a += p[0];
    b += p[1];
    c += p[2];
    d += p[3];
  }
  float lane[16];
  for (int j = 0; j < 4; ++j) {
    lane[j] = a[j];
    lane[4 + j] = b[j];
    lane[8 + j] = c[j];
    lane[12 + j] = d[j];
  }
  for (int j = 0; i + j < n; ++j) lane[j] += x[i + j];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

S3_INLINE double sum(const double *x, int64_t n) {
  double lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] += x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

/* in f64, whose range keeps products of some f32 from vanishing on the way */
template <class F>
S3_INLINE F prod(const F *x, int64_t n) {
  double lane[16];
  for (int j = 0; j < 16; ++j) lane[j] = 1;
  for (int64_t i = 0; i < n; ++i) lane[i % 16] *= (double)x[i];
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lane[j] *= lane[j + width];
  return (F)lane[0];
}

S3_INLINE float max(const float *x, int64_t n) {
  int32_t m = rising(x[0]);
  for (int64_t i = 1; i < n; ++i) {
    const int32_t v = rising(x[i]);
    m = v > m ? v : m;
  }
  return from_rising(m);
}
S3_INLINE float min(const float *x, int64_t n) {
  int32_t m = rising(-x[0]);
  for (int64_t i = 1; i < n; ++i) {
    const int32_t v = rising(-x[i]);
    m = v > m ? v : m;
  }
  return -from_rising(m);
}
/* the largest magnitude; NaN magnitudes are above infinity's */
S3_INLINE float amax(const float *x, int64_t n) {
  int32_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t v = (int32_t)magnitude_bits(x[i]);
    m = v > m ? v : m;
  }
  return as_float((uint32_t)m);
}
S3_INLINE double max(const double *x, int64_t n) {
  double m = x[0];
  for (int64_t i = 1; i < n; ++i) m = larger_of(m, x[i]);
  return m;
}
S3_INLINE double min(const double *x, int64_t n) {
  double m = x[0];
  for (int64_t i = 1; i < n; ++i) m = smaller_of(m, x[i]);
  return m;
}
S3_INLINE double amax(const double *x, int64_t n) {
  double m = 0;
  for (int64_t i = 0; i < n; ++i) m = larger_of(m, magnitude(x[i]));
  return m;
}
S3_INLINE float mean(const float *x, int64_t n) { return sum(x, n) / (float)n; }
S3_INLINE double mean(const double *x, int64_t n) { return sum(x, n) / (double)n; }

/* out[g] = f of the g-th group of `group` elements; the last may be short */
#define S3_GROUPS(f)                                                                          \
  template <class F>                                                                          \
  S3_INLINE void f##_of_groups(const F *x, int64_t n, int64_t group, F *out) {                \
    for (int64_t i = 0, g = 0; i < n; i += group, ++g) out[g] = f(x + i, n - i < group ? n - i : group); \
  }
S3_GROUPS(sum)
S3_GROUPS(mean)
S3_GROUPS(max)
S3_GROUPS(min)
S3_GROUPS(amax)
S3_GROUPS(prod)
#undef S3_GROUPS
/* the value of every group becomes f of it */
template <class X, class F>
S3_INLINE void each_of_groups(X *x, int64_t groups, F f) {
  for (int64_t g = 0; g < groups; ++g) x[g] = f(x[g]);
}

}  // namespace S3_ISA
}  // namespace s3
#endif
