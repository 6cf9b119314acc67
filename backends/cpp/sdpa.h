/*
 * Attention of heads that lie in memory as tensors. A block of queries that share a head of k and v meets the keys some at a time, with a
 * running maximum and sum for each query: no matrix of scores in memory.
 *
 * Scores are products of rows of k with panels whose columns are queries, so that the softmax goes down columns, all queries at once. Blocks and the order of sums depend on sizes alone, not on the threads.
 */
#ifndef S3_SDPA_H
#define S3_SDPA_H
#include "attention.h"

namespace s3 {
inline namespace S3_ISA {

struct sdpa_sizes {
  int64_t batches, kv_heads, group /* heads of q for one of k */, queries, keys;
};

enum class sdpa_causal { none, first, last };

/* what scores are added to or hidden by, and its elements from one index to the next of each axis of the scores */
template <class B>
struct sdpa_bias {
  const B *at;
  int64_t batch, head, query, key;
};

/* n elements as f32, zeros up to `padded`, a multiple of 16 */
template <class X>
S3_INLINE void widen_row(const X *from, int64_t n, float *to, int64_t padded) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    vec v[parts];
    widen(from + i, v);
    for (int p = 0; p < parts; ++p) store(to + i + p * lanes, v[p]);
  }
  for (; i < padded; ++i) to[i] = i < n ? value(from[i]) : 0.0f;
}

template <int64_t Dim, int64_t Out>
struct sdpa_block {
  static constexpr int panels = panels_in_registers(most_rows), width = panels * columns_of_panel; /* queries */
  static constexpr int64_t tile = 48;                                                              /* keys at a time: rows of products divide it */
  static constexpr int64_t dim = (Dim + 15) / 16 * 16, out = (Out + 15) / 16 * 16;
  static_assert(tile % most_rows == 0);
  alignas(64) float q[panels][dim * columns_of_panel]; /* panels: dimension by queries */
  alignas(64) float k[tile * dim];
  alignas(64) float v[out / 16][tile * columns_of_panel]; /* panels: key by columns */
  alignas(64) float scores[tile * width]; /* key by queries; then what values count */
  alignas(64) float values[width * out]; /* sums, relative to the maximum */
  alignas(64) float maximum[width], kept[width], total[width];
  int64_t seen[width];
};

/* values of M queries from `first` on: what was kept of them, and those of `count` more keys */
template <int M, int64_t Dim, int64_t Out>
void add_values(sdpa_block<Dim, Out> &s, int64_t first, int64_t count) {
  typedef sdpa_block<Dim, Out> block;
  constexpr int P = panels_in_registers(M);
  constexpr int64_t all = block::out / 16;
  for (int64_t n = 0; n < all; n += P) {
    const float *panels[P];
    vec acc[M][P * parts];
    for (int p = 0; p < P; ++p) {
      const int64_t panel = least(n + p, all - 1);
      panels[p] = s.v[panel];
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < parts; ++i)
          acc[m][p * parts + i] = load(s.values + (first + m) * block::out + panel * 16 + i * lanes) * set(s.kept[first + m]);
    }
    for (int64_t j = 0; j < count; ++j) {
      const float *const weights = s.scores + j * block::width + first;
      vec w[P * parts];
#pragma GCC unroll 32
      for (int i = 0; i < P * parts; ++i) w[i] = load(panels[i / parts] + j * 16 + i % parts * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const vec weight = set(weights[m]);
#pragma GCC unroll 32
        for (int i = 0; i < P * parts; ++i) acc[m][i] = fma(weight, w[i], acc[m][i]);
      }
    }
    for (int p = 0; p < P && n + p < all; ++p)
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < parts; ++i) store(s.values + (first + m) * block::out + (n + p) * 16 + i * lanes, acc[m][p * parts + i]);
  }
}

