/*
 * Products of row-major matrices, neither of them packed beforehand: sums[m, n] = sum over k of a[m, k] * b[k, n], for a block of the result
 * at a time. A sum is one ascending chain over k, so that its bits depend neither on the blocks nor on the number of threads.
 */
#ifndef S3_MATMUL_H
#define S3_MATMUL_H
#include "contract.h"
#include "rows.h"

namespace s3 {
inline namespace S3_ISA {

/* A part of a result; its sums are `width` apart. `height`: rows whose sums are in registers at a time. */
struct product_block {
  int64_t row, rows, column, columns, width;
  int height;
};

/* A result in blocks: fewer rows each where there would be too few blocks for all threads. */
template <class Sum>
struct product_blocks {
  static constexpr bool in_registers = sizeof(Sum) == 4;
  static constexpr int64_t most_rows_of_block = in_registers ? 96 : 16;
  static constexpr int64_t most_sums = most_rows_of_block * 64;
  int64_t rows, columns, block_rows, width, parts_of_rows, count;
  int height;

  product_blocks(int64_t rows, int64_t columns, int64_t matrices, int64_t threads) : rows(rows), columns(columns) {
    height = in_registers ? register_height_for(rows) : 1;
    width = in_registers ? panels_in_registers(height) * columns_of_panel : 64;
    const int64_t across = ceil_div(columns, width);
    block_rows = least(most_rows_of_block / height, ceil_div(rows, height)) * height;
    while (block_rows > height && matrices * across * ceil_div(rows, block_rows) < 2 * threads)
      block_rows = ceil_div(block_rows / height, 2) * height;
    parts_of_rows = rows == 0 ? 0 : ceil_div(rows, block_rows);
    count = across * parts_of_rows;
  }
  S3_INLINE product_block at(int64_t block) const {
    const int64_t row = block % parts_of_rows * block_rows, column = block / parts_of_rows * width;
    return {row, least(rows - row, block_rows), column, least(columns - column, width), width, height};
  }
};

/* rows `count` of a panel, k after k: 16 columns of b, those that are not there zero */
template <class X>
S3_INLINE void pack_panel(const X *b, int64_t stride, int64_t k, int64_t columns, float *out) {
  for (int64_t i = 0; i < k; ++i, b += stride, out += columns_of_panel)
    if (columns >= columns_of_panel) {
      vec v[parts];
      widen(b, v);
      for (int p = 0; p < parts; ++p) store(out + p * lanes, unit_of<X> == 1 ? v[p] : v[p] * set(1 / unit_of<X>));
    } else
      for (int64_t j = 0; j < columns_of_panel; ++j) out[j] = j < columns ? value(b[j]) : 0.0f;
}

/* a few rows: b is read once, and is not worth packing */
template <int H>
void stream_block(const float *a, const float *b, int64_t inner, int64_t columns, float *sums) {
  constexpr int registers = panels_in_registers(H) * parts;
  vec acc[H][registers] = {};
  for (int64_t k = 0; k < inner; ++k, b += columns) {
    vec w[registers];
#pragma GCC unroll 32
    for (int i = 0; i < registers; ++i) w[i] = load(b + i * lanes);
#pragma GCC unroll 2
    for (int m = 0; m < H; ++m) {
      const vec factor = set(a[m * inner + k]);
#pragma GCC unroll 32
      for (int i = 0; i < registers; ++i) acc[m][i] = fma(factor, w[i], acc[m][i]);
    }
  }
  for (int m = 0; m < H; ++m)
    for (int i = 0; i < registers; ++i) store(sums + (m * registers + i) * lanes, acc[m][i]);
}

template <int H, class X>
void multiply_block_of(const X *a, const X *b, int64_t inner, int64_t columns, const product_block &at, float *sums) {
  constexpr int P = panels_in_registers(H), registers = P * parts, width = P * columns_of_panel;
  memset(sums, 0, (size_t)(ceil_div(at.rows, H) * H * width) * sizeof(float));
  if constexpr (H <= 2 && sizeof(X) == sizeof(float))
    if (at.rows == H && at.columns == width) return stream_block<H>(a, b, inner, columns, sums);
  constexpr int64_t depth = 8192 / width / 16 * 16; /* k of the panels that stay in the first cache while all rows meet them */
  constexpr int64_t stride = depth + 16;            /* rows that are no power of two apart do not crowd each other out there */
  alignas(64) float panels[P][depth * columns_of_panel];
  alignas(64) float widened[H * stride];
  for (int64_t k = 0; k < inner; k += depth) {
    const int64_t now = least(inner - k, depth);
    const uint8_t *panel[P];
    for (int p = 0; p < P; ++p) {
      pack_panel(b + k * columns + p * columns_of_panel, columns, now, at.columns - p * columns_of_panel, panels[p]);
      panel[p] = reinterpret_cast<const uint8_t *>(panels[p]);
    }
    for (int64_t row = 0; row < at.rows; row += H) {
      const X *const from = a + row * inner + k;
      const float *x = widened;
      int64_t step = stride;
      if (sizeof(X) == sizeof(float) && row + H <= at.rows) {
        x = reinterpret_cast<const float *>(from);
        step = inner;
      } else
        for (int64_t m = 0; m < H; ++m)
          for (int64_t i = 0; i < now; ++i) widened[m * stride + i] = row + m < at.rows ? value(from[m * inner + i]) : 0.0f;
      float *const out = sums + row * width;
      vec acc[H][registers];
      for (int m = 0; m < H; ++m)
        for (int i = 0; i < registers; ++i) acc[m][i] = load(out + m * width + i * lanes);
      multiply<f32_panel, H, P, 0>(x, step, 16, panel, now, acc);
      for (int m = 0; m < H; ++m)
        for (int i = 0; i < registers; ++i) store(out + m * width + i * lanes, acc[m][i]);
    }
  }
}

/* floats of up to 32 bits: `a` and `b` at the block's first row and column */
template <class X>
S3_INLINE void multiply_block(const X *a, const X *b, int64_t inner, int64_t columns, const product_block &at, float *sums) {
  switch (at.height) {
    case 1: return multiply_block_of<1>(a, b, inner, columns, at, sums);
    case 2: return multiply_block_of<2>(a, b, inner, columns, at, sums);
#if defined(S3_AVX512)
    case 4: return multiply_block_of<4>(a, b, inner, columns, at, sums);
    case 6: return multiply_block_of<6>(a, b, inner, columns, at, sums);
    case 8: return multiply_block_of<8>(a, b, inner, columns, at, sums);
    default: return multiply_block_of<12>(a, b, inner, columns, at, sums);
#elif defined(S3_AVX2)
    case 3: return multiply_block_of<3>(a, b, inner, columns, at, sums);
    default: return multiply_block_of<6>(a, b, inner, columns, at, sums);
#else
    default: return multiply_block_of<3>(a, b, inner, columns, at, sums);
#endif
  }
}

/* f64, and integers, whose sums are exact to 2^53 */
template <class X>
void multiply_block(const X *a, const X *b, int64_t inner, int64_t columns, const product_block &at, double *sums) {
  memset(sums, 0, (size_t)(at.rows * at.width) * sizeof(double));
  for (int64_t k = 0; k < inner; ++k)
    for (int64_t m = 0; m < at.rows; ++m) {
      const double x = value(a[m * inner + k]);
      S3_INDEPENDENT
      for (int64_t j = 0; j < at.columns; ++j) sums[m * at.width + j] += x * (double)value(b[k * columns + j]);
    }
}

}  // namespace S3_ISA
}  // namespace s3
#endif
