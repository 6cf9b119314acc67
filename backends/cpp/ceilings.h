/*
 * What this processor can do at best, for `step3c bench` to hold kernels against. Each takes (in, out): in is 1 MiB or more of values, of which
 * ceiling_read reads `rows` MiB; out[0] is the work done (bytes, or operations), the rest keeps the compiler from leaving the work out.
 */
#ifndef S3_CEILINGS_H
#define S3_CEILINGS_H
#include "panels.h"

namespace s3 {
inline namespace S3_ISA {

/* out[0] by one thread, and this thread's own word after it */
S3_INLINE void finish_ceiling(const s3_call *c, double work, double rest) {
  double *const out = (double *)c->args[1];
  if (c->thread == 0) out[0] = work;
  out[1 + c->thread] = rest;
}

/* nothing: what is left is the launch */
void ceiling_launch(const s3_call *) {}

/* Each thread adds up its own part, eight vectors at a time. */
void ceiling_read(const s3_call *c) {
  const int64_t mebibytes = c->heads[0].rows, all = mebibytes << 20, step = 8 * sizeof(ivec);
  const int64_t from = all / step * c->thread / c->threads * step, to = all / step * (c->thread + 1) / c->threads * step;
  const uint8_t *const in = (const uint8_t *)c->args[0];
  ivec sums[8] = {};
  for (int64_t at = from; at < to; at += step)
    for (int i = 0; i < 8; ++i) sums[i] ^= load_bits(in + at + i * sizeof(ivec));
  for (int i = 1; i < 8; ++i) sums[0] ^= sums[i];
  finish_ceiling(c, (double)all, (double)sums[0][0]);
}

/* Chains of multiply-adds, enough to keep two units busy over their latency: rows * 1024 steps of each. */
void ceiling_f32(const s3_call *c) {
  constexpr int chains = lanes == 16 ? 16 : 12;
  const int64_t steps = (int64_t)c->heads[0].rows * 1024;
  vec sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = set(1.0f + (float)i);
  const vec factor = set(0.5f), addend = set(1.0f); /* towards 2, and never a subnormal */
  for (int64_t n = 0; n < steps; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sums[i] = fma(sums[i], factor, addend);
  for (int i = 1; i < chains; ++i) sums[0] += sums[i];
  finish_ceiling(c, 2.0 * chains * lanes * (double)steps * c->threads, sums[0][0]);
}

/* The matrix unit where there is one: four products of a step from two tiles of each side. Elsewhere bf16 is multiplied as f32. */
void ceiling_bf16(const s3_call *c) {
#if defined(S3_AMX)
  const uint8_t *const in = (const uint8_t *)c->args[0];
  const int64_t steps = (int64_t)c->heads[0].rows * 64;
  tiles_begin();
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_load<4>(in, 64), tile_load<5>(in + 1024, 64), tile_load<6>(in + 2048, 64), tile_load<7>(in + 3072, 64);
  for (int64_t n = 0; n < steps; ++n) tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  float sums[256];
  tile_store<0>(sums, 64);
  tiles_end();
  finish_ceiling(c, 4.0 * 2 * 16 * 16 * 32 * (double)steps * c->threads, sums[0]);
#else
  ceiling_f32(c);
#endif
}

}  // namespace S3_ISA
}  // namespace s3
#endif
