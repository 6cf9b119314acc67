/*
 * Attention over a paged cache, and the writing of it.
 *
 * A page holds `tokens` tokens of one layer. For each KV head it holds K as panels whose columns are tokens and whose k is the head's
 * dimension, V as panels whose columns are the dimension and whose k is the token, and for codes one scale a token for K and for V.
 * So scores and sums of values are both products with panels, which all query heads of a KV head share.
 *
 * The softmax goes page by page in the order of positions with a running maximum. A row's result depends on its own query and on cached
 * tokens up to its position alone, bit for bit: tokens past it take no part, whatever they hold.
 */
#ifndef S3_ATTENTION_H
#define S3_ATTENTION_H
#include "contract.h"
#include "rows.h"

namespace s3 {
inline namespace S3_ISA {

constexpr int64_t page_tokens = 32;

/* Bytes within a page; attention.ts has the same. */
template <class W, int64_t Dim>
struct kv_page {
  static constexpr int64_t key_panel = (Dim + W::step - 1) / W::step * W::bytes;
  static constexpr int64_t value_panel = page_tokens / W::step * W::bytes;
  static constexpr int64_t value_panels = (Dim + columns_of_panel - 1) / columns_of_panel;
  static constexpr int64_t values = page_tokens / columns_of_panel * key_panel;
  static constexpr int64_t scales = values + value_panels * value_panel; /* of K, then of V */
  static constexpr bool scaled = sizeof(typename W::element) == 1;
  static constexpr int64_t head = (scales + (scaled ? 2 * page_tokens * 4 : 0) + 63) / 64 * 64;
};

/* Element (k, column) of a panel. */
template <class W>
S3_INLINE typename W::element &panel_element(uint8_t *panel, int64_t k, int64_t column) {
  typename W::element *const cell = reinterpret_cast<typename W::element *>(panel + k / W::step * W::bytes);
  return cell[W::pairs ? column * W::step + k % W::step : k % W::step * columns_of_panel + column];
}

/* Writes the K and V of every row of a launch to its position. Scales are null when the cache has none. */
template <class W, int64_t Heads, int64_t Dim>
void append(const s3_call *c, const typename W::element *k, const float *k_scales, const typename W::element *v, const float *v_scales,
            const int32_t *pages, const int32_t *position, int64_t pages_of_row, uint8_t *pool) {
  typedef kv_page<W, Dim> page;
  for (rows r = rows::of_tokens(c, 1, Heads); r.next();) {
    const int64_t at = position[r.row], token = at % page_tokens, from = (r.row * Heads + r.tile) * Dim;
    uint8_t *const head = pool + (pages[r.row * pages_of_row + at / page_tokens] * Heads + r.tile) * page::head;
    uint8_t *const key_panel = head + token / columns_of_panel * page::key_panel;
    for (int64_t d = 0; d < Dim; ++d) {
      panel_element<W>(key_panel, d, token % columns_of_panel) = k[from + d];
      panel_element<W>(head + page::values + d / columns_of_panel * page::value_panel, token, d % columns_of_panel) = v[from + d];
    }
    if constexpr (page::scaled) {
      float *const scales = reinterpret_cast<float *>(head + page::scales);
      scales[token] = k_scales[r.row * Heads + r.tile];
      scales[page_tokens + token] = v_scales[r.row * Heads + r.tile];
    }
  }
}

/* The running softmax of some queries of one KV head: rows of `q` and `values` are `width` floats apart. */
template <int64_t Dim>
struct query_block {
  static constexpr int64_t width = (Dim + 15) / 16 * 16 + 16; /* one line more, so that rows do not fall on the same cache sets */
  static constexpr int64_t most = Dim <= 512 ? 64 : 16;
  alignas(64) float q[most * width];
  alignas(64) float values[most * width]; /* sums of values, relative to the maximum */
  float maximum[most], total[most];
};

/* M queries from `first` on against the first `count` tokens of a page. */
template <class W, int64_t Dim, int M>
void attend_page(query_block<Dim> &s, int64_t first, const uint8_t *head, int64_t count, float scale) {
  typedef kv_page<W, Dim> page;
  constexpr int64_t width = query_block<Dim>::width;
  constexpr int at_once = panels_in_registers(M) < 2 ? 1 : 2;
  const float *const key_scales = reinterpret_cast<const float *>(head + page::scales), *const value_scales = key_scales + page_tokens;
  alignas(64) float scores[M * page_tokens];

  for (int t = 0; t < page_tokens / columns_of_panel; t += at_once) {
    const uint8_t *panels[at_once];
    for (int p = 0; p < at_once; ++p) panels[p] = head + (t + p) * page::key_panel;
    vec acc[M][at_once * parts] = {};
    multiply<W, M, at_once, 0>(s.q + first * width, width, 16, panels, Dim, acc);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < at_once * parts; ++i) store(scores + m * page_tokens + t * columns_of_panel + i * lanes, acc[m][i]);
  }

  float kept[M]; /* what the sums so far count relative to the new maximum */
  for (int m = 0; m < M; ++m) {
    float *const row = scores + m * page_tokens;
    for (int64_t j = 0; j < page_tokens; ++j) {
      const float score = page::scaled ? row[j] * scale * key_scales[j] : row[j] * scale;
      row[j] = j < count ? score : -infinity;
    }
    const float before = s.maximum[first + m], now = larger_of(before, max(row, page_tokens));
    kept[m] = exponential_of(before - now);
    for (int64_t j = 0; j < page_tokens; ++j) {
      const float power = exponential_of(row[j] - now);
      row[j] = j < count ? power : 0.0f;
    }
    s.maximum[first + m] = now;
    s.total[first + m] = s.total[first + m] * kept[m] + sum(row, page_tokens);
    if constexpr (page::scaled)
      for (int64_t j = 0; j < page_tokens; ++j) row[j] = j < count ? row[j] * value_scales[j] : 0.0f;
  }

  constexpr int P = panels_in_registers(M);
  for (int64_t n = 0; n < page::value_panels; n += P) {
    const uint8_t *panels[P];
    vec acc[M][P * parts];
    for (int p = 0; p < P; ++p) {
      const int64_t panel = least(n + p, page::value_panels - 1);
      panels[p] = head + page::values + panel * page::value_panel;
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < parts; ++i)
          acc[m][p * parts + i] = load(s.values + (first + m) * width + panel * columns_of_panel + i * lanes) * set(kept[m]);
    }
    const int64_t whole = count / W::step * W::step;
    multiply<W, M, P, 0>(scores, page_tokens, 16, panels, whole, acc);
    /* the rest of a cell may hold anything */
    if (whole < count)
      for (int p = 0; p < P; ++p) {
        vec w[W::step][parts];
        W::decode(panels[p] + whole / W::step * W::bytes, w);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < parts; ++i) acc[m][p * parts + i] = fma(set(scores[m * page_tokens + whole]), w[0][i], acc[m][p * parts + i]);
      }
    for (int p = 0; p < P && n + p < page::value_panels; ++p)
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < parts; ++i)
          store(s.values + (first + m) * width + (n + p) * columns_of_panel + i * lanes, acc[m][p * parts + i]);
  }
}

