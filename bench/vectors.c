/* What the vector units of one core can do in float32: chains held in registers, independent of each other and
   enough to hide their latency. */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int Bits __attribute__((vector_size(VECTOR_BYTES)));
enum { CHAINS = 12, LANES = VECTOR_BYTES / sizeof(float) };

/* Returns the number of operations, two for each multiply-add. */
double multiply_add(long steps, float factor, float term, float* result) {
  Vector chain[CHAINS], factors = factor + (Vector){0}, terms = term + (Vector){0}, sum = {0};
  for (int i = 0; i < CHAINS; i++) chain[i] = terms * (float)i; /* equal chains would be computed once */
  for (long step = 0; step < steps; step++)
    for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * factors + terms;
  for (int i = 0; i < CHAINS; i++) sum += chain[i];
  *result = sum[0]; /* what nobody reads would not be computed at all */
  return 2.0 * CHAINS * LANES * steps;
}

/* 2^x as the kernels compute it (csrc/cpu/vector.h), but for the bound on x. */
static Vector exp2_of(Vector x) {
  const float magic = 0x1.8p23f + 127;
  const Vector shifted = x + magic, r = x - (shifted - magic);
  Vector p = 1.534581348e-4f * r + 1.339993125e-3f;
  p = p * r + 9.618488958e-3f;
  p = p * r + 5.550328777e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  p = p * r + 1;
  return p * (Vector)((Bits)shifted << 23);
}

/* Returns the number of exponentials. */
double exponentials(long steps, float* result) {
  Vector chain[CHAINS], sum = {0};
  for (int i = 0; i < CHAINS; i++) chain[i] = (Vector){0} - (float)i / CHAINS;
  for (long step = 0; step < steps; step++)
    for (int i = 0; i < CHAINS; i++) chain[i] = exp2_of(chain[i]) - 1; /* between -1 and 0 again */
  for (int i = 0; i < CHAINS; i++) sum += chain[i];
  *result = sum[0];
  return 1.0 * CHAINS * LANES * steps;
}
