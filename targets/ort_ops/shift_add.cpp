// Kernels of ONNX Runtime for coded weights and angular attention, in domain ai.edgecompile.ort.
//
// targets/ort_custom.py writes the nodes and packs their constants; the kinds and layouts below are agreed with it.
// LANES (16 or 8) floats make a vector. Everything is written with the compiler's vector extensions; what needs an
// instruction of its own is guarded by the macro of its feature, with a portable form beside it.
//
// Columns (inputs) lie in the lanes: a word of 32 bits of each lane holds codes of columns that are LANES apart, so a
// step of LANES columns is one shift, one look-up in a table of 16 levels that a register holds, and one
// multiply-add for each token. Four rows (outputs) make a tile, so that what is read of the weights is one stream.

#include "ort_api.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LANES
#error "LANES is to be defined as 16 or 8"
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Words __attribute__((vector_size(4 * LANES)));

constexpr int kRows = 4;  // of a tile
constexpr std::size_t kAhead = 32 << 10;  // bytes between what is read and what is asked for

template <typename Vector>
inline Vector get(const void* from) {
  Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <typename Vector>
inline void put(void* to, Vector values) {
  std::memcpy(to, &values, sizeof values);
}

// Calls `work` with 0 to N - 1 as constants: arrays that only such numbers index are kept in registers.
template <int N, typename Work>
inline __attribute__((always_inline)) void each(const Work& work) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (work(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, N>());
}

inline Floats load(const float* from) { return get<Floats>(from); }

inline void store(float* to, Floats values) { put(to, values); }

inline Floats all(float value) { return Floats{} + value; }

inline Floats as_floats(Words bits) {
  Floats values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

inline Words as_words(Floats values) {
  Words bits;
  std::memcpy(&bits, &values, sizeof bits);
  return bits;
}

inline float sum(Floats values) {
#if defined(__AVX512F__) && LANES == 16
  return _mm512_reduce_add_ps((__m512)values);
#else
  float half[LANES];
  std::memcpy(half, &values, sizeof values);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return half[0];
#endif
}

// 16 floats, any of which each lane may choose by the lowest four bits of its number.
struct Table {
  static constexpr int kParts = 16 / LANES;
  Floats part[kParts];

  inline Floats operator[](Words number) const {
#if defined(__AVX512F__) && LANES == 16
    return (Floats)_mm512_permutexvar_ps((__m512i)number, (__m512)part[0]);
#elif defined(__AVX2__) && LANES == 8
    const __m256 low = _mm256_permutevar8x32_ps((__m256)part[0], (__m256i)number);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)part[1], (__m256i)number);
    return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps((__m256i)(number << 28)));
#else
    float held[16], found[LANES];
    std::memcpy(held, part, sizeof held);
    for (int i = 0; i < LANES; ++i) found[i] = held[number[i] & 15];
    return load(found);
#endif
  }
};

// -- weights ----------------------------------------------------------------------------------------------------------

enum Kind { kBook, kBinary, kPower, kTwoPowers, kList };

// What codes stand for. `set` takes the scales of one row in one group; `at` gives the weights of step j of a word.
//
// Codes of four bits, eight to a word. Levels of a group: those of the book times one scale, or sums of four scales.
template <int scale_count>
struct Nibbles {
  static constexpr int kSteps = 8, kScales = scale_count;
  Table table;

  inline void set(const float* scales, const float* levels) {
    for (int i = 0; i < Table::kParts; ++i) {
      table.part[i] = load(levels + i * LANES) * all(scales[0]);
      for (int s = 1; s < kScales; ++s) table.part[i] += load(levels + s * 16 + i * LANES) * all(scales[s]);
    }
  }
  inline Floats at(Words word, int j, const float*) const { return table[word >> (4 * j)]; }
};

// Codes of eight bits, four to a word.
//
// One power of two: the sign and the exponent field of a float32 less its highest bit, 0 standing for 0.
struct Power {
  static constexpr int kSteps = 4, kScales = 1;
  Floats scale;

  inline void set(const float* scales, const float*) { scale = all(scales[0]); }
  inline Floats at(Words word, int j, const float*) const {
    const Words top = word << (24 - 8 * j);
    const Words sign = top & (std::int32_t)0x80000000, exponent = (top >> 1) & 0x3f800000;
    return as_floats(sign | exponent) * scale;
  }
};

