#include "rows.h"
// rows f32[3*T,5120], f32[3*T,5120] -> bf16[3*T,5120]: silu mul cast
void swiglu(const s3_call *c) {
  const float *const in0 = static_cast<const float *>(c->args[0]); // f32[3*T,5120]
  const float *const in1 = static_cast<const float *>(c->args[1]); // f32[3*T,5120]
  bf16 *const out0 = static_cast<bf16 *>(c->args[2]); // bf16[3*T,5120]
  for (rows r = rows::of_tokens(c, 3, 3); r.next();) {
    const int64_t row = r.row;
    const float *const in0_row = in0 + row * 5120;
    const float *const in1_row = in1 + row * 5120;
    bf16 *const out0_row = out0 + row * 5120;
    const int64_t first = r.tile * 2048, last = first + 2048 < 5120 ? first + 2048 : 5120;
    S3_INDEPENDENT
    for (int64_t i = first; i < last; ++i) {
      const float x0 = in0_row[i];
      const float silu0 = x0 / (1.0f + exponential_of((-x0)));
      const float x1 = in1_row[i];
      const float mul1 = silu0 * x1;
      out0_row[i] = to_bf16(mul1);
    }
  }
}
