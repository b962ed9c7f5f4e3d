/* The float32 multiply-adds that one core can do: chains of them held in registers, independent of each other
   and enough to hide their latency. Returns the number of operations, two for each multiply-add. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
enum { CHAINS = 12, LANES = VECTOR_BYTES / sizeof(float) };

double multiply_add(long steps, float factor, float term, float* result) {
  Vector chain[CHAINS], factors = factor + (Vector){0}, terms = term + (Vector){0}, sum = {0};
  for (int i = 0; i < CHAINS; i++) chain[i] = terms * (float)i; /* equal chains would be computed once */
  for (long step = 0; step < steps; step++)
    for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factors + terms;
  for (int i = 0; i < CHAINS; i++) sum += chain[i];
  *result = sum[0]; /* what nobody reads would not be computed at all */
  return 2.0 * CHAINS * LANES * steps;
}