// The sum of two powers of two: four bits choose the one, three the other, the highest is the sign.
struct TwoPowers {
  static constexpr int kSteps = 4, kScales = 1;
  Table first, second;

  inline void set(const float* scales, const float* levels) {
    for (int i = 0; i < Table::kParts; ++i) {
      first.part[i] = load(levels + i * LANES) * all(scales[0]);
      second.part[i] = load(levels + 16 + i * LANES) * all(scales[0]);
    }
  }
  inline Floats at(Words word, int j, const float*) const {
    const Words sign = (word << (24 - 8 * j)) & (std::int32_t)0x80000000;
    const Floats magnitude = first[word >> (8 * j)] + second[word >> (8 * j + 4)];
    return as_floats(as_words(magnitude) ^ sign);
  }
};

// Any book, by a look-up in memory for each weight.
struct List {
  static constexpr int kSteps = 4, kScales = 1;
  Floats scale;

  inline void set(const float* scales, const float*) { scale = all(scales[0]); }
  inline Floats at(Words word, int j, const float* levels) const {
    float found[LANES];
    for (int i = 0; i < LANES; ++i) found[i] = levels[(word[i] >> (8 * j)) & 255];
    return load(found) * scale;
  }
};

struct Linear {
  std::int64_t rows, columns, group;
  std::int64_t groups() const { return (columns + group - 1) / group; }
};

// The outputs of one tile of rows for T tokens. `x` is filled with zeros to whole words.
template <typename Codes, int T, bool whole_words>
void tile(const Linear& layer, const float* x, std::int64_t width, const std::int32_t* words, const float* scales,
          const float* levels, std::int64_t first_row, float* y) {
  constexpr int kSpan = Codes::kSteps * LANES;
  const std::int64_t words_wide = width / kSpan, groups = layer.groups();
  const std::int64_t per = std::max<std::int64_t>(layer.group / (whole_words ? kSpan : LANES), 1);
  constexpr int kSums = T == 1 ? 2 : 1;  // one sum of each row would wait for its last multiply-add
  Codes codes[kRows];
  Floats total[kRows][T][kSums] = {};
  std::int64_t left = 0, group = 0;

  auto next_group = [&] {
    const std::int64_t g = std::min(group++, groups - 1);
    for (int r = 0; r < kRows; ++r) codes[r].set(scales + (g * kRows + r) * Codes::kScales, levels);
    left = per;
  };

  for (std::int64_t b = 0; b < words_wide; ++b) {
    if (whole_words && left-- == 0) next_group(), --left;
    Words word[kRows];
    for (int r = 0; r < kRows; ++r) {
      const std::int32_t* from = words + (b * kRows + r) * LANES;
      __builtin_prefetch((const char*)from + kAhead);
      word[r] = get<Words>(from);
    }
    each<Codes::kSteps>([&](auto j) {
      if (!whole_words && left-- == 0) next_group(), --left;
      Floats given[T];
      for (int t = 0; t < T; ++t) given[t] = load(x + t * width + b * kSpan + j * LANES);
      for (int r = 0; r < kRows; ++r) {
        const Floats weight = codes[r].at(word[r], j, levels);
        for (int t = 0; t < T; ++t) total[r][t][j % kSums] += weight * given[t];
      }
    });
  }
  const int there = (int)std::min<std::int64_t>(kRows, layer.rows - first_row);
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < there; ++r) y[t * layer.rows + first_row + r] = sum(kSums > 1 ? total[r][t][0] + total[r][t][kSums - 1] : total[r][t][0]);
}

template <typename Codes, bool whole_words>
void rows(const Linear& layer, std::int64_t tokens, const float* x, std::int64_t width, const std::int32_t* words,
          const float* scales, const float* levels, std::int64_t number, float* y) {
  constexpr int kSpan = Codes::kSteps * LANES;
  words += number * (width / kSpan) * kRows * LANES;
  scales += number * layer.groups() * kRows * Codes::kScales;
  std::int64_t t = 0;
  auto chunk = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    for (; t + kSize <= tokens; t += kSize)
      tile<Codes, kSize, whole_words>(layer, x + t * width, width, words, scales, levels, number * kRows,
                                        y + t * layer.rows);
  };
  chunk(std::integral_constant<int, 4>());
  chunk(std::integral_constant<int, 1>());
}

using Rows = void (*)(const Linear&, std::int64_t, const float*, std::int64_t, const std::int32_t*, const float*,
                      const float*, std::int64_t, float*);

