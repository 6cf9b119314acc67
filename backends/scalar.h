/*
 * Arithmetic of single elements, for every language of the C family. Its own `formats.h` gives a target the storage of small floats, S3_INLINE
 * (how a function is declared) and S3_C (a function of the C library by name).
 *
 * Everything is free of branches and, compiled without contraction, of fused multiply-add, so that a loop over columns can be vectorised and
 * gives the same bits on every instruction set and for every length. Formats: `value` reads an element as the variable that computes with it (float; double for f64 and integers of 32 bits
 * and more); `round_X` is the nearest value of X, ties to even, as a variable; `to_X` its storage, bit for bit as ir/round.ts has it.
 */
#ifndef S3_SCALAR_H
#define S3_SCALAR_H
#include "formats.h"

namespace s3 {
inline namespace S3_ISA {

constexpr float infinity = __builtin_inff();
constexpr float not_a_number = __builtin_nanf("");

S3_INLINE float pick(bool condition, float yes, float no) { return condition ? yes : no; }
S3_INLINE uint32_t pick(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }

/* --- formats: reading ------------------------------------------------------------------------------------------------------- */

S3_INLINE float value(float x) { return x; }
S3_INLINE double value(double x) { return x; }
S3_INLINE float value(int8_t x) { return x; }
S3_INLINE float value(uint8_t x) { return x; }
S3_INLINE float value(int16_t x) { return x; }
S3_INLINE float value(uint16_t x) { return x; }
S3_INLINE double value(int32_t x) { return x; }
S3_INLINE double value(uint32_t x) { return x; }
S3_INLINE double value(int64_t x) { return (double)x; }
S3_INLINE double value(uint64_t x) { return (double)x; }
S3_INLINE float truth(uint8_t x) { return x != 0 ? 1.0f : 0.0f; }
S3_INLINE float value(bf16 x) { return as_float((uint32_t)x.bits << 16); }

/* the float with this magnitude and the sign of `sign`, its highest bit */
S3_INLINE float with_sign(float magnitude, uint32_t sign) { return as_float(as_bits(magnitude) | (sign & 0x80000000u)); }

/* Subnormals are integers times the format's smallest value; multiplying normals by a power of two instead would be slow for them. */
S3_INLINE float value(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float subnormal = (float)(int32_t)magnitude * 0x1p-24f;
  const float normal = as_float((magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u));
  return with_sign(pick(magnitude < 0x400u, subnormal, normal), (uint32_t)x.bits << 16);
}
S3_INLINE float value(e5m2 x) { return value(f16{(uint16_t)(x.bits << 8)}); }
S3_INLINE float value(e4m3 x) {
  const uint32_t magnitude = x.bits & 0x7fu;
  const float subnormal = (float)(int32_t)magnitude * 0x1p-9f;
  const float normal = as_float(magnitude == 0x7fu ? 0x7fc00000u : (magnitude << 20) + 0x3c000000u);
  return with_sign(pick(magnitude < 8u, subnormal, normal), (uint32_t)x.bits << 24);
}

/* --- formats: rounding ------------------------------------------------------------------------------------------------------ */

S3_INLINE bool is_nan(float x) { return x != x; }
S3_INLINE uint32_t magnitude_bits(float x) { return as_bits(x) & 0x7fffffffu; }

/*
 * A double as a float with an odd last bit when it is not exact: rounding that again to a format of at most 22 bits gives what one
 * rounding of the double would.
 */
S3_INLINE float to_odd(double x) {
  const float f = (float)x;
  const double back = f;
  const bool above = S3_C(fabs)(back) > S3_C(fabs)(x);
  const uint32_t toward_zero = as_bits(f) - (above ? 1u : 0u);
  return as_float(toward_zero | (back < x || back > x ? 1u : 0u));
}

/* A target that rounds by instructions of its own says so by S3_OWN_BF16, S3_OWN_F16 and S3_OWN_E4M3, and has these in its formats.h. */
#ifndef S3_OWN_BF16
S3_INLINE uint32_t bf16_rounded(float x) {
  const uint32_t u = as_bits(x);
  return pick(is_nan(x), 0x7fc00000u, (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}
S3_INLINE float round_bf16(float x) { return as_float(bf16_rounded(x)); }
S3_INLINE bf16 to_bf16(float x) { return {(uint16_t)(bf16_rounded(x) >> 16)}; }
#endif

#ifndef S3_OWN_F16
/* adding 2^(23 + e) to a smaller magnitude leaves its nearest multiple of 2^e in the low bits */
S3_INLINE uint32_t f16_rounded(float x) {
  const uint32_t a = magnitude_bits(x);
  const uint32_t subnormal = as_bits(as_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((a + 0xfffu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = pick(a < 0x38800000u, subnormal, pick(a >= 0x477ff000u, 0x7c00u, normal));
  return pick(is_nan(x), 0x7e00u, finite | ((as_bits(x) >> 16) & 0x8000u));
}
S3_INLINE f16 to_f16(float x) { return {(uint16_t)f16_rounded(x)}; }
#endif
S3_INLINE float round_f16(float x) { return value(to_f16(x)); }

S3_INLINE uint32_t e5m2_rounded(float x) {
  const uint32_t a = magnitude_bits(x);
  const uint32_t subnormal = as_bits(as_float(a) + 128.0f) - 0x43000000u;
  const uint32_t normal = ((a + 0xfffffu + ((a >> 21) & 1u)) >> 21) - (112u << 2);
  const uint32_t finite = pick(a < 0x38800000u, subnormal, pick(a >= 0x47700000u, 0x7cu, normal));
  return pick(is_nan(x), 0x7eu, finite | ((as_bits(x) >> 24) & 0x80u));
}
S3_INLINE e5m2 to_e5m2(float x) { return {(uint8_t)e5m2_rounded(x)}; }
S3_INLINE float round_e5m2(float x) { return value(to_e5m2(x)); }

#ifndef S3_OWN_E4M3
/* no infinities: what is above 448 becomes 448 */
S3_INLINE uint32_t e4m3_rounded(float x) {
  const uint32_t a = magnitude_bits(x);
  const uint32_t subnormal = as_bits(as_float(a) + 16384.0f) - 0x46800000u;
  const uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t finite = pick(a < 0x3c800000u, subnormal, pick(a >= 0x43e00000u, 0x7eu, normal));
  return pick(is_nan(x), 0x7fu, finite | ((as_bits(x) >> 24) & 0x80u));
}
S3_INLINE e4m3 to_e4m3(float x) { return {(uint8_t)e4m3_rounded(x)}; }
#endif
S3_INLINE float round_e4m3(float x) { return value(to_e4m3(x)); }

S3_INLINE float round_bf16(double x) { return round_bf16(to_odd(x)); }
S3_INLINE float round_f16(double x) { return round_f16(to_odd(x)); }
S3_INLINE float round_e4m3(double x) { return round_e4m3(to_odd(x)); }
S3_INLINE float round_e5m2(double x) { return round_e5m2(to_odd(x)); }
S3_INLINE bf16 to_bf16(double x) { return to_bf16(to_odd(x)); }
S3_INLINE f16 to_f16(double x) { return to_f16(to_odd(x)); }
S3_INLINE e4m3 to_e4m3(double x) { return to_e4m3(to_odd(x)); }
S3_INLINE e5m2 to_e5m2(double x) { return to_e5m2(to_odd(x)); }
S3_INLINE float round_f32(float x) { return x; }
S3_INLINE float round_f32(double x) { return (float)x; }

/* Integers: NaN is 0, then clamped, then to nearest even. Bounds are clamped first so that adding and taking away 1.5 * 2^23 rounds. */
S3_INLINE float clamped(float x, float low, float high) {
  const float number = pick(is_nan(x), 0.0f, x);
  const float bounded = pick(number < low, low, pick(number > high, high, number));
  return bounded + 12582912.0f - 12582912.0f;
}
S3_INLINE double clamped(double x, double low, double high) {
  const double number = x != x ? 0.0 : x;
  const double bounded = number < low ? low : number > high ? high : number;
  return S3_C(fabs)(bounded) < 0x1p51 ? bounded + 0x1.8p52 - 0x1.8p52 : bounded;
}
S3_INLINE float round_i8(float x) { return clamped(x, -128.0f, 127.0f); }
S3_INLINE float round_u8(float x) { return clamped(x, 0.0f, 255.0f); }
S3_INLINE float round_i16(float x) { return clamped(x, -32768.0f, 32767.0f); }
S3_INLINE float round_u16(float x) { return clamped(x, 0.0f, 65535.0f); }
S3_INLINE float round_i8(double x) { return (float)clamped(x, -128.0, 127.0); }
S3_INLINE float round_u8(double x) { return (float)clamped(x, 0.0, 255.0); }
S3_INLINE float round_i16(double x) { return (float)clamped(x, -32768.0, 32767.0); }
S3_INLINE float round_u16(double x) { return (float)clamped(x, 0.0, 65535.0); }
S3_INLINE double round_i32(double x) { return clamped(x, -2147483648.0, 2147483647.0); }
S3_INLINE double round_u32(double x) { return clamped(x, 0.0, 4294967295.0); }
/* the largest doubles below 2^63 and 2^64 */
S3_INLINE double round_i64(double x) { return clamped(x, -0x1p63, 0x1.fffffffffffffp62); }
S3_INLINE double round_u64(double x) { return clamped(x, 0.0, 0x1.fffffffffffffp63); }
S3_INLINE float round_bool(float x) { return x == 0.0f ? 0.0f : 1.0f; }
S3_INLINE float round_bool(double x) { return x == 0.0 ? 0.0f : 1.0f; }

S3_INLINE int8_t to_i8(float x) { return (int8_t)(int32_t)round_i8(x); }
S3_INLINE uint8_t to_u8(float x) { return (uint8_t)(int32_t)round_u8(x); }
S3_INLINE int16_t to_i16(float x) { return (int16_t)(int32_t)round_i16(x); }
S3_INLINE uint16_t to_u16(float x) { return (uint16_t)(int32_t)round_u16(x); }
S3_INLINE int8_t to_i8(double x) { return (int8_t)(int32_t)round_i8(x); }
S3_INLINE uint8_t to_u8(double x) { return (uint8_t)(int32_t)round_u8(x); }
S3_INLINE int16_t to_i16(double x) { return (int16_t)(int32_t)round_i16(x); }
S3_INLINE uint16_t to_u16(double x) { return (uint16_t)(int32_t)round_u16(x); }
S3_INLINE int32_t to_i32(double x) { return (int32_t)round_i32(x); }
S3_INLINE uint32_t to_u32(double x) { return (uint32_t)(int64_t)round_u32(x); }
S3_INLINE int64_t to_i64(double x) { return (int64_t)round_i64(x); }
S3_INLINE uint64_t to_u64(double x) { return (uint64_t)round_u64(x); }
S3_INLINE uint8_t to_bool(float x) { return x == 0.0f ? 0 : 1; }
S3_INLINE uint8_t to_bool(double x) { return x == 0.0 ? 0 : 1; }
S3_INLINE float to_f32(float x) { return x; }
S3_INLINE float to_f32(double x) { return (float)x; }
S3_INLINE double to_f64(double x) { return x; }

/* --- arithmetic ------------------------------------------------------------------------------------------------------------- */

S3_INLINE bool is_negative(double x) { return S3_C(copysign)(1.0, x) < 0; }

/* NaN when an operand is NaN; -0 is below 0 */
S3_INLINE float smaller_of(float x, float y) {
  const float smaller = pick(is_nan(x), x, pick(x < y, x, y));
  return pick(x == y, as_float(as_bits(x) | as_bits(y)), smaller);
}
S3_INLINE float larger_of(float x, float y) {
  const float larger = pick(is_nan(x), x, pick(x > y, x, y));
  return pick(x == y, as_float(as_bits(x) & as_bits(y)), larger);
}
S3_INLINE double smaller_of(double x, double y) { return x != x ? x : x < y || (x == y && is_negative(x)) ? x : y; }
S3_INLINE double larger_of(double x, double y) { return x != x ? x : x > y || (x == y && !is_negative(x)) ? x : y; }
S3_INLINE float magnitude(float x) { return as_float(magnitude_bits(x)); }
S3_INLINE double magnitude(double x) { return S3_C(fabs)(x); }
S3_INLINE float square_root(float x) { return S3_C(sqrtf)(x); }
S3_INLINE double square_root(double x) { return S3_C(sqrt)(x); }

/* to the nearest integer, ties to even; from 2^23 on every float is one */
S3_INLINE float nearest(float x) {
  const float a = magnitude(x);
  return pick(a < 8388608.0f, with_sign(a + 8388608.0f - 8388608.0f, as_bits(x)), x);
}
S3_INLINE float floor_of(float x) {
  const float n = nearest(x);
  return pick(n > x, n - 1.0f, n);
}
S3_INLINE float ceil_of(float x) {
  const float n = nearest(x);
  return pick(n < x, with_sign(n + 1.0f, as_bits(x)), n);
}

S3_INLINE float trunc_of(float x) { return with_sign(floor_of(magnitude(x)), as_bits(x)); }

/* of integers, in two's complement */
S3_INLINE double bits_of_both(double x, double y) { return (double)((int64_t)x & (int64_t)y); }
S3_INLINE double bits_of_either(double x, double y) { return (double)((int64_t)x | (int64_t)y); }
S3_INLINE double bits_that_differ(double x, double y) { return (double)((int64_t)x ^ (int64_t)y); }
S3_INLINE float bits_of_both(float x, float y) { return (float)((int32_t)x & (int32_t)y); }
S3_INLINE float bits_of_either(float x, float y) { return (float)((int32_t)x | (int32_t)y); }
S3_INLINE float bits_that_differ(float x, float y) { return (float)((int32_t)x ^ (int32_t)y); }

/* 2^n for n in -252..254, as two factors: the product underflows and overflows as it should */
S3_INLINE float times_power_of_two(float x, int32_t n) {
  const int32_t half = n >> 1;
  return x * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(n - half + 127) << 23);
}

/*
 * e^x within 1.5 ulp. x = n ln 2 + r with ln 2 in two pieces of which the first has 9 bits (Cody and Waite), |r| < 0.347; e^r by the
 * polynomial of degree 6 with the smallest largest relative error, 3.1e-9 (the first two terms held).
 */
S3_INLINE float exponential_of(float x) {
  const float bounded = pick(x < -104.0f, -104.0f, pick(x > 89.0f, 89.0f, x));
  const float shifted = bounded * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 0.00138144335f;
  p = p * r + 0.00836879667f;
  p = p * r + 0.0416683964f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  return times_power_of_two((r * r) * p + r + 1.0f, (int32_t)(as_bits(shifted) - 0x4b400000u));
}

/*
 * Natural logarithm within 1.5 ulp. x = 2^e m with m in [sqrt 1/2, sqrt 2); log m = f - f^2 / 2 + f^3 P(f) with f = m - 1, P of degree 8
 * with the smallest largest relative error, 7.5e-10.
 */
S3_INLINE float logarithm_of(float x) {
  const bool small = x < 0x1p-126f;
  const uint32_t u = as_bits(small ? x * 0x1p23f : x);
  const int32_t e = (int32_t)(u - 0x3f3504f3u) >> 23;
  const float f = as_float(u - ((uint32_t)e << 23)) - 1.0f;
  const float n = (float)(e - (small ? 23 : 0));
  float p = 0.0674663857f;
  p = p * f - 0.116756514f;
  p = p * f + 0.118881628f;
  p = p * f - 0.124055892f;
  p = p * f + 0.142195523f;
  p = p * f - 0.166679963f;
  p = p * f + 0.200021192f;
  p = p * f - 0.250000089f;
  p = p * f + 0.333333135f;
  const float f2 = f * f;
  const float finite = n * 0.693359375f + (f + (f2 * f * p - 0.5f * f2 - n * 2.12194440e-4f));
  return pick(x > 0.0f, pick(x == infinity, infinity, finite), pick(x == 0.0f, -infinity, not_a_number));
}

/* tanh within 2 ulp: x + x^3 P(x^2) below 0.625 (relative error 4.4e-9), 1 - 2 / (e^2x + 1) above */
S3_INLINE float hyperbolic_tangent(float x) {
  const float a = magnitude(x);
  const float s = x * x;
  float p = -0.0057049864f;
  p = p * s + 0.0206390861f;
  p = p * s - 0.0537397154f;
  p = p * s + 0.133314416f;
  p = p * s - 0.333332807f;
  const float large = with_sign(1.0f - 2.0f / (exponential_of(2.0f * a) + 1.0f), as_bits(x));
  return pick(a < 0.625f, x * s * p + x, large);
}

/* erf within 2.5 ulp: x P(x^2) below 1 (relative error 1.2e-9), above it 1 - e^-Q(x), where Q fits -log erfc (6.4e-10 of erfc) */
S3_INLINE float error_function(float x) {
  const float a = magnitude(x);
  const float s = x * x;
  float p = 7.85386073e-05f;
  p = p * s - 0.000801019371f;
  p = p * s + 0.00518832775f;
  p = p * s - 0.0268538129f;
  p = p * s + 0.112835854f;
  p = p * s - 0.37612626f;
  p = p * s + 0.12837911f; /* 2 / sqrt(pi) is this and 1 */
  const float t = pick(a > 4.1f, 4.1f, a);
  float q = 1.75666155e-05f;
  q = q * t - 0.000387775188f;
  q = q * t + 0.00391536066f;
  q = q * t - 0.0243667066f;
  q = q * t + 0.106991343f;
  q = q * t + 0.634632766f;
  q = q * t + 1.12882125f;
  q = q * t - 1.8284034e-05f;
  const float large = with_sign(1.0f - exponential_of(-q), as_bits(x));
  return pick(is_nan(x), x, pick(a < 1.0f, x * p + x, large));
}

/*
 * Of these the C library's double functions are exact enough to be rounded, whatever the argument. They are not vectorised: no model
 * calls them on a hot path (rotary tables are constants). So are all functions of doubles.
 */
S3_INLINE float sine(float x) { return (float)S3_C(sin)((double)x); }
S3_INLINE float cosine(float x) { return (float)S3_C(cos)((double)x); }
S3_INLINE float power(float x, float y) { return (float)S3_C(pow)((double)x, (double)y); }
S3_INLINE float tangent(float x) { return (float)S3_C(tan)((double)x); }
S3_INLINE float arc_sine(float x) { return (float)S3_C(asin)((double)x); }
S3_INLINE float arc_cosine(float x) { return (float)S3_C(acos)((double)x); }
S3_INLINE float arc_tangent(float x) { return (float)S3_C(atan)((double)x); }
S3_INLINE float hyperbolic_sine(float x) { return (float)S3_C(sinh)((double)x); }
S3_INLINE float hyperbolic_cosine(float x) { return (float)S3_C(cosh)((double)x); }
S3_INLINE float area_sine(float x) { return (float)S3_C(asinh)((double)x); }
S3_INLINE float area_cosine(float x) { return (float)S3_C(acosh)((double)x); }
S3_INLINE float area_tangent(float x) { return (float)S3_C(atanh)((double)x); }
S3_INLINE float remainder_of(float x, float y) { return (float)S3_C(fmod)((double)x, (double)y); }
S3_INLINE double sine(double x) { return S3_C(sin)(x); }
S3_INLINE double cosine(double x) { return S3_C(cos)(x); }
S3_INLINE double tangent(double x) { return S3_C(tan)(x); }
S3_INLINE double arc_sine(double x) { return S3_C(asin)(x); }
S3_INLINE double arc_cosine(double x) { return S3_C(acos)(x); }
S3_INLINE double arc_tangent(double x) { return S3_C(atan)(x); }
S3_INLINE double hyperbolic_sine(double x) { return S3_C(sinh)(x); }
S3_INLINE double hyperbolic_cosine(double x) { return S3_C(cosh)(x); }
S3_INLINE double area_sine(double x) { return S3_C(asinh)(x); }
S3_INLINE double area_cosine(double x) { return S3_C(acosh)(x); }
S3_INLINE double area_tangent(double x) { return S3_C(atanh)(x); }
S3_INLINE double remainder_of(double x, double y) { return S3_C(fmod)(x, y); }
S3_INLINE double power(double x, double y) { return S3_C(pow)(x, y); }
S3_INLINE double nearest(double x) { return S3_C(fabs)(x) < 0x1p51 ? S3_C(copysign)(S3_C(fabs)(x) + 0x1.8p52 - 0x1.8p52, x) : x; }
S3_INLINE double floor_of(double x) { return S3_C(floor)(x); }
S3_INLINE double ceil_of(double x) { return S3_C(ceil)(x); }
S3_INLINE double trunc_of(double x) { return S3_C(trunc)(x); }
S3_INLINE double exponential_of(double x) { return S3_C(exp)(x); }
S3_INLINE double logarithm_of(double x) { return S3_C(log)(x); }
S3_INLINE double hyperbolic_tangent(double x) { return S3_C(tanh)(x); }
S3_INLINE double error_function(double x) { return S3_C(erf)(x); }

/* --- order and chance ------------------------------------------------------------------------------------------------------- */

/* Floats in their order as integers, with every NaN above all others; 0x7fc00000 is the NaN. Reducing integers needs no order. */
S3_INLINE int32_t rising(float x) {
  const int32_t i = (int32_t)as_bits(x);
  return is_nan(x) ? 0x7fc00000 : i ^ (int32_t)((uint32_t)(i >> 31) >> 1);
}
S3_INLINE float from_rising(int32_t i) { return as_float((uint32_t)(i ^ (int32_t)((uint32_t)(i >> 31) >> 1))); }

/* floats in their order as unsigned integers, NaN below all */
S3_INLINE uint32_t rank_of(float x) {
  const uint32_t u = as_bits(x + 0.0f);
  return is_nan(x) ? 0 : (u >> 31) != 0 ? ~u : u | 0x80000000u;
}

/* never past an axis of `size` elements, whatever the index */
S3_INLINE int64_t clamped_index(int64_t index, int64_t size) { return index < 0 ? 0 : index < size ? index : size - 1; }

/* whether element a of a row is before element b in order: NaN last, equal ones by place */
template <bool Descending, class X>
S3_INLINE bool is_before(const X *x, int32_t a, int32_t b) {
  const auto va = value(x[a]), vb = value(x[b]);
  if (va < vb) return !Descending;
  if (va > vb) return Descending;
  const bool na = va != va, nb = vb != vb;
  return na != nb ? nb : a < b;
}

/* the finaliser of MurmurHash3's 32-bit variant */
S3_INLINE uint32_t mixed(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

/* the random number of (seed, position), in [0, 1): the one of ir/ops/sample.ts */
S3_INLINE double uniform(uint32_t seed, uint32_t position) {
  const uint32_t h = mixed(mixed(seed ^ (position * 0x9e3779b1u)) + 0x85ebca6bu);
  return (double)(h >> 8) * 0x1p-24;
}

}  // namespace S3_ISA
}  // namespace s3
#endif
