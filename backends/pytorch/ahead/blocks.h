// Products with weights that stay as they are stored: E4M3, a scale for each block of a matrix.
//
// Inductor puts this text into the code of a compiled piece, which includes what it needs. A row of
// weights is read once, widened in registers and multiplied; nothing wider is written to memory.

// Generated code is compiled with less.
#if defined(__GNUC__) && !defined(__clang__)
#define DSLC_FAST __attribute__((optimize("O3")))
#else
#define DSLC_FAST
#endif

// What E4M3 numbers are in BF16, which holds all of them exactly: 1 sign, 4 exponent bits with a
// bias of 7, 3 bits of mantissa; 0x7f is NaN.
static inline uint16_t dslc_widened(unsigned byte) {
  unsigned magnitude = byte & 0x7f, sign = (byte & 0x80) << 8;
  if (magnitude == 0x7f) return (uint16_t)(sign | 0x7fc0);
  if (magnitude >= 8) return (uint16_t)(sign | ((magnitude << 4) + (120 << 7)));
  if (magnitude == 0) return (uint16_t)sign;
  unsigned top = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;  // subnormal: m * 2^-9
  return (uint16_t)(sign | ((top + 118) << 7) | ((magnitude << (7 - top)) & 0x7f));
}

static inline float dslc_float(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t dslc_rounded(float value) {  // to the nearest BF16, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512VBMI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define DSLC_WIDE 1

typedef struct { __m512i high0, high1, low0, low1; } dslc_table;

static inline dslc_table dslc_make_table(void) {
  uint8_t high[128], low[128];
  for (unsigned i = 0; i < 128; ++i) {
    uint16_t value = dslc_widened(i);
    high[i] = (uint8_t)(value >> 8);
    low[i] = (uint8_t)value;
  }
  dslc_table table = {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64),
                      _mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)};
  return table;
}

// 64 weights in BF16, of each 16 the first 8 in *even and the last 8 in *odd.
static inline void dslc_widen(const dslc_table* table, const uint8_t* from, __m512i* even,
                              __m512i* odd) {
  __m512i bytes = _mm512_loadu_si512(from);
  __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8((char)0x80));
  __m512i high = _mm512_permutex2var_epi8(table->high0, bytes, table->high1);
  __m512i low = _mm512_permutex2var_epi8(table->low0, bytes, table->low1);
  high = _mm512_or_si512(high, sign);
  *even = _mm512_unpacklo_epi8(low, high);
  *odd = _mm512_unpackhi_epi8(low, high);
}
#endif