template <bool whole_words>
Rows rows_of(std::int64_t kind) {
  switch (kind) {
    case kBook: return rows<Nibbles<1>, whole_words>;
    case kBinary: return rows<Nibbles<4>, whole_words>;
    case kPower: return rows<Power, whole_words>;
    case kTwoPowers: return rows<TwoPowers, whole_words>;
    case kList: return rows<List, whole_words>;
    default: return nullptr;
  }
}

// -- integers ---------------------------------------------------------------------------------------------------------

// Weights are whole numbers, activations are rounded to whole numbers from -127 to 127, token by token, and raised by
// 128, as VPDPBUSD wants one operand without sign; what that adds to a sum is known when the weights are packed.
// Weights lie as [rows / 64][columns / 4][64][4]: the lanes of a vector are outputs, four inputs each.

constexpr int kPanel = 64;   // outputs of a panel
constexpr int kWidth = 4;    // inputs that one instruction takes
constexpr int kRaised = 128;

#if defined(__AVX512VNNI__)
constexpr int kSums = 16, kTokens = 6;
#else
constexpr int kSums = 8, kTokens = 1;
#endif
typedef std::int32_t Sums __attribute__((vector_size(4 * kSums)));

// Adds to each sum the products of four bytes without sign and four with one. Exact: no step of it saturates.
inline Sums dot(Sums total, Sums x, Sums w) {
#if defined(__AVX512VNNI__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)total, (__m512i)x, (__m512i)w);
#elif defined(__AVXVNNI__)
  return (Sums)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)x, (__m256i)w);
#elif defined(__AVX2__)
  // By pairs of 16 bits, of even and of odd bytes; VPMADDUBSW would saturate.
  const __m256i even = _mm256_madd_epi16((__m256i)(x & 0x00ff00ff), _mm256_srai_epi16((__m256i)(w << 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)x, 8), _mm256_srai_epi16((__m256i)w, 8));
  return total + (Sums)even + (Sums)odd;
#else
  for (int byte = 0; byte < 4; ++byte) total += ((x >> (8 * byte)) & 255) * ((w << (24 - 8 * byte)) >> 24);
  return total;
#endif
}

// Sums of T tokens and one panel. `x`: uint8 [T, width], `w`: int8 [width / 4, 64, 4]; `there` outputs are wanted.
template <int T>
void panel(const std::uint8_t* x, std::int64_t width, const std::int8_t* w, const std::int32_t* correction,
           const float* scale, const float* step, std::int64_t there, float* y, std::int64_t stride) {
  constexpr int kVectors = kPanel / kSums;
  typedef float Results __attribute__((vector_size(sizeof(Sums))));
  Sums total[T][kVectors];
  each<T>([&](auto t) {
    each<kVectors>([&](auto v) { total[t][v] = get<Sums>(correction + v * kSums); });
  });
  for (std::int64_t k = 0; k < width / kWidth; ++k) {
    Sums weight[kVectors];
    each<kVectors>([&](auto v) { weight[v] = get<Sums>(w + (k * kPanel + v * kSums) * kWidth); });
    each<T>([&](auto t) {
      const Sums given = Sums{} + get<std::int32_t>(x + t * width + k * kWidth);
      each<kVectors>([&](auto v) { total[t][v] = dot(total[t][v], given, weight[v]); });
    });
  }
  std::int32_t sums[T][kPanel];
  each<T>([&](auto t) {
    each<kVectors>([&](auto v) { put(sums[t] + v * kSums, total[t][v]); });
  });
  for (int t = 0; t < T; ++t) {
    float result[kPanel];
    for (int v = 0; v < kVectors; ++v) {
      const Results one = __builtin_convertvector(get<Sums>(sums[t] + v * kSums), Results);
      put(result + v * kSums, one * get<Results>(scale + v * kSums) * step[t]);
    }
    std::memcpy(y + t * stride, result, there * sizeof(float));
  }
}

// Whole numbers of one token, raised; returns the step.
float quantise(const float* x, std::int64_t columns, std::uint8_t* out, std::int64_t width) {
  Floats most = {};
  std::int64_t i = 0;
  for (; i + LANES <= columns; i += LANES) {
    const Floats size = as_floats(as_words(load(x + i)) & 0x7fffffff);
    most = size > most ? size : most;
  }
  float lanes[LANES], top = 0;
  store(lanes, most);
  for (float one : lanes) top = std::max(top, one);
  for (; i < columns; ++i) top = std::max(top, std::fabs(x[i]));
  const float factor = top > 0 ? 127.0f / top : 0.0f;
  // Adding 1.5 * 2^23 rounds to whole numbers, half to even, and leaves them in the lowest bits.
  constexpr float kMagic = 12582912.0f;
  for (i = 0; i < columns; ++i) {
    const float shifted = x[i] * factor + kMagic;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    out[i] = (std::uint8_t)(bits + kRaised);
  }
  std::memset(out + columns, kRaised, width - columns);
  return top / 127.0f;
}

