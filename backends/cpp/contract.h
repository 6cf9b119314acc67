/*
 * Contractions y[r, n] = sum over k of x[r, k] * w[n, k] with packed w (see the panels in panels.h), for all of the linear family.
 *
 * Rows come in chunks. The team widens the rows of a chunk in scratch, meets at a barrier, and takes panels (and, when there are few of
 * them, rows) from counters. Sums over k are one ascending chain per element, or one per scale group: neither the number of rows nor the
 * number of threads changes a bit of any row.
 */
#ifndef S3_CONTRACT_H
#define S3_CONTRACT_H
#include "panels.h"

namespace s3 {
inline namespace S3_ISA {

struct contraction {
  int64_t columns; /* N, of the result */
  int64_t inner;   /* K, summed over */
  int64_t group;   /* values of k that share a scale; K when there are no scales */
  int64_t block;   /* columns that share a scale */
};

constexpr int64_t chunk_rows = 96;        /* rows widened at a time */
constexpr int64_t padded_chunk_rows = 144; /* and after blocks are filled up with rows of zeros */

/* Rows for one pass: rows of x, where their results go, and which matrix each meets, in ascending order of the matrix. */
struct chunk {
  int64_t count;
  int64_t source[chunk_rows], target[chunk_rows];
  int32_t matrix[chunk_rows];
};

/* Where rows lie: `count` of them for each token of each segment, or `count` altogether. */
struct row_space {
  const s3_call *c;
  bool per_token;
  int64_t count;
  S3_INLINE uint32_t segments() const { return per_token ? c->segments : 1; }
  S3_INLINE int64_t start(uint32_t segment) const { return per_token ? (int64_t)segment * c->stride * count : 0; }
  S3_INLINE int64_t size(uint32_t segment) const { return per_token ? (int64_t)c->heads[segment].rows * count : count; }
};

/* All rows of a launch against one matrix. */
struct plain_rows {
  row_space space;
  uint32_t segment = 0;
  int64_t row = 0;
  bool next(chunk &out) {
    out.count = 0;
    for (; segment < space.segments(); ++segment, row = 0)
      for (; row < space.size(segment); ++row) {
        if (out.count == chunk_rows) return true;
        out.source[out.count] = out.target[out.count] = space.start(segment) + row;
        out.matrix[out.count++] = 0;
      }
    return out.count > 0;
  }
};

/*
 * Pairs of a token and one of its `choices` experts, gathered by expert; `space` counts pairs. Pair p reads row p of x, or row p / choices
 * when x has one row per token. Experts outside first .. first + experts - 1 are somebody else's.
 */
struct expert_rows {
  row_space space;
  const int32_t *ids;
  int64_t choices, experts, first;
  bool row_per_token;
  int64_t expert = 0;
  uint32_t segment = 0;
  int64_t pair = 0;
  bool next(chunk &out) {
    out.count = 0;
    for (; expert < experts; ++expert, segment = 0)
      for (; segment < space.segments(); ++segment, pair = 0)
        for (; pair < space.size(segment); ++pair) {
          const int64_t at = space.start(segment) + pair;
          if (ids[at] != first + expert) continue;
          if (out.count == chunk_rows) return true;
          out.source[out.count] = row_per_token ? at / choices : at;
          out.target[out.count] = at;
          out.matrix[out.count++] = (int32_t)expert;
        }
    return out.count > 0;
  }
};

/* --- blocks of rows --------------------------------------------------------------------------------------------------------- */

/* Cells, or blocks of 16 or 32 widened k, before k: each group starts a new one. */
S3_INLINE int64_t cells_before(const contraction &d, int64_t k, int64_t step) {
  return k / d.group * ceil_div(d.group, step) + ceil_div(k % d.group, step);
}

template <class W>
S3_INLINE int64_t panel_bytes(const contraction &d) {
  return cells_before(d, d.inner, W::step) * W::bytes;
}

/*
 * One block of rows against some panels of one matrix, for k from `k0` to `k1`: whole groups, or a part of the only group.
 * Engines below do these; each has `height_for(rows)`, the rows of a block as stored; `panels_for(height)`, those a job does at a time;
 * `floats_for(height)`, the size of its sums; `stride`, the distance between its rows of sums; and how it stores a row of x.
 */
struct tile_job {
  const contraction *d;
  const void *a;          /* the block's rows, widened */
  const float *const *xs; /* scales of each row, by group; null without scales */
  const uint8_t *w;       /* the matrix */
  const float *ws;        /* its scales [ceil(columns / block)][groups] */
  int64_t first, panels;  /* panels wanted: the first and how many; those past the last repeat it */
  int64_t k0, k1;
  int64_t rows;
  float *out;             /* the sums; holds those up to k0 when that is not 0 */
};

/* Scales of the columns of P panels of a job, by group of k. Divisions, which are slow, are done once. */
template <int P>
struct tile_scales {
  bool shared; /* by all columns of a panel */
  const float *first[P];
  int64_t distance[P][columns_of_panel]; /* from the first column's to each column's, unless shared */

  S3_INLINE tile_scales(const tile_job &job, int64_t groups) {
    const contraction &d = *job.d;
    shared = d.block % columns_of_panel == 0;
    for (int p = 0; p < P; ++p) {
      const int64_t column = (job.first + least(p, job.panels - 1)) * columns_of_panel, row = column / d.block;
      first[p] = job.ws + row * groups;
      for (int64_t i = 0; i < columns_of_panel && !shared; ++i) {
        const int64_t n = least(column + i, d.columns - 1);
        distance[p][i] = ((d.block == 1 ? n : n / d.block) - row) * groups;
      }
    }
  }
  S3_INLINE void get(int64_t g, float *out) const {
    for (int p = 0; p < P; ++p, out += columns_of_panel)
      if (shared) {
        for (int i = 0; i < parts; ++i) store(out + i * lanes, set(first[p][g]));
      } else {
        for (int i = 0; i < columns_of_panel; ++i) out[i] = first[p][distance[p][i] + g];
      }
  }
};
/* without scales */
struct no_scales {
  S3_INLINE no_scales(const tile_job &, int64_t) {}
};
template <bool Scaled, int P> struct scales_if { typedef tile_scales<P> type; };
template <int P> struct scales_if<false, P> { typedef no_scales type; };

typedef void (*tile_function)(const tile_job &);

/* Rows whose sums stay in vector registers: heights of a block that has all rows, fewest first, and of one of several blocks. */
#if defined(S3_AVX512)
constexpr int accumulators = 24;
constexpr int heights[] = {1, 2, 4, 6, 8, 12};
constexpr int heights_of_several[] = {6, 8, 12};
#elif defined(S3_AVX2)
constexpr int accumulators = 12;
constexpr int heights[] = {1, 2, 3, 6};
constexpr int heights_of_several[] = {3, 6};
#else
constexpr int accumulators = 12;
constexpr int heights[] = {1, 2, 3};
constexpr int heights_of_several[] = {2, 3};
#endif
constexpr int most_rows = heights[sizeof heights / sizeof heights[0] - 1];

constexpr int panels_in_registers(int rows) {
  const int fit = accumulators / (rows * parts);
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}

/* The lowest height that holds all rows, so that weights are read once; else the one that wastes least. */
inline int register_height_for(int64_t rows) {
  for (const int h : heights)
    if (h >= rows) return h;
  int best = 0;
  int64_t least_rows = 0;
  for (const int h : heights_of_several) {
    const int64_t padded = ceil_div(rows, h) * h;
    if (best == 0 || padded <= least_rows) best = h, least_rows = padded;
  }
  return best;
}

template <class W, int M, bool Scaled>
void register_tile(const tile_job &job) {
  constexpr int P = panels_in_registers(M), registers = P * parts;
  const contraction &d = *job.d;
  const int64_t bytes = panel_bytes<W>(d), groups = ceil_div(d.inner, d.group);
  const uint8_t *at[P];
  for (int p = 0; p < P; ++p)
    at[p] = job.w + (job.first + least(p, job.panels - 1)) * bytes + cells_before(d, job.k0, W::step) * W::bytes;
  const float *a = static_cast<const float *>(job.a) + cells_before(d, job.k0, 16) * M * 16;
  const auto place = [&](int m, int i) { return job.out + (m * registers + i) * lanes; };

  const typename scales_if<Scaled, P>::type column_scales(job, groups);

  int64_t g = job.k0 / d.group;
  for (int64_t k = job.k0; k < job.k1; ++g) {
    const int64_t end = least((g + 1) * d.group, job.k1);
    vec acc[M][registers] = {};
    if (groups == 1 && k > 0)
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < registers; ++i) acc[m][i] = load(place(m, i));
    multiply<W, M, P, 1024>(a, 16, M * 16, at, end - k, acc);
    if (!Scaled || (groups == 1 && end < d.inner)) {
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < registers; ++i) store(place(m, i), acc[m][i]);
    } else if constexpr (Scaled) {
      alignas(64) float scales[P * columns_of_panel];
      column_scales.get(g, scales);
      for (int m = 0; m < M; ++m) {
        const vec row_scale = set(job.xs[least(m, job.rows - 1)][g]);
        for (int i = 0; i < registers; ++i)
          store(place(m, i), fma(acc[m][i], row_scale * load(scales + i * lanes), g == 0 ? set(0.0f) : load(place(m, i))));
      }
    }
    a += (end - k + 15) / 16 * M * 16;
    for (int p = 0; p < P; ++p) at[p] += (end - k + W::step - 1) / W::step * W::bytes;
    k = end;
  }
}