// y[r, n] = sum over k of x[r, k] * w[pick[r], n, k] * scale[pick[r], n / rows, k / columns].
// Sums are f32, within a block first.
DSLC_FAST static void dslc_rows(const void* x, int x_is_bf16, const uint8_t* w, const float* scale,
                      const int64_t* pick, void* y, int64_t count, int64_t n, int64_t k,
                      int64_t rows, int64_t columns) {
  int64_t down = (n + rows - 1) / rows, across = (k + columns - 1) / columns;
  int64_t groups = (n + 15) / 16;
#ifdef DSLC_WIDE
  int vector = x_is_bf16 && columns % 64 == 0;
  int64_t whole = vector ? k / 64 * 64 : 0;
#else
  int vector = 0;
  int64_t whole = 0;
#endif
  float table[256];
  if (whole < k)
    for (unsigned i = 0; i < 256; ++i) table[i] = dslc_float(dslc_widened(i));
#pragma omp parallel
  {
#ifdef DSLC_WIDE
    dslc_table wide = dslc_make_table();
    uint16_t* ordered = (uint16_t*)(vector ? aligned_alloc(64, (size_t)whole * 2 + 64) : NULL);
#endif
    int64_t prepared = -1;
    (void)prepared;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < count * groups; ++at) {
      int64_t r = at / groups, begin = at % groups * 16;
      int64_t end = begin + 16 < n ? begin + 16 : n;
      const uint8_t* block = w + pick[r] * n * k;
      const float* scales = scale + pick[r] * down * across;
#ifdef DSLC_WIDE
      if (vector && prepared != r) {
        const uint16_t* from = (const uint16_t*)x + r * k;
        for (int64_t i = 0; i < whole; i += 64)
          for (int64_t j = 0; j < 64; ++j)
            ordered[i + (j & 8 ? 32 : 0) + (j >> 4) * 8 + (j & 7)] = from[i + j];
        prepared = r;
      }
#endif
      for (int64_t row = begin; row < end; ++row) {
        const uint8_t* mine = block + row * k;
        const float* along = scales + row / rows * across;
        float total = 0;
#ifdef DSLC_WIDE
        if (vector) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t i = 0; i < whole; i += columns) {
            int64_t stop = i + columns < whole ? i + columns : whole;
            __m512 part = _mm512_setzero_ps(), other = _mm512_setzero_ps();
            for (int64_t j = i; j < stop; j += 64) {
              __m512i even, odd;
              dslc_widen(&wide, mine + j, &even, &odd);
              part = _mm512_dpbf16_ps(part, (__m512bh)_mm512_load_si512(ordered + j),
                                      (__m512bh)even);
              other = _mm512_dpbf16_ps(other, (__m512bh)_mm512_load_si512(ordered + j + 32),
                                       (__m512bh)odd);
            }
            sum = _mm512_fmadd_ps(_mm512_add_ps(part, other),
                                  _mm512_set1_ps(along[i / columns]), sum);
          }
          total = _mm512_reduce_add_ps(sum);
        }
#endif
        for (int64_t i = whole; i < k;) {
          int64_t stop = (i / columns + 1) * columns < k ? (i / columns + 1) * columns : k;
          float part = 0;
          if (x_is_bf16) {
            const uint16_t* from = (const uint16_t*)x + r * k;
            for (int64_t j = i; j < stop; ++j) part += dslc_float(from[j]) * table[mine[j]];
          } else {
            const float* from = (const float*)x + r * k;
            for (int64_t j = i; j < stop; ++j) part += from[j] * table[mine[j]];
          }
          total += part * along[i / columns];
          i = stop;
        }
        if (x_is_bf16) ((uint16_t*)y)[r * n + row] = dslc_rounded(total);
        else ((float*)y)[r * n + row] = total;
      }
    }
#ifdef DSLC_WIDE
    free(ordered);
#endif
  }
}

// What widening needs.
typedef struct {
  float values[256];
#ifdef DSLC_WIDE
  dslc_table wide;
#endif
} dslc_widening;

static dslc_widening dslc_make_widening(void) {
  dslc_widening made;
  for (unsigned i = 0; i < 256; ++i) made.values[i] = dslc_float(dslc_widened(i));
#ifdef DSLC_WIDE
  made.wide = dslc_make_table();
#endif
  return made;
}

// out[k] = mine[k] * along[k / columns], rounded once.
DSLC_FAST static void dslc_widen_row(const dslc_widening* by, const uint8_t* mine,
                                     const float* along, void* out, int to_bf16, int64_t k,
                                     int64_t columns) {
  for (int64_t i = 0; i < k; i += columns) {
    int64_t j = i, stop = i + columns < k ? i + columns : k;
    float scale = along[i / columns];
#ifdef DSLC_WIDE
    for (; to_bf16 && j + 64 <= stop; j += 64) {
      __m512i part[2];
      dslc_widen(&by->wide, mine + j, &part[0], &part[1]);
      for (int lane = 0; lane < 4; ++lane) {  // of each 16 weights, 8 stand in either part
        __m128i first = _mm512_extracti32x4_epi32(part[0], 0);
        __m128i last = _mm512_extracti32x4_epi32(part[1], 0);
        part[0] = _mm512_shuffle_i64x2(part[0], part[0], 0x39);
        part[1] = _mm512_shuffle_i64x2(part[1], part[1], 0x39);
        __m256i both = _mm256_set_m128i(last, first);
        __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale)));
        _mm256_storeu_si256((__m256i*)((uint16_t*)out + j + lane * 16), (__m256i)rounded);
      }
    }
