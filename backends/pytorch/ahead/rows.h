// Products of some rows with a weight in BF16 that stays as it is stored, [n, k].
//
// What a prompt's tokens make of an expert, and of any matrix in a short prompt, is a product of 2 to
// a few hundred rows. Libraries bring the weight into another layout first, which takes as long as
// the product. Here the rows are: [rows / 16][k / 2][16] pairs. A pair of weights is broadcast to 16
// rows, and 24 sums stay in registers. The weights come from memory once; those of the next tile are
// fetched meanwhile. It follows blocks.h.

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

enum { DSLC_LANES = 16, DSLC_WIDTH = 48 };  // rows in a register; weights' rows at once

// Rows `begin` .. `begin + 16` of x [m, k] as pairs; rows past the last one are zeros.
DSLC_FAST static void dslc_pairs(const uint16_t* x, int64_t m, int64_t k, int64_t begin,
                                 uint32_t* pairs) {
  int64_t rows = m - begin < DSLC_LANES ? m - begin : DSLC_LANES, half = k / 2;
  __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32((int)half));
  __mmask16 there = (__mmask16)((1u << rows) - 1);
  const uint32_t* from = (const uint32_t*)(x + begin * k);
  for (int64_t i = 0; i < half; ++i)
    _mm512_store_si512(pairs + i * DSLC_LANES,
                       _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, from + i, 4));
}

// sums[n][rows] for `height` rows of weights and 16 * `groups` rows of x.
#define DSLC_TILE(name, groups, height)                                                           \
  DSLC_FAST static void name(const uint32_t* pairs, int64_t apart, const uint16_t* w, int64_t step, \
                             int64_t half, float* sums, int64_t across) {                         \
    __m512 total[height][groups];                                                                 \
    for (int n = 0; n < height; ++n)                                                              \
      for (int g = 0; g < groups; ++g) total[n][g] = _mm512_setzero_ps();                         \
    for (int64_t i = 0; i < half; ++i) {                                                          \
      if (i % 16 == 0)                                                                            \
        for (int n = 0; n < height; ++n)                                                          \
          _mm_prefetch((const char*)(w + (n + height) * step + i * 2), _MM_HINT_T0);              \
      __m512bh mine[groups];                                                                      \
      for (int g = 0; g < groups; ++g)                                                            \
        mine[g] = (__m512bh)_mm512_load_si512(pairs + g * apart + i * DSLC_LANES);                \
      for (int n = 0; n < height; ++n) {                                                          \
        int32_t pair;                                                                             \
        __builtin_memcpy(&pair, w + n * step + i * 2, 4);                                         \
        __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);                                     \
        for (int g = 0; g < groups; ++g)                                                          \
          total[n][g] = _mm512_dpbf16_ps(total[n][g], mine[g], weights);                          \
      }                                                                                           \
    }                                                                                             \
    for (int n = 0; n < height; ++n)                                                              \
      for (int g = 0; g < groups; ++g)                                                            \
        _mm512_store_ps(sums + n * across + g * DSLC_LANES, total[n][g]);                         \
  }

DSLC_TILE(dslc_tile_1, 1, 12)
DSLC_TILE(dslc_tile_2, 2, 12)
DSLC_TILE(dslc_tile_3, 3, 8)
DSLC_TILE(dslc_tile_4, 4, 6)
DSLC_TILE(dslc_line_1, 1, 1)
DSLC_TILE(dslc_line_2, 2, 1)
DSLC_TILE(dslc_line_3, 3, 1)
DSLC_TILE(dslc_line_4, 4, 1)

typedef void (*dslc_tile)(const uint32_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t);

// Weights [n, k]: in BF16, rows `step` apart, or in E4M3 with a scale for each block.
typedef struct {
  const uint16_t* wide;
  int64_t step;
  const uint8_t* bytes;
  const float* scale;
  int64_t rows, columns;
} dslc_weights;