/* Queries first .. end - 1, in the largest blocks that fit. */
template <class W, int64_t Dim>
void attend_page(query_block<Dim> &s, int64_t first, int64_t end, const uint8_t *head, int64_t count, float scale) {
  while (first < end) {
    const int64_t left = end - first;
#if defined(S3_AVX512)
    if (left >= 12) {
      attend_page<W, Dim, 12>(s, first, head, count, scale), first += 12;
    } else if (left >= 8) {
      attend_page<W, Dim, 8>(s, first, head, count, scale), first += 8;
    } else if (left >= 4) {
      attend_page<W, Dim, 4>(s, first, head, count, scale), first += 4;
    } else
#elif defined(S3_AVX2)
    if (left >= 6) {
      attend_page<W, Dim, 6>(s, first, head, count, scale), first += 6;
    } else
#else
    if (left >= 3) {
      attend_page<W, Dim, 3>(s, first, head, count, scale), first += 3;
    } else
#endif
    if (left >= 2) {
      attend_page<W, Dim, 2>(s, first, head, count, scale), first += 2;
    } else {
      attend_page<W, Dim, 1>(s, first, head, count, scale), first += 1;
    }
  }
}

S3_INLINE void store_element(float *p, float x) { *p = x; }
S3_INLINE void store_element(bf16 *p, float x) { *p = to_bf16(x); }
S3_INLINE void store_element(f16 *p, float x) { *p = to_f16(x); }
S3_INLINE void store_element(e4m3 *p, float x) { *p = to_e4m3(x); }
S3_INLINE void store_element(e5m2 *p, float x) { *p = to_e5m2(x); }

/*
 * Attention of every row of a launch over cache positions 0 .. position[row]. `Group` query heads share a KV head. Tasks are blocks of
 * rows by KV heads by parts of the group, taken from a counter in scratch; rows are blocked when few query heads share a KV head and
 * the rows share whole pages, as the rows of one sequence do.
 */