/* Vector registers and fused multiply-add; rows as f32, 16 k at a time: [k / 16][height][16]. Blocks are filled up with rows of zeros. */
template <class W, bool Scaled>
struct registers_engine {
  static S3_INLINE int height_for(int64_t rows) { return register_height_for(rows); }
  static constexpr int panels_for(int height) { return panels_in_registers(height); }
  static constexpr int floats_for(int height) { return height * panels_for(height) * columns_of_panel; }
  static constexpr int stride(int height) { return panels_for(height) * columns_of_panel; }
  static constexpr int most_floats_per_row = panels_in_registers(heights_of_several[0]) * columns_of_panel;
  static constexpr bool fills = true;
  static constexpr int64_t k_block = 16, k_bytes = 64; /* widened k come 16 at a time, 64 bytes */
  static S3_INLINE void begin() {}
  static S3_INLINE void end() {}

  static tile_function tile_for(int height) {
    switch (height) {
      case 1: return register_tile<W, 1, Scaled>;
      case 2: return register_tile<W, 2, Scaled>;
#if defined(S3_AVX512)
      case 4: return register_tile<W, 4, Scaled>;
      case 6: return register_tile<W, 6, Scaled>;
      case 8: return register_tile<W, 8, Scaled>;
      default: return register_tile<W, 12, Scaled>;
#elif defined(S3_AVX2)
      case 3: return register_tile<W, 3, Scaled>;
      default: return register_tile<W, 6, Scaled>;
#else
      default: return register_tile<W, 3, Scaled>;
#endif
    }
  }