// -- attention --------------------------------------------------------------------------------------------------------

// Angular attention of one head: y = r / |r|, r = v / 2 + b(q) (b(k)^T v) / pi, with additions alone in the products.
//
// Of every four rows that may be added, the 16 sums are formed once; four bits choose one. As many sums are held as the
// first cache does: those of some rows of v, then those of some columns of b(k)^T v. `x / |x| > t` is `x > t |x|`.

constexpr int kQuad = 4, kSubsets = 16;
constexpr std::int64_t kTable = 32 << 10;  // bytes of sums that are held

// Vectors that lie in one line of the cache are loaded twice as fast as those that lie in two.
struct alignas(64) Line {
  float at[16];
};

// The sums of four rows, `stride` floats after each other.
template <int V>
inline void subsets(const float* const rows[kQuad], float* out, std::int64_t stride) {
  each<V>([&](auto v) {
    Floats low[4], high[4];
    low[0] = high[0] = Floats{};
    for (int i = 0; i < 2; ++i) low[1 + i] = load(rows[i] + v * LANES), high[1 + i] = load(rows[2 + i] + v * LANES);
    low[3] = low[1] + low[2];
    high[3] = high[1] + high[2];
    each<kSubsets>([&](auto j) { store(out + j * stride + v * LANES, low[j % 4] + high[j / 4]); });
  });
}

inline float length(const float* x, std::int64_t inner) {
  Floats squares = {};
  std::int64_t i = 0;
  for (; i + LANES <= inner; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < inner; ++i) total += x[i] * x[i];
  return std::sqrt(total);
}

// Which components of four tokens exceed their limits, as a bit of a number for each: [inner].
void above(const float* const x[kQuad], const float limits[kQuad], std::int64_t inner, std::uint8_t* out) {
  typedef std::uint8_t Bytes __attribute__((vector_size(LANES)));
  std::int64_t d = 0;
  for (; d + LANES <= inner; d += LANES) {
    Words marks = {};
    each<kQuad>([&](auto i) { marks |= (load(x[i] + d) > all(limits[i])) & (1 << i); });
    put(out + d, __builtin_convertvector(marks, Bytes));
  }
  for (; d < inner; ++d) {
    out[d] = 0;
    for (int i = 0; i < kQuad; ++i) out[d] |= (x[i][d] > limits[i]) << i;
  }
}

// Which components of a token exceed a limit, four to a number: [inner / 4]. `bits`: zeros from inner on.
void above(const float* x, float limit, std::int64_t inner, std::uint8_t* bits, std::uint8_t* out) {
  typedef std::uint8_t Bytes __attribute__((vector_size(LANES)));
  std::int64_t d = 0;
  for (; d + LANES <= inner; d += LANES) put(bits + d, __builtin_convertvector((load(x + d) > all(limit)) & 1, Bytes));
  for (; d < inner; ++d) bits[d] = x[d] > limit;
  for (d = 0; d < inner; d += kQuad) out[d / kQuad] = get<std::uint32_t>(bits + d) * 0x01020408u >> 24;
}