/* Keys `key` .. `key + count - 1` of one head, for the `queries` of a block. */
template <class X, class B, int64_t Dim, int64_t Out>
void attend_keys(sdpa_block<Dim, Out> &s, const X *k, const X *v, int64_t key, int64_t count, int64_t queries, const B *const (&bias)[sdpa_block<Dim, Out>::width],
                 int64_t bias_step, float scale, float softcap) {
  typedef sdpa_block<Dim, Out> block;
  constexpr int P = block::panels;
  constexpr int64_t W = block::width;
  for (int64_t j = 0; j < block::tile; ++j)
    if (j < count)
      widen_row(k + (key + j) * Dim, Dim, s.k + j * block::dim, block::dim);
    else
      memset(s.k + j * block::dim, 0, sizeof(float) * block::dim);
  for (int64_t j = 0; j < count; ++j) {
    alignas(64) float row[block::out];
    widen_row(v + (key + j) * Out, Out, row, block::out);
    for (int64_t p = 0; p < block::out / 16; ++p) memcpy(s.v[p] + j * 16, row + p * 16, 64);
  }

  const uint8_t *panels[P];
  for (int p = 0; p < P; ++p) panels[p] = reinterpret_cast<const uint8_t *>(s.q[p]);
  for (int64_t j = 0; j < count; j += most_rows) {
    vec acc[most_rows][P * parts] = {};
    multiply<f32_panel, most_rows, P, 0>(s.k + j * block::dim, block::dim, 16, panels, Dim, acc);
    for (int m = 0; m < most_rows; ++m)
      for (int i = 0; i < P * parts; ++i) store(s.scores + (j + m) * W + i * lanes, acc[m][i]);
  }

  for (int64_t i = 0; i < count * W; ++i) s.scores[i] *= scale;
  if (softcap != 0)
    for (int64_t i = 0; i < count * W; ++i) s.scores[i] = softcap * hyperbolic_tangent(s.scores[i] / softcap);
  for (int64_t n = 0; n < queries; ++n) {
    if (bias[n] != nullptr)
      for (int64_t j = 0; j < count; ++j) {
        const B more = bias[n][(key + j) * bias_step];
        if constexpr (sizeof(B) == sizeof(float))
          s.scores[j * W + n] += more;
        else if (more == 0)
          s.scores[j * W + n] = -infinity;
      }
    for (int64_t j = s.seen[n] > key ? s.seen[n] - key : 0; j < count; ++j) s.scores[j * W + n] = -infinity;
  }

  /* the loops below are over queries, side by side, in copies that the compiler knows to be apart */
  alignas(64) float maximum[W], base[W], total[W] = {};
  memcpy(maximum, s.maximum, sizeof maximum);
  for (int64_t j = 0; j < count; ++j) {
    const float *const row = s.scores + j * W;
    for (int64_t n = 0; n < W; ++n) maximum[n] = larger_of(maximum[n], row[n]);
  }
  for (int64_t n = 0; n < W; ++n) base[n] = pick(maximum[n] == -infinity, 0.0f, maximum[n]); /* nothing seen yet */
  for (int64_t n = 0; n < W; ++n) s.kept[n] = pick(s.maximum[n] == -infinity, 0.0f, exponential_of(s.maximum[n] - base[n]));
  for (int64_t j = 0; j < count; ++j) {
    float *const row = s.scores + j * W;
    S3_INDEPENDENT
    for (int64_t n = 0; n < W; ++n) {
      const float power = exponential_of(row[n] - base[n]);
      row[n] = pick(row[n] == -infinity, 0.0f, power);
    }
    for (int64_t n = 0; n < W; ++n) total[n] += row[n];
  }
  for (int64_t n = 0; n < W; ++n) s.total[n] = s.total[n] * s.kept[n] + total[n];
  memcpy(s.maximum, maximum, sizeof maximum);

  int64_t first = 0;
  for (; queries - first >= most_rows; first += most_rows) add_values<most_rows>(s, first, count);
#if defined(S3_AVX512)
  for (; queries - first >= 4; first += 4) add_values<4>(s, first, count);
#endif
  for (; queries - first >= 2; first += 2) add_values<2>(s, first, count);
  if (first < queries) add_values<1>(s, first, count);
}

template <class X, class Y, class B, int64_t Dim, int64_t Out>
void sdpa(const s3_call *c, const sdpa_sizes &n, sdpa_causal causal, const X *q, const X *k, const X *v, const sdpa_bias<B> &bias, float scale,
          float softcap, Y *out) {
  typedef sdpa_block<Dim, Out> block;
  const int64_t of_head = n.group * n.queries; /* queries that share a head of k, one after another in memory */
  const int64_t blocks = ceil_div(of_head, block::width);
  block s;
  for (rows r = rows::fixed(c, n.batches * n.kv_heads, blocks); r.next();) {
    const int64_t begin = r.tile * block::width, count = least(of_head - begin, block::width);
    const int64_t batch = r.row / n.kv_heads, kv_head = r.row % n.kv_heads;
    const B *biases[block::width] = {};
    int64_t most = 0; /* keys that any of these sees */
    memset(s.values, 0, sizeof s.values);
    memset(s.q, 0, sizeof s.q);
    for (int64_t i = 0; i < block::width; ++i) {
      s.maximum[i] = -infinity;
      s.total[i] = 0;
      s.seen[i] = 0;
      if (i >= count) continue;
      const int64_t head = kv_head * n.group + (begin + i) / n.queries, query = (begin + i) % n.queries;
      const int64_t own = query + 1 + (causal == sdpa_causal::last ? n.keys - n.queries : 0);
      s.seen[i] = causal == sdpa_causal::none || own > n.keys ? n.keys : own < 0 ? 0 : own;
      if (s.seen[i] > most) most = s.seen[i];
      if (bias.at != nullptr) biases[i] = bias.at + batch * bias.batch + head * bias.head + query * bias.query;
      alignas(64) float row[block::dim];
      widen_row(q + (r.row * of_head + begin + i) * Dim, Dim, row, block::dim);
      for (int64_t d = 0; d < Dim; ++d) s.q[i / 16][d * 16 + i % 16] = row[d];
    }
    for (int64_t key = 0; key < most; key += block::tile)
      attend_keys(s, k + r.row * n.keys * Dim, v + r.row * n.keys * Out, key, least(most - key, block::tile), count, biases, bias.key, scale, softcap);
    for (int64_t i = 0; i < count; ++i) {
      Y *const to = out + (r.row * of_head + begin + i) * Out;
      const float total = s.total[i] == 0 ? 1.0f : s.total[i];
      for (int64_t d = 0; d < Out; ++d) store_element(to + d, s.values[i * block::out + d] / total);
    }
  }
}

}  // namespace S3_ISA
}  // namespace s3
#endif