  template <class X>
  static S3_INLINE void widen_block(const X *x, uint8_t *out) {
    constexpr float factor = 1 / (unit_of<X> * W::unit);
    vec v[parts];
    widen(x, v);
    for (int i = 0; i < parts; ++i) store(reinterpret_cast<float *>(out) + i * lanes, v[i] * set(factor));
  }
};

#if defined(S3_AMX)
/* Up to 32 rows (two tiles) by two panels, k in steps of 32, for formats that bf16 holds exactly. */
template <class W, bool Scaled>
void matrix_tile(const tile_job &job) {
  constexpr int64_t out_stride = 2 * columns_of_panel;
  const contraction &d = *job.d;
  const int64_t bytes = panel_bytes<W>(d), groups = ceil_div(d.inner, d.group);
  const int halves = job.rows > 16 ? 2 : 1;
  const uint8_t *const panel[2] = {job.w + job.first * bytes, job.w + (job.first + least(1, job.panels - 1)) * bytes};
  const typename scales_if<Scaled, 2>::type column_scales(job, groups);
  int64_t g = job.k0 / d.group;
  for (int64_t k = job.k0; k < job.k1; ++g) {
    const int64_t end = least((g + 1) * d.group, job.k1);
    if (groups == 1 && k > 0) {
      tile_load<0>(job.out, out_stride * 4);
      tile_load<1>(job.out + 16, out_stride * 4);
      if (halves == 2) tile_load<2>(job.out + 16 * out_stride, out_stride * 4), tile_load<3>(job.out + 16 * out_stride + 16, out_stride * 4);
    } else {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    const uint8_t *a = static_cast<const uint8_t *>(job.a) + cells_before(d, k, 32) * job.rows * 64;
    const int64_t first_cell = cells_before(d, k, W::step), cells = ceil_div(end - k, W::step);
    for (int64_t cell = 0; cell < cells; cell += 16, a += job.rows * 64) {
      alignas(64) uint8_t spare[2][1024];
      tile_load<6>(cells_as_tile<W>(panel[0] + (first_cell + cell) * W::bytes, cells - cell, spare[0]), 64);
      tile_load<7>(cells_as_tile<W>(panel[1] + (first_cell + cell) * W::bytes, cells - cell, spare[1]), 64);
      tile_load<4>(a, 64);
      tile_dot<0, 4, 6>();
      tile_dot<1, 4, 7>();
      if (halves == 2) {
        tile_load<5>(a + 16 * 64, 64);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
      }
    }
    alignas(64) float sums[32 * out_stride];
    float *const to = Scaled ? sums : job.out;
    tile_store<0>(to, out_stride * 4);
    tile_store<1>(to + 16, out_stride * 4);
    if (halves == 2) tile_store<2>(to + 16 * out_stride, out_stride * 4), tile_store<3>(to + 16 * out_stride + 16, out_stride * 4);
    if constexpr (Scaled) {
      const bool scale = groups > 1 || end == d.inner;
      alignas(64) float scales[out_stride];
      column_scales.get(g, scales);
      for (int64_t m = 0; m < job.rows; ++m)
        for (int64_t i = 0; i < out_stride; i += lanes) {
          float *const out = job.out + m * out_stride + i;
          const vec sum = load(sums + m * out_stride + i);
          store(out, scale ? fma(sum, set(job.xs[m][g]) * load(scales + i), g == 0 ? set(0.0f) : load(out)) : sum);
        }
    }
    k = end;
  }
}

/* Matrix units; rows as bf16, 32 k at a time: [k / 32][rows][32]. A tile reads past the rows of a block: what it gets there is not used. */
template <class W, bool Scaled>
struct matrix_engine {
  static S3_INLINE int height_for(int64_t rows) { return (int)least(rows, 32); }
  static constexpr int panels_for(int) { return 2; }
  static constexpr int floats_for(int height) { return (height > 16 ? 32 : 16) * 2 * columns_of_panel; }
  static constexpr int stride(int) { return 2 * columns_of_panel; }
  static constexpr int most_floats_per_row = 2 * columns_of_panel;
  static constexpr bool fills = false;
  static constexpr int64_t k_block = 32, k_bytes = 64;
  static S3_INLINE void begin() { tiles_begin(); }
  static S3_INLINE void end() { tiles_end(); }
  static tile_function tile_for(int) { return matrix_tile<W, Scaled>; }

  /* exact: bf16 holds every value of bf16, e4m3 and i8, and of e4m3 times a power of two */
  template <class X>
  static S3_INLINE void widen_block(const X *x, uint8_t *out) {
    constexpr float factor = 1 / (unit_of<X> * W::unit);
    for (int half = 0; half < 2; ++half) {
      vec v[parts];
      widen(x + half * 16, v);
      for (int i = 0; i < parts; ++i)
        for (int j = 0; j < lanes; ++j) {
          const uint16_t bits = (uint16_t)(as_bits((v[i] * set(factor))[j]) >> 16);
          memcpy(out + (half * 16 + i * lanes + j) * 2, &bits, 2);
        }
    }
  }
};

template <class X, class W> constexpr bool fits_matrix_unit = false;
template <> inline constexpr bool fits_matrix_unit<bf16, bf16_panel> = true;
template <> inline constexpr bool fits_matrix_unit<e4m3, e4m3_panel> = true;
template <> inline constexpr bool fits_matrix_unit<int8_t, i8_panel> = true;
template <bool Fits, class W, bool Scaled> struct engine_if { typedef registers_engine<W, Scaled> type; };
template <class W, bool Scaled> struct engine_if<true, W, Scaled> { typedef matrix_engine<W, Scaled> type; };
template <class X, class W, bool Scaled> using engine_for = typename engine_if<fits_matrix_unit<X, W>, W, Scaled>::type;
#else
template <class X, class W, bool Scaled> using engine_for = registers_engine<W, Scaled>;
#endif

/* One row of x, each group filled up with zeros to a whole number of blocks, `height` rows interleaved block by block. */
template <class Engine, class X>
void widen_row(const contraction &d, const X *x, int64_t height, uint8_t *out) {
  for (int64_t start = 0; start < d.inner; start += d.group) {
    const int64_t end = least(start + d.group, d.inner);
    for (int64_t k = start; k < end; k += Engine::k_block, out += height * Engine::k_bytes) {
      if (end - k >= Engine::k_block) {
        Engine::widen_block(x + k, out);
      } else {
        X tail[Engine::k_block] = {};
        memcpy(tail, x + k, (size_t)(end - k) * sizeof(X));
        Engine::widen_block(tail, out);
      }
    }
  }
}

/* What to do with `count` sums of row `row` of the result from column `column` on. Not a template argument: kernels share `contract`. */
struct finisher {
  const void *self;
  void (*call)(const void *self, int64_t row, int64_t column, int64_t count, const float *sums);
  template <class Finish>
  explicit finisher(const Finish &finish)
      : self(&finish), call([](const void *f, int64_t row, int64_t column, int64_t count, const float *sums) {
          (*static_cast<const Finish *>(f))(row, column, count, sums);
        }) {}
  S3_INLINE void operator()(int64_t row, int64_t column, int64_t count, const float *sums) const { call(self, row, column, count, sums); }
};

/*
 * Units of work, in shares: a thread takes those of its own share first, the same ones in every launch, so that weights which fit its cache
 * are there the next time; then it helps with the others'. Each counter has a cache line of its own.
 */
struct work_shares {
  static constexpr int64_t most = 16, line = 64 / sizeof(int64_t);
  int64_t *counters;
  int64_t shares, mine, tried = 0, units = 0;

  work_shares(void *memory, int64_t thread, int64_t threads)
      : counters(static_cast<int64_t *>(memory)), shares(least(threads, most)), mine(thread % shares) {}
  S3_INLINE int64_t start(int64_t share) const { return units * share / shares; }
  /* by one thread, between barriers */
  void reset(int64_t count) {
    units = count;
    for (int64_t s = 0; s < shares; ++s) __atomic_store_n(counters + s * line, start(s), __ATOMIC_RELAXED);
  }
  void begin(int64_t count) { units = count, tried = 0; }
  /* -1: none are left */
  int64_t take() {
    for (; tried < shares; ++tried) {
      const int64_t share = (mine + tried) % shares;
      const int64_t unit = __atomic_fetch_add(counters + share * line, 1, __ATOMIC_RELAXED);
      if (unit < start(share + 1)) return unit;
    }
    return -1;
  }
};

constexpr int64_t segment_of_k = 512; /* k that several blocks do before any goes on: their weights stay in the cache */

/*
 * The whole contraction. `rows.next(chunk)` names the rows; `xs` [rows of x][groups] and `ws` are null without scales; linear.ts computes
 * the bytes of scratch.
 */
template <class W, bool Scaled, class X, class Rows>
void contract(const s3_call *c, const contraction &d, const X *x, const float *xs, const void *w, const float *ws, Rows rows,
              const finisher &finish) {
  typedef engine_for<X, W, Scaled> engine;
  const int64_t groups = ceil_div(d.inner, d.group), panels = ceil_div(d.columns, columns_of_panel);
  const int64_t matrix_bytes = panels * panel_bytes<W>(d), matrix_scales = ceil_div(d.columns, d.block) * groups;
  const int64_t row_bytes = cells_before(d, d.inner, engine::k_block) * engine::k_bytes;
  uint8_t *const widened = static_cast<uint8_t *>(c->scratch) + work_shares::most * 64;
  const int64_t thread = c->thread, threads = c->threads;
  work_shares work(c->scratch, thread, threads);

  struct block {
    int64_t first, rows, at; /* rows of the chunk, and where they start among the stored rows */
  };
  /*
   * Blocks that meet one matrix. Their work is handed out by some panels for some of the blocks: finely enough to even out, one or two
   * blocks only if panels are few.
   */
  struct run {
    int64_t first, end; /* blocks */
    int64_t panels, row_parts, units_before, units;
  };
  chunk now;
  engine::begin();
  for (bool again = false; rows.next(now); again = true) {
    if (again) c->barrier(c); /* everybody is done with the rows before */
    block blocks[chunk_rows];
    int heights_of[chunk_rows];
    int64_t count = 0, stored = 0;
    for (int64_t i = 0, end = 0; i < now.count; i = end) {
      while (end < now.count && now.matrix[end] == now.matrix[i]) ++end;
      const int height = engine::height_for(end - i);
      for (int64_t r = i; r < end; r += height) {
        const int64_t in_block = least(height, end - r);
        heights_of[count] = engine::fills ? height : (int)in_block;
        blocks[count] = {r, in_block, stored};
        stored += heights_of[count++];
      }
    }
    for (int64_t b = 0; b < count; ++b)
      for (int64_t m = 0; m < heights_of[b]; ++m) {
        if ((blocks[b].at + m) % threads != thread) continue;
        uint8_t *const out = widened + blocks[b].at * row_bytes + m * engine::k_bytes;
        if (m < blocks[b].rows) {
          widen_row<engine>(d, x + now.source[blocks[b].first + m] * d.inner, heights_of[b], out);
        } else {
          for (int64_t k = 0; k < row_bytes; k += engine::k_bytes) memset(out + k * heights_of[b], 0, engine::k_bytes);
        }
      }
    run runs[chunk_rows];
    int64_t run_count = 0, units = 0;
    for (int64_t b = 0, end = 0; b < count; b = end) {
      while (end < count && now.matrix[blocks[end].first] == now.matrix[blocks[b].first]) ++end;
      const int64_t per_unit = least(engine::panels_for(heights_of[b]), ceil_div(panels, 4 * threads));
      const int64_t units_of_columns = ceil_div(panels, per_unit);
      const int64_t row_parts = least(end - b, ceil_div(2 * threads, units_of_columns));
      runs[run_count++] = {b, end, per_unit, row_parts, units, units_of_columns * row_parts};
      units += units_of_columns * row_parts;
    }
    if (thread == 0) work.reset(units);
    c->barrier(c);

    work.begin(units);
    int64_t which = 0;
    for (int64_t taken = work.take(); taken >= 0; taken = work.take()) {
      if (taken < runs[which].units_before) which = 0; /* of a share that came before */
      while (taken >= runs[which].units_before + runs[which].units) ++which;
      const run &r = runs[which];
      const int64_t matrix = now.matrix[blocks[r.first].first];
      const int height = heights_of[r.first];
      const tile_function tile = engine::tile_for(height);
      const int64_t segment = r.end - r.first == 1 ? d.inner : groups == 1 ? segment_of_k : ceil_div(segment_of_k, d.group) * d.group;
      const int64_t unit = taken - r.units_before, first = unit / r.row_parts * r.panels, part = r.first + unit % r.row_parts;
      alignas(64) float sums[padded_chunk_rows * engine::most_floats_per_row];
      const int64_t wanted = least(r.panels, panels - first);
      for (int64_t k = 0; k < d.inner; k += segment)
        for (int64_t i = part; i < r.end; i += r.row_parts) {
          const float *scales[32];
          if constexpr (Scaled)
            for (int64_t m = 0; m < blocks[i].rows; ++m) scales[m] = xs + now.source[blocks[i].first + m] * groups;
          tile({&d, widened + blocks[i].at * row_bytes, scales, static_cast<const uint8_t *>(w) + matrix * matrix_bytes,
                ws + matrix * matrix_scales, first, wanted, k, least(k + segment, d.inner), blocks[i].rows,
                sums + (i - r.first) * engine::floats_for(height)});
        }
      const int64_t column = first * columns_of_panel, columns = least(wanted * columns_of_panel, d.columns - column);
      for (int64_t i = part; i < r.end; i += r.row_parts)
        for (int64_t m = 0; m < blocks[i].rows; ++m)
          finish(now.target[blocks[i].first + m], column, columns,
                 sums + (i - r.first) * engine::floats_for(height) + m * engine::stride(height));
    }
  }
  engine::end();
}

/* Pairs of other ranks' experts: `finish` with sums of zero. */
inline void finish_unowned(const s3_call *c, const expert_rows &rows, int64_t columns, const finisher &finish) {
  const float zeros[columns_of_panel] = {};
  int64_t seen = 0;
  for (uint32_t segment = 0; segment < rows.space.segments(); ++segment)
    for (int64_t pair = 0; pair < rows.space.size(segment); ++pair) {
      const int64_t at = rows.space.start(segment) + pair, expert = (int64_t)rows.ids[at] - rows.first;
      if ((expert >= 0 && expert < rows.experts) || seen++ % c->threads != c->thread) continue;
      for (int64_t n = 0; n < columns; n += columns_of_panel) finish(at, n, least(columns_of_panel, columns - n), zeros);
    }
}

/* Packs `matrices` row-major matrices that are not weights, so not packed beforehand. The barrier in `contract` comes before they are read. */
template <class W, class T>
void pack(const s3_call *c, const contraction &d, const T *w, int64_t matrices, uint8_t *out) {
  typedef typename W::element element;
  const int64_t panels = ceil_div(d.columns, columns_of_panel), bytes = panel_bytes<W>(d);
  for (int64_t p = c->thread; p < matrices * panels; p += c->threads) {
    const int64_t first = p % panels * columns_of_panel, rows = least(columns_of_panel, d.columns - first);
    const T *const from = w + (p / panels * d.columns + first) * d.inner;
    uint8_t *const panel = out + p * bytes;
    memset(panel, 0, (size_t)bytes);
    for (int64_t k = 0; k < d.inner; ++k) {
      element *const cell = reinterpret_cast<element *>(panel + cells_before(d, k - k % d.group % W::step, W::step) * W::bytes);
      const int64_t slot = k % d.group % W::step;
      for (int64_t r = 0; r < rows; ++r) {
        element &to = cell[W::pairs ? r * W::step + slot : slot * columns_of_panel + r];
        if constexpr (sizeof(element) == 4) {
          to = value(from[r * d.inner + k]);
        } else {
          to = from[r * d.inner + k];
        }
      }
    }
  }
}

}  // namespace S3_ISA
}  // namespace s3
#endif