template <int V>
void angular(const float* q, const float* k, const float* v, float q_limit, float k_limit, std::int64_t tokens,
             std::int64_t inner, float* y) {
  constexpr int kOuter = V * LANES;
  constexpr std::int64_t kHeld = std::max<std::int64_t>(1, kTable / (4 * kSubsets * kOuter));
  static thread_local std::vector<Line> lines;
  static thread_local std::vector<std::uint8_t> bytes;
  const std::int64_t parts = (inner + kQuad - 1) / kQuad, wide = parts * kQuad, quads = (tokens + kQuad - 1) / kQuad;
  int columns = V;  // vectors of b(k)^T v whose sums are held
  while (columns > 1 && 4 * parts * kSubsets * columns * LANES > kTable) columns /= 2;
  const std::int64_t size = (wide + std::max(kHeld, parts) * kSubsets) * kOuter + quads * kQuad * LANES;
  lines.resize(size * sizeof(float) / sizeof(Line) + 1);
  bytes.resize(kHeld * wide + wide + quads * kQuad * parts);
  float* __restrict const state = lines.data()->at;
  float* __restrict const squares = state + wide * kOuter;
  float* __restrict const sums = squares + quads * kQuad * LANES;
  std::uint8_t* __restrict const given = bytes.data();
  std::uint8_t* __restrict const bits = given + kHeld * wide;
  std::uint8_t* __restrict const asked = bits + wide;
  std::fill(state, squares + quads * kQuad * LANES, 0.0f);
  std::fill(given, asked + quads * kQuad * parts, std::uint8_t(0));
  auto row = [=](std::int64_t token) { return std::min(token, tokens - 1); };

  for (std::int64_t first = 0; first < quads; first += kHeld) {
    const std::int64_t there = std::min(kHeld, quads - first);
    for (std::int64_t p = 0; p < there; ++p) {
      const float *keys[kQuad], *values[kQuad];
      float limits[kQuad];
      for (int i = 0; i < kQuad; ++i) {
        const std::int64_t token = (first + p) * kQuad + i;
        keys[i] = k + row(token) * inner;
        values[i] = v + row(token) * kOuter;
        limits[i] = token < tokens ? length(keys[i], inner) * k_limit : HUGE_VALF;
      }
      above(keys, limits, inner, given + p * wide);
      subsets<V>(values, sums + p * kSubsets * kOuter, kOuter);
    }
    for (std::int64_t d = 0; d < inner; ++d) {
      Floats total[V];
      each<V>([&](auto c) { total[c] = load(state + d * kOuter + c * LANES); });
      for (std::int64_t p = 0; p < there; ++p) {
        const float* one = sums + (p * kSubsets + given[p * wide + d]) * kOuter;
        each<V>([&](auto c) { total[c] += load(one + c * LANES); });
      }
      each<V>([&](auto c) { store(state + d * kOuter + c * LANES, total[c]); });
    }
  }
  for (std::int64_t t = 0; t < tokens; ++t)
    above(q + t * inner, length(q + t * inner, inner) * q_limit, inner, bits, asked + t * parts);

  auto ask = [&](auto size, std::int64_t from) {
    constexpr int kColumns = decltype(size)::value;
    constexpr std::int64_t kStride = kColumns * LANES;
    for (std::int64_t p = 0; p < parts; ++p) {
      const float* rows[kQuad];
      for (int i = 0; i < kQuad; ++i) rows[i] = state + (p * kQuad + i) * kOuter + from;
      subsets<kColumns>(rows, sums + p * kSubsets * kStride, kStride);
    }
    for (std::int64_t t = 0; t < tokens; t += kQuad) {
      Floats near[kQuad][kColumns] = {};
      for (std::int64_t p = 0; p < parts; ++p)
        each<kQuad>([&](auto i) {
          const float* one = sums + (p * kSubsets + asked[(t + i) * parts + p]) * kStride;
          each<kColumns>([&](auto c) { near[i][c] += load(one + c * LANES); });
        });
      each<kQuad>([&](auto i) {
        if (t + i >= tokens) return;
        Floats total = load(squares + (t + i) * LANES);
        each<kColumns>([&](auto c) {
          const std::int64_t at = (t + i) * kOuter + from + c * LANES;
          const Floats raw = load(v + at) * all(0.5f) + near[i][c] * all(0.31830987f);
          total += raw * raw;
          store(y + at, raw);
        });
        store(squares + (t + i) * LANES, total);
      });
    }
  };
  for (std::int64_t from = 0; from < kOuter; from += columns * LANES) {
    if (columns == V)
      ask(std::integral_constant<int, V>(), from);
    else if (columns * 2 == V)
      ask(std::integral_constant<int, std::max(1, V / 2)>(), from);
    else if (columns * 4 == V)
      ask(std::integral_constant<int, std::max(1, V / 4)>(), from);
    else
      ask(std::integral_constant<int, 1>(), from);
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Floats scale = all(1.0f / std::sqrt(sum(load(squares + t * LANES))));
    each<V>([&](auto c) { store(y + t * kOuter + c * LANES, load(y + t * kOuter + c * LANES) * scale); });
  }
}

using Angular = void (*)(const float*, const float*, const float*, float, float, std::int64_t, std::int64_t, float*);

