/*
 * Choosing among the columns of a row: the k largest, and a token drawn from logits. Order is descending; equal values (the zeros too)
 * by the lower index; NaN last.
 */
#ifndef S3_CHOOSE_H
#define S3_CHOOSE_H
#include "rows.h"

namespace s3 {
inline namespace S3_ISA {

/* The k largest of n, largest first. */
S3_INLINE void top_k(const float *x, int64_t n, int64_t k, float *values, int32_t *ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rank = rank_of(x[i]);
    if (count == k && rank <= rank_of(values[k - 1])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && rank_of(values[at - 1]) < rank; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x[i];
    ids[at] = (int32_t)i;
  }
}

/*
 * Logits whose masses e^((x - largest) / temperature) add up in descending order. Nothing is sorted: masses are counted by the
 * highest 8 bits of the rank, then, among those with the bits found, by the next 8.
 */
struct descending_masses {
  const float *x;
  int64_t n;
  double largest, temperature;
  double highest_bits[256];

  double mass(float logit) const { return exponential_of(((double)logit - largest) / temperature); }

  void count(uint32_t prefix, int shift, double (&masses)[256]) const {
    for (double &m : masses) m = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t rank = rank_of(x[i]);
      if (shift == 24 || rank >> (shift + 8) == prefix) masses[(rank >> shift) & 255] += mass(x[i]);
    }
  }

  /* The first token with which the sum of masses is above `target` (or equal to it, if that will do), and that sum. */
  int64_t reach(double target, bool or_equal, double &sum) const {
    const auto enough = [=](double s) { return or_equal ? s >= target : s > target; };
    uint32_t prefix = 0;
    sum = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      double own[256];
      if (shift < 24) count(prefix, shift, own);
      const double *const masses = shift < 24 ? own : highest_bits;
      int digit = -1;
      double before = 0;
      for (int d = 255; d >= 0; --d) {
        if (!(masses[d] > 0)) continue;
        if (digit >= 0) before += masses[digit];
        digit = d; /* the last one with any mass when rounding keeps all from being enough */
        if (enough(sum + before + masses[d])) break;
      }
      sum += before;
      prefix = prefix << 8 | (uint32_t)digit;
    }
    int64_t token = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (rank_of(x[i]) != prefix) continue;
      token = i;
      sum += mass(x[i]);
      if (enough(sum)) break;
    }
    return token;
  }
};

/*
 * Temperature 0: the largest. Else a draw from softmax(logits / temperature) restricted to the shortest prefix of the descending order
 * that reaches `top_p`.
 */
inline int32_t sample_token(const float *logits, int64_t n, float temperature, float top_p, uint32_t seed, int32_t position) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (rank_of(logits[i]) > rank_of(logits[best])) best = i;
  if (!(temperature > 0) || !(top_p > 0)) return (int32_t)best;
  descending_masses all = {logits, n, logits[best], temperature, {}};
  all.count(0, 24, all.highest_bits);
  double total = 0;
  for (int d = 255; d >= 0; --d) total += all.highest_bits[d];
  if (total != total) return (int32_t)best; /* a NaN, or more than one infinity, among the logits */
  double kept = 0, sum = 0;
  all.reach(top_p * total, true, kept);
  return (int32_t)all.reach(uniform(seed, (uint32_t)position) * kept, false, sum);
}

}  // namespace S3_ISA
}  // namespace s3
#endif
