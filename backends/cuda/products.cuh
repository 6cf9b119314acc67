// Products of a warpgroup: 64 lines of A times N lines of B, both in shared memory as lines of what is summed over, added up in registers.
// One function a type, for N of 16, 32, 64, 96 and 128; the number of sums of a thread, N / 2, chooses among them.
#pragma once
#include "hopper.cuh"

namespace s3::hopper {

#define S3_SUMS_4(how, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define S3_SUMS_8(how, i) S3_SUMS_4(how, i), S3_SUMS_4(how, i + 4)
#define S3_SUMS_16(how, i) S3_SUMS_8(how, i), S3_SUMS_8(how, i + 8)
#define S3_SUMS_32(how, i) S3_SUMS_16(how, i), S3_SUMS_16(how, i + 16)
#define S3_SUMS_48(how, i) S3_SUMS_32(how, i), S3_SUMS_16(how, i + 32)
#define S3_SUMS_64(how, i) S3_SUMS_32(how, i), S3_SUMS_32(how, i + 32)
#define S3_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define S3_NAMES_16 S3_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define S3_NAMES_32 S3_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define S3_NAMES_48 S3_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define S3_NAMES_64 S3_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `add` false: the sums start from zero
#define S3_PRODUCT(function, type, how, shape, tail, sums, a_name, b_name, add_name)                                                      \
  __device__ __forceinline__ void function(type(&d)[sums], uint64_t a, uint64_t b, bool add) {                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_name ", 0;\nwgmma.mma_async.sync.aligned." shape " {" S3_NAMES_##sums "}, " a_name \
                 ", " b_name ", p" tail ";\n}"                                                                                            \
                 : S3_SUMS_##sums(how, 0)                                                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                                           \
  }
#define S3_PRODUCTS(function, type, how, before, after, tail)                        \
  S3_PRODUCT(function, type, how, before "n16" after, tail, 8, "%8", "%9", "%10")    \
  S3_PRODUCT(function, type, how, before "n32" after, tail, 16, "%16", "%17", "%18") \
  S3_PRODUCT(function, type, how, before "n64" after, tail, 32, "%32", "%33", "%34") \
  S3_PRODUCT(function, type, how, before "n96" after, tail, 48, "%48", "%49", "%50") \
  S3_PRODUCT(function, type, how, before "n128" after, tail, 64, "%64", "%65", "%66")

S3_PRODUCTS(product_e4m3, float, "+f", "m64", "k32.f32.e4m3.e4m3", ", 1, 1")
S3_PRODUCTS(product_bf16, float, "+f", "m64", "k16.f32.bf16.bf16", ", 1, 1, 0, 0")
S3_PRODUCTS(product_i8, int32_t, "+r", "m64", "k32.s32.s8.s8", "")

#undef S3_PRODUCTS
#undef S3_PRODUCT
#undef S3_NAMES_64
#undef S3_NAMES_48
#undef S3_NAMES_32
#undef S3_NAMES_16
#undef S3_NAMES_8
#undef S3_SUMS_64
#undef S3_SUMS_48
#undef S3_SUMS_32
#undef S3_SUMS_16
#undef S3_SUMS_8
#undef S3_SUMS_4

}  // namespace s3::hopper