Angular angular_of(std::int64_t outer) {
  switch (outer) {
    case LANES: return angular<1>;
    case 2 * LANES: return angular<2>;
    case 4 * LANES: return angular<4>;
    case 8 * LANES: return angular<8>;
    default: return nullptr;
  }
}

// -- operators --------------------------------------------------------------------------------------------------------

constexpr std::size_t kMostExtents = 16;

struct Extents {
  std::int64_t at[kMostExtents];
  std::size_t rank;
};

#define TRY(expression) \
  if (ort::Status* status = (expression)) return status

struct Kernel {
  const ort::Api* api;

  ort::Status* read(const ort::Context* context, std::size_t index, const void** data) const {
    const ort::Value* value;
    TRY(api->input(context, index, &value));
    return api->data(const_cast<ort::Value*>(value), const_cast<void**>(data));
  }
  ort::Status* read(const ort::Context* context, std::size_t index, const void** data, Extents* extents) const {
    const ort::Value* value;
    ort::Shape* shape;
    TRY(api->input(context, index, &value));
    TRY(api->shape(value, &shape));
    ort::Status* failed = api->rank(shape, &extents->rank);
    if (!failed && extents->rank > kMostExtents) failed = api->fail("an input has more than 16 axes");
    if (!failed) failed = api->extents(shape, extents->at, extents->rank);
    api->release(shape);
    TRY(failed);
    return api->data(const_cast<ort::Value*>(value), const_cast<void**>(data));
  }
  ort::Status* write(ort::Context* context, const Extents& extents, float** data) const {
    ort::Value* value;
    TRY(api->output(context, 0, extents.at, extents.rank, &value));
    return api->data(value, (void**)data);
  }
  template <typename Work>
  ort::Status* share(const ort::Context* context, std::int64_t count, const Work& work) const {
    auto one = [](void* user, std::size_t i) { (*static_cast<const Work*>(user))((std::int64_t)i); };
    return api->parallel(context, one, (std::size_t)count, const_cast<Work*>(&work));
  }
};

// What all layers do about their activations: tokens along the last axis, or the pixels of an image.
struct Layer : Kernel {
  Linear linear;
  std::int64_t conv, stride_h, stride_w;

  ort::Status* read_attributes(const ort::Info* info) {
    TRY(api->attribute(info, "rows", &linear.rows));
    TRY(api->attribute(info, "columns", &linear.columns));
    TRY(api->attribute(info, "conv", &conv));
    TRY(api->attribute(info, "stride_h", &stride_h));
    TRY(api->attribute(info, "stride_w", &stride_w));
    if (linear.rows < 1 || linear.columns < 1 || stride_h < 1 || stride_w < 1)
      return api->fail("a layer of coded weights has an attribute below 1");
    return nullptr;
  }

  // The shape of the result, and how many tokens there are.
  ort::Status* plan(const Extents& in, Extents* out, std::int64_t* tokens) const {
    if (in.rank < (conv ? 4u : 1u) || (conv && in.rank != 4) || in.at[conv ? 1 : in.rank - 1] != linear.columns)
      return api->fail("the input does not have as many columns as the coded weights");
    *out = in;
    if (conv) {
      out->at[1] = linear.rows;
      out->at[2] = (in.at[2] + stride_h - 1) / stride_h;
      out->at[3] = (in.at[3] + stride_w - 1) / stride_w;
      *tokens = out->at[0] * out->at[2] * out->at[3];
      return nullptr;
    }
    out->at[in.rank - 1] = linear.rows;
    *tokens = 1;
    for (std::size_t i = 0; i + 1 < in.rank; ++i) *tokens *= in.at[i];
    return nullptr;
  }

  // A token's columns: those of pixel (h, w) of image n, gathered.
  void gather(const float* x, const Extents& in, const Extents& out, std::int64_t token, float* to) const {
    const std::int64_t w = token % out.at[3], h = token / out.at[3] % out.at[2], n = token / out.at[3] / out.at[2];
    const std::int64_t area = in.at[2] * in.at[3];
    const float* from = x + n * linear.columns * area + h * stride_h * in.at[3] + w * stride_w;
    for (std::int64_t c = 0; c < linear.columns; ++c) to[c] = from[c * area];
  }

  // Results of all pixels, [tokens, rows], into an image.
  void scatter(const float* from, const Extents& out, std::int64_t row, float* y) const {
    const std::int64_t area = out.at[2] * out.at[3];
    for (std::int64_t n = 0; n < out.at[0]; ++n)
      for (std::int64_t p = 0; p < area; ++p)
        y[(n * linear.rows + row) * area + p] = from[(n * area + p) * linear.rows + row];
  }
};

