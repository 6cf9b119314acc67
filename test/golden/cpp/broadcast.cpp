#include "tensors.h"
// elements f32[2,T,3,40], f32[T,1,40], f32[3,1] -> f32[2,T,3,40]: add mul silu
void broadcast(const s3_call *c) {
  const float *const in0 = static_cast<const float *>(c->args[0]); // f32[2,T,3,40]
  const float *const in1 = static_cast<const float *>(c->args[1]); // f32[T,1,40]
  const float *const in2 = static_cast<const float *>(c->args[2]); // f32[3,1]
  float *const out0 = static_cast<float *>(c->args[3]); // f32[2,T,3,40]
  const int64_t tokens = all_tokens(c);
  for (rows r = rows::fixed(c, 2 * tokens, 1); r.next();) {
    const int64_t i0 = r.row / tokens;
    const int64_t i1 = r.row % tokens;
    for (int64_t j = 0; j < 3; ++j) {
      const float *const in0_at = in0 + i0 * (120 * tokens) + i1 * 120 + j * 40;
      const float *const in1_at = in1 + i1 * 40;
      const float *const in2_at = in2 + j;
      const float x2 = in2_at[0];
      float *const out0_at = out0 + i0 * (120 * tokens) + i1 * 120 + j * 40;
      S3_INDEPENDENT
      for (int64_t i = 0; i < 40; ++i) {
        const float x0 = in0_at[i];
        const float x1 = in1_at[i];
        const float add0 = x0 + x1;
        const float mul1 = add0 * x2;
        const float silu2 = mul1 / (1.0f + exponential_of((-mul1)));
        out0_at[i] = silu2;
      }
    }
  }
}