// y[m, n] = sum over k of x[m, k] * w[n, k]; k is even. Sums are f32.
DSLC_FAST static void dslc_few_rows(const uint16_t* x, const dslc_weights* given, uint16_t* y,
                                    int64_t m, int64_t n, int64_t k) {
  static const dslc_tile tiles[] = {dslc_tile_1, dslc_tile_2, dslc_tile_3, dslc_tile_4};
  static const dslc_tile lines[] = {dslc_line_1, dslc_line_2, dslc_line_3, dslc_line_4};
  static const int heights[] = {12, 12, 8, 6};
  int64_t half = k / 2, blocks = (m + DSLC_LANES - 1) / DSLC_LANES, across = blocks * DSLC_LANES;
  int64_t apart = half * DSLC_LANES;
  uint32_t* pairs = (uint32_t*)aligned_alloc(64, (size_t)(blocks * apart * 4));
  dslc_widening by = dslc_make_widening();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) dslc_pairs(x, m, k, b * DSLC_LANES, pairs + b * apart);
    float* sums = (float*)aligned_alloc(64, (size_t)(DSLC_WIDTH * across * 4));
    uint16_t* widened = (uint16_t*)(given->bytes ? malloc((size_t)(DSLC_WIDTH * k * 2)) : NULL);
    __m512i places = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32((int)across));
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < n; begin += DSLC_WIDTH) {
      int64_t end = begin + DSLC_WIDTH < n ? begin + DSLC_WIDTH : n;
      const uint16_t* w = given->wide + begin * given->step;
      int64_t step = given->step;
      if (given->bytes) {  // they stay in a cache
        for (int64_t at = begin; at < end; ++at)
          dslc_widen_row(&by, given->bytes + at * k,
                         given->scale + at / given->rows * ((k + given->columns - 1) / given->columns),
                         widened + (at - begin) * k, 1, k, given->columns);
        w = widened;
        step = k;
      }
      for (int64_t b = 0; b < blocks;) {
        int64_t left = blocks - b;
        int groups = left >= 4 && left != 5 ? 4 : left >= 3 ? 3 : (int)left;  // 5 are 3 and 2
        int height = heights[groups - 1];
        int64_t at = begin;
        for (; at + height <= end; at += height)
          tiles[groups - 1](pairs + b * apart, apart, w + (at - begin) * step, step, half,
                            sums + (at - begin) * across + b * DSLC_LANES, across);
        for (; at < end; ++at)
          lines[groups - 1](pairs + b * apart, apart, w + (at - begin) * step, step, half,
                            sums + (at - begin) * across + b * DSLC_LANES, across);
        b += groups;
      }
      for (int64_t at = begin; at < end; at += 16) {
        __mmask16 there = (__mmask16)(end - at < 16 ? (1u << (end - at)) - 1 : 0xffff);
        for (int64_t row = 0; row < m; ++row) {
          __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, places,
                                                   sums + (at - begin) * across + row, 4);
          _mm256_mask_storeu_epi16(y + row * n + at, there, (__m256i)_mm512_cvtneps_pbh(values));
        }
      }
    }
    free(sums);
    free(widened);
  }
  free(pairs);
}

AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle x, AtenTensorHandle w,
                                       AtenTensorHandle* result) {
  int64_t *given, *stored, *steps;
  void *from, *wide, *to;
  AOTITorchError error = aoti_torch_get_sizes(x, &given);
  if (!error) error = aoti_torch_get_sizes(w, &stored);
  if (!error) error = aoti_torch_get_strides(w, &steps);
  if (!error) error = dslc_new(x, given[0], stored[0], aoti_torch_dtype_bfloat16(), result);
  if (!error) error = aoti_torch_get_data_ptr(x, &from);
  if (!error) error = aoti_torch_get_data_ptr(w, &wide);
  if (!error) error = aoti_torch_get_data_ptr(*result, &to);
  if (error) return error;
  dslc_weights weights = {(const uint16_t*)wide, steps[0], NULL, NULL, 1, 1};
  dslc_few_rows((const uint16_t*)from, &weights, (uint16_t*)to, given[0], stored[0], given[1]);
  return 0;
}

AOTITorchError aoti_torch_cpu_few_rows_of_blocks(AtenTensorHandle x, AtenTensorHandle data,
                                                 AtenTensorHandle scale, int64_t rows,
                                                 int64_t columns, AtenTensorHandle* result) {
  int64_t *given, *stored;
  void *from, *bytes, *scales, *to;
  AOTITorchError error = aoti_torch_get_sizes(x, &given);
  if (!error) error = aoti_torch_get_sizes(data, &stored);
  if (!error) error = dslc_new(x, given[0], stored[0], aoti_torch_dtype_bfloat16(), result);
  if (!error) error = aoti_torch_get_data_ptr(x, &from);
  if (!error) error = aoti_torch_get_data_ptr(data, &bytes);
  if (!error) error = aoti_torch_get_data_ptr(scale, &scales);
  if (!error) error = aoti_torch_get_data_ptr(*result, &to);
  if (error) return error;
  dslc_weights weights = {NULL, 0, (const uint8_t*)bytes, (const float*)scales, rows, columns};
  dslc_few_rows((const uint16_t*)from, &weights, (uint16_t*)to, given[0], stored[0], given[1]);
  return 0;
}

#endif