template <class Q, class W, int64_t Heads, int64_t Group, int64_t Dim>
void attend(const s3_call *c, const Q *q, const uint8_t *pool, const int32_t *pages, const int32_t *position, int64_t pages_of_row, float scale,
            Q *out) {
  typedef kv_page<W, Dim> page;
  typedef query_block<Dim> block;
  constexpr int64_t most_block_rows = Group >= most_rows ? 1 : block::most / Group < 32 ? block::most / Group : 32;
  int64_t *const counter = static_cast<int64_t *>(c->scratch);
  if (c->thread == 0) __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
  c->barrier(c);

  int64_t all_rows = 0;
  for (uint32_t i = 0; i < c->segments; ++i) all_rows += c->heads[i].rows;
  /* enough parts to keep the team busy, none smaller than a block of registers */
  const int64_t wanted = ceil_div(c->threads, all_rows * Heads > 0 ? all_rows * Heads : 1), possible = ceil_div(Group, most_rows);
  const int64_t needed = ceil_div(Group, block::most), parts_of_group = wanted < needed ? needed : least(wanted, possible);

  const auto page_of = [&](int64_t row, int64_t index, int64_t kv_head) {
    return pool + (pages[row * pages_of_row + index] * Heads + kv_head) * page::head;
  };
  const auto run = [&](int64_t row, int64_t count, int64_t shared_pages, int64_t kv_head, int64_t head, int64_t heads) {
    block s;
    for (int64_t i = 0; i < count * heads; ++i) {
      const Q *const from = q + ((row + i / heads) * Heads * Group + kv_head * Group + head + i % heads) * Dim;
      for (int64_t d = 0; d < block::width; ++d) s.values[i * block::width + d] = 0;
      for (int64_t d = 0; d < Dim; d += 16) {
        Q sixteen[16] = {};
        memcpy(sixteen, from + d, (size_t)least(16, Dim - d) * sizeof(Q));
        vec x[parts];
        widen(sixteen, x);
        for (int j = 0; j < parts; ++j) store(s.q + i * block::width + d + j * lanes, x[j] * set(1 / (unit_of<Q> * W::unit)));
      }
      s.maximum[i] = -infinity;
      s.total[i] = 0;
    }
    for (int64_t p = 0; p < shared_pages; ++p)
      attend_page<W, Dim>(s, 0, count * heads, page_of(row, p, kv_head), page_tokens, scale);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t tokens = (int64_t)position[row + r] + 1;
      for (int64_t p = shared_pages; p * page_tokens < tokens; ++p)
        attend_page<W, Dim>(s, r * heads, (r + 1) * heads, page_of(row + r, p, kv_head), least(page_tokens, tokens - p * page_tokens), scale);
    }
    for (int64_t i = 0; i < count * heads; ++i) {
      Q *const to = out + ((row + i / heads) * Heads * Group + kv_head * Group + head + i % heads) * Dim;
      for (int64_t d = 0; d < Dim; ++d) store_element(to + d, s.values[i * block::width + d] * (1 / W::unit) / s.total[i]);
    }
  };

  const auto take = [&] { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); };
  int64_t ticket = take(), task = 0;
  for (uint32_t segment = 0; segment < c->segments; ++segment) {
    const int64_t start = (int64_t)segment * c->stride, end = start + c->heads[segment].rows;
    for (int64_t row = start, count = 1; row < end; row += count, count = 1) {
      int64_t shared_pages = 0;
      if constexpr (most_block_rows > 1) {
        /* whole pages of the first row that the next rows have too */
        shared_pages = ((int64_t)position[row] + 1) / page_tokens;
        for (; row + count < end && count < most_block_rows; ++count) {
          const int64_t whole = ((int64_t)position[row + count] + 1) / page_tokens;
          int64_t same = 0;
          while (same < least(shared_pages, whole) && pages[row * pages_of_row + same] == pages[(row + count) * pages_of_row + same]) ++same;
          if (same == 0 || same * 2 < shared_pages) break;
          shared_pages = same;
        }
        if (count == 1) shared_pages = 0;
      }
      for (int64_t kv_head = 0; kv_head < Heads; ++kv_head)
        for (int64_t part = 0; part < parts_of_group; ++part, ++task) {
          if (task != ticket) continue;
          const int64_t head = Group * part / parts_of_group, after = Group * (part + 1) / parts_of_group;
          run(row, count, shared_pages, kv_head, head, after - head);
          ticket = take();
        }
    }
  }
}

}  // namespace S3_ISA
}  // namespace s3
#endif