#endif
    for (; j < stop; ++j) {
      float value = by->values[mine[j]] * scale;
      if (to_bf16) ((uint16_t*)out)[j] = dslc_rounded(value);
      else ((float*)out)[j] = value;
    }
  }
}

// out[n, k] = w[n, k] * scale[n / rows, k / columns], rounded once.
DSLC_FAST static void dslc_widen_all(const uint8_t* w, const float* scale, void* out, int to_bf16,
                                     int64_t n, int64_t k, int64_t rows, int64_t columns) {
  int64_t across = (k + columns - 1) / columns, width = to_bf16 ? 2 : 4;
  dslc_widening by = dslc_make_widening();
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < n; ++row)
    dslc_widen_row(&by, w + row * k, scale + row / rows * across, (char*)out + row * k * width,
                   to_bf16, k, columns);
}

static AOTITorchError dslc_new(AtenTensorHandle like, int64_t n, int64_t k, int32_t dtype,
                               AtenTensorHandle* made) {
  int64_t sizes[2] = {n, k}, strides[2] = {k, 1};
  int32_t device, index;
  AOTITorchError error = aoti_torch_get_device_type(like, &device);
  if (!error) error = aoti_torch_get_device_index(like, &index);
  return error ? error : aoti_torch_empty_strided(2, sizes, strides, dtype, device, index, made);
}

static int dslc_is_known(int32_t dtype) {
  return dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float32();
}

AOTITorchError aoti_torch_cpu_rows_of_blocks(AtenTensorHandle x, AtenTensorHandle data,
                                             AtenTensorHandle scale, AtenTensorHandle pick,
                                             int64_t rows, int64_t columns,
                                             AtenTensorHandle* result) {
  int64_t *given, *stored;
  int32_t dtype;
  void *from, *bytes, *scales, *picked, *to;
  AOTITorchError error = aoti_torch_get_sizes(x, &given);
  if (!error) error = aoti_torch_get_sizes(data, &stored);
  if (!error) error = aoti_torch_get_dtype(x, &dtype);
  if (!error && !dslc_is_known(dtype)) error = 1;
  if (!error) error = dslc_new(x, given[0], stored[1], dtype, result);
  if (!error) error = aoti_torch_get_data_ptr(x, &from);
  if (!error) error = aoti_torch_get_data_ptr(data, &bytes);
  if (!error) error = aoti_torch_get_data_ptr(scale, &scales);
  if (!error) error = aoti_torch_get_data_ptr(pick, &picked);
  if (!error) error = aoti_torch_get_data_ptr(*result, &to);
  for (int64_t r = 0; !error && r < given[0]; ++r) {
    int64_t number = ((const int64_t*)picked)[r];
    if (number < 0 || number >= stored[0]) error = 1;
  }
  if (!error)
    dslc_rows(from, dtype == aoti_torch_dtype_bfloat16(), (const uint8_t*)bytes,
              (const float*)scales, (const int64_t*)picked, to, given[0], stored[1], stored[2],
              rows, columns);
  return error;
}

AOTITorchError aoti_torch_cpu_widened(AtenTensorHandle data, AtenTensorHandle scale, int64_t rows,
                                      int64_t columns, int32_t dtype, AtenTensorHandle* result) {
  int64_t* sizes;
  void *bytes, *scales, *to;
  AOTITorchError error = aoti_torch_get_sizes(data, &sizes);
  if (!error && !dslc_is_known(dtype)) error = 1;
  if (!error) error = dslc_new(data, sizes[0], sizes[1], dtype, result);
  if (!error) error = aoti_torch_get_data_ptr(data, &bytes);
  if (!error) error = aoti_torch_get_data_ptr(scale, &scales);
  if (!error) error = aoti_torch_get_data_ptr(*result, &to);
  if (!error)
    dslc_widen_all((const uint8_t*)bytes, (const float*)scales, to,
                   dtype == aoti_torch_dtype_bfloat16(), sizes[0], sizes[1], rows, columns);
  return error;
}
