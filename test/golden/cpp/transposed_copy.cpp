#include "tensors.h"
// transpose bf16[T,40,33] -> bf16[T,33,40]
void transposed_copy(const s3_call *c) {
  const void *const in0 = static_cast<const void *>(c->args[0]); // bf16[T,40,33]
  void *const out0 = static_cast<void *>(c->args[1]); // bf16[T,33,40]
  for (rows r = rows::of_tokens(c, 1, 4); r.next();) {
    const int64_t i0 = r.row;
    const int64_t j = r.tile / 2 * 32, i = r.tile % 2 * 32;
    const uint16_t *const in0_at = static_cast<const uint16_t *>(in0) + i0 * 1320 + j + i * 33;
    uint16_t *const out0_at = static_cast<uint16_t *>(out0) + i0 * 1320 + j * 40 + i;
    transpose_square(in0_at, 33, least(33 - j, 32), out0_at, 40, least(40 - i, 32));
  }
}