struct CodedKernel : Layer {
  std::int64_t kind, span;
  Rows run;

  ort::Status* create(const ort::Info* info) {
    TRY(read_attributes(info));
    TRY(api->attribute(info, "group", &linear.group));
    TRY(api->attribute(info, "kind", &kind));
    span = (kind == kBook || kind == kBinary ? 8 : 4) * LANES;
    const bool one = linear.group >= linear.columns;
    if (linear.group < 1 || (!one && linear.group % LANES))
      return api->fail("groups of coded weights must be whole vectors");
    if (one) linear.group = (linear.columns + span - 1) / span * span;
    run = linear.group % span ? rows_of<false>(kind) : rows_of<true>(kind);
    return run ? nullptr : api->fail("there is no such kind of coded weights");
  }

  ort::Status* compute(ort::Context* context) const {
    const void *x, *words, *scales, *levels;
    Extents in, out;
    std::int64_t tokens;
    float* y;
    TRY(read(context, 0, &x, &in));
    TRY(read(context, 1, &words));
    TRY(read(context, 2, &scales));
    TRY(read(context, 3, &levels));
    TRY(plan(in, &out, &tokens));
    TRY(write(context, out, &y));
    static thread_local std::vector<float> filled, result;
    const std::int64_t columns = linear.columns, width = (columns + span - 1) / span * span;
    const float* given = (const float*)x;
    const bool pixels = conv && in.at[2] * in.at[3] != 1;
    if (pixels || width != columns) {
      filled.resize(tokens * width);
      float* to = filled.data();
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (pixels)
          gather((const float*)x, in, out, t, to + t * width);
        else
          std::memcpy(to + t * width, given + t * columns, columns * sizeof(float));
        std::fill(to + t * width + columns, to + (t + 1) * width, 0.0f);
      }
      given = to;
    }
    if (pixels) result.resize(tokens * linear.rows);
    float* target = pixels ? result.data() : y;
    TRY(share(context, (linear.rows + kRows - 1) / kRows, [=, this](std::int64_t number) {
      run(linear, tokens, given, width, (const std::int32_t*)words, (const float*)scales, (const float*)levels, number,
          target);
    }));
    if (!pixels) return nullptr;
    return share(context, linear.rows, [=, this](std::int64_t row) { scatter(target, out, row, y); });
  }
};

struct IntegerKernel : Layer {
  ort::Status* create(const ort::Info* info) { return read_attributes(info); }

  ort::Status* compute(ort::Context* context) const {
    const void *x, *packed, *scales, *corrections;
    Extents in, out;
    std::int64_t tokens;
    float* y;
    TRY(read(context, 0, &x, &in));
    TRY(read(context, 1, &packed));
    TRY(read(context, 2, &scales));
    TRY(read(context, 3, &corrections));
    TRY(plan(in, &out, &tokens));
    TRY(write(context, out, &y));
    static thread_local std::vector<std::uint8_t> numbers;
    static thread_local std::vector<float> steps, one, result;
    const std::int64_t columns = linear.columns, n = linear.rows, width = (columns + kWidth - 1) / kWidth * kWidth;
    const bool pixels = conv && in.at[2] * in.at[3] != 1;
    numbers.resize(tokens * width), steps.resize(tokens), one.resize(columns);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* token = (const float*)x + t * columns;
      if (pixels) gather((const float*)x, in, out, t, one.data()), token = one.data();
      steps[t] = quantise(token, columns, numbers.data() + t * width, width);
    }
    if (pixels) result.resize(tokens * n);
    float* target = pixels ? result.data() : y;
    const std::uint8_t* given = numbers.data();
    const float* step = steps.data();
    TRY(share(context, (n + kPanel - 1) / kPanel, [=](std::int64_t number) {
      const std::int8_t* weight = (const std::int8_t*)packed + number * kPanel * width;
      const float* scale = (const float*)scales + number * kPanel;
      const std::int32_t* correction = (const std::int32_t*)corrections + number * kPanel;
      const std::int64_t there = std::min<std::int64_t>(kPanel, n - number * kPanel);
      std::int64_t t = 0;
      for (; t + kTokens <= tokens; t += kTokens)
        panel<kTokens>(given + t * width, width, weight, correction, scale, step + t, there,
                       target + t * n + number * kPanel, n);
      for (; t < tokens; ++t)
        panel<1>(given + t * width, width, weight, correction, scale, step + t, there, target + t * n + number * kPanel,
                 n);
    }));
    if (!pixels) return nullptr;
    return share(context, n, [=, this](std::int64_t row) { scatter(target, out, row, y); });
  }
};

