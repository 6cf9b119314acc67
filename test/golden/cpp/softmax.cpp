#include "rows.h"
// rows f32[T,48] -> f32[T,48]: max sub exp sum div
void softmax(const s3_call *c) {
  const float *const in0 = static_cast<const float *>(c->args[0]); // f32[T,48]
  float *const out0 = static_cast<float *>(c->args[1]); // f32[T,48]
  for (rows r = rows::of_tokens(c, 1, 1); r.next();) {
    const int64_t row = r.row;
    const float *const in0_row = in0 + row * 48;
    float *const out0_row = out0 + row * 48;
    alignas(64) float exp2_row[48];
    const float max0 = max(in0_row, 48);
    S3_INDEPENDENT
    for (int64_t i = 0; i < 48; ++i) {
      const float x0 = in0_row[i];
      const float sub1 = x0 - max0;
      const float exp2 = exponential_of(sub1);
      exp2_row[i] = exp2;
    }
    const float sum3 = sum(exp2_row, 48);
    S3_INDEPENDENT
    for (int64_t i = 0; i < 48; ++i) {
      out0_row[i] = exp2_row[i] / sum3;
    }
  }
}