struct AngularKernel : Kernel {
  ort::Status* create(const ort::Info*) { return nullptr; }

  ort::Status* compute(ort::Context* context) const {
    const void *q, *k, *v, *q_limit, *k_limit;
    Extents of_q, of_k, of_v;
    float* y;
    TRY(read(context, 0, &q, &of_q));
    TRY(read(context, 1, &k, &of_k));
    TRY(read(context, 2, &v, &of_v));
    TRY(read(context, 3, &q_limit));
    TRY(read(context, 4, &k_limit));
    const std::size_t rank = of_v.rank;
    if (rank < 2 || of_q.rank != rank || of_k.rank != rank || std::memcmp(of_q.at, of_k.at, rank * sizeof of_q.at[0]) ||
        std::memcmp(of_q.at, of_v.at, (rank - 1) * sizeof of_q.at[0]))
      return api->fail("queries, keys and values of angular attention do not fit each other");
    const std::int64_t outer = of_v.at[rank - 1], inner = of_q.at[rank - 1], tokens = of_v.at[rank - 2];
    const Angular run = angular_of(outer);
    if (!run) return api->fail("values of angular attention must be 1, 2, 4 or 8 vectors wide");
    std::int64_t heads = 1;
    for (std::size_t i = 0; i + 2 < rank; ++i) heads *= of_v.at[i];
    TRY(write(context, of_v, &y));
    return share(context, heads, [=](std::int64_t head) {
      run((const float*)q + head * tokens * inner, (const float*)k + head * tokens * inner,
          (const float*)v + head * tokens * outer, *(const float*)q_limit, *(const float*)k_limit, tokens, inner,
          y + head * tokens * outer);
    });
  }
};

template <typename Made>
struct Registered : ort::Operator {
  const char* called;
  std::vector<ort::Type> types;

  Registered(const char* title, std::vector<ort::Type> inputs_of) : ort::Operator{}, called(title), types(inputs_of) {
    using Own = const Registered;
    version = ort::kVersion;
    name = [](const ort::Operator* self) { return static_cast<Own*>(self)->called; };
    provider = [](const ort::Operator*) -> const char* { return nullptr; };
    inputs = [](const ort::Operator* self) { return static_cast<Own*>(self)->types.size(); };
    input_type = [](const ort::Operator* self, std::size_t i) { return static_cast<Own*>(self)->types[i]; };
    outputs = [](const ort::Operator*) { return std::size_t(1); };
    output_type = [](const ort::Operator*, std::size_t) { return ort::kFloat; };
    input_kind = output_kind = [](const ort::Operator*, std::size_t) { return 0; };
    input_memory = [](const ort::Operator*, std::size_t) { return 0; };
    create = [](const ort::Operator*, const ort::Api* api, const ort::Info* info, void** kernel) -> ort::Status* {
      Made* made = new Made();
      made->api = api;
      if (ort::Status* failed = made->create(info)) {
        delete made;
        return failed;
      }
      *kernel = made;
      return nullptr;
    };
    compute = [](void* kernel, ort::Context* context) { return static_cast<const Made*>(kernel)->compute(context); };
    destroy = [](void* kernel) { delete static_cast<Made*>(kernel); };
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options,
                                                                                 const ort::ApiBase* base) {
  static const ort::Api* api = base->get(ort::kVersion);
  static Registered<CodedKernel> coded("CodedLayer", {ort::kFloat, ort::kInt32, ort::kFloat, ort::kFloat});
  static Registered<IntegerKernel> integer("IntegerLayer", {ort::kFloat, ort::kInt8, ort::kFloat, ort::kInt32});
  static Registered<AngularKernel> attention("AngularAttention",
                                             {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat});
  static ort::Domain* domain = nullptr;  // lives as long as sessions may
  if (!domain) {
    TRY(api->create_domain("ai.edgecompile.ort", &domain));
    TRY(api->add_operator(domain, &coded));
    TRY(api->add_operator(domain, &integer));
    TRY(api->add_operator(domain, &attention));
  }
  return api->add_domain(options, domain);
}
