// Kernels of ONNX Runtime for coded weights and angular attention, in domain ai.edgecompile.ort.
//
// targets/ort_custom.py writes the nodes and packs their constants; the kinds and layouts below are agreed with it.
// LANES (16 or 8) floats make a vector. Everything is written with the compiler's vector extensions; what needs an
// instruction of its own is guarded by the macro of its feature, with a portable form beside it.
//
// What is read of the weights is one stream, a tile of rows (outputs) after the other, asked for well ahead.

#include "ort_api.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef LANES
#error "LANES is to be defined as 16 or 8"
#endif

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef std::int32_t Words __attribute__((vector_size(4 * LANES)));

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

// Less zero is nothing to compute; plus zero would be, as it makes 0 of -0.
inline Floats all(float value) { return value - Floats{}; }

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

// All lanes combined, the lower half with the upper one, and so on.
template <typename Combine>
inline float halved(Floats values, Combine combine) {
  float half[LANES];
  std::memcpy(half, &values, sizeof values);
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) half[i] = combine(half[i], half[i + n]);
  return half[0];
}

inline float sum(Floats values) {
#if defined(__AVX512F__) && LANES == 16
  return _mm512_reduce_add_ps((__m512)values);
#else
  return halved(values, [](float a, float b) { return a + b; });
#endif
}

inline float largest(Floats values) {
#if defined(__AVX512F__) && LANES == 16
  return _mm512_reduce_max_ps((__m512)values);
#else
  return halved(values, [](float a, float b) { return std::max(a, b); });
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
#elif defined(__aarch64__) && LANES == 8
    const Words bytes = (number & 15) * 0x04040404 + 0x03020100;
    uint8x16x4_t held;
    uint8x16x2_t asked;
    std::memcpy(&held, part, sizeof held);
    std::memcpy(&asked, &bytes, sizeof asked);
    for (uint8x16_t& one : asked.val) one = vqtbl4q_u8(held, one);
    return get<Floats>(&asked);
#else
    float held[16], found[LANES];
    std::memcpy(held, part, sizeof held);
    for (int i = 0; i < LANES; ++i) found[i] = held[number[i] & 15];
    return load(found);
#endif
  }
};

// Sums of each output for T tokens: with one, an addition would wait for the last. Registers of 16 lanes are 32, others
// may be 16, which hold no more.
template <int T>
constexpr int kSums = T == 1 && LANES == 16 ? 2 : 1;

// Vectors that lie in one line of the cache are loaded twice as fast as those that lie in two.
struct alignas(64) Line {
  float at[16];
};

struct Linear {
  std::int64_t rows, columns, group;
  std::int64_t groups() const { return (columns + group - 1) / group; }
};

// -- books of 16 levels -----------------------------------------------------------------------------------------------

// Rows lie in the lanes: a word of 32 bits holds the codes of eight columns of one row, the low halves of its bytes
// those of columns 0 to 3. Words lie as [rows / tile][columns / 8][tile], scales as [rows / tile][groups][tile].

constexpr int kVectors = 4, kTile = kVectors * LANES;  // rows of a tile
constexpr int kColumns = 8;                            // of a word
constexpr int kTokens = LANES == 16 ? 4 : 2;           // whose sums of a tile registers hold

// Look-ups of 16 lanes cost little next to what kTokens multiply. Of 8 lanes they cost as much, so that weights which
// fit the second cache are unpacked for many tokens.
constexpr int kTokensUnpacked = 3;  // as kTokens
constexpr std::int64_t kMany = 2 * kTokensUnpacked;  // tokens at least
constexpr std::size_t kUnpacked = 512 << 10;  // bytes at most

// Levels and activations as they are.
struct Numbers {
  typedef float Given;
  typedef Floats Sums;
  static constexpr int kSteps = 8;
  Table table;

  explicit Numbers(const void* levels) { std::memcpy(table.part, levels, sizeof table.part); }
  static Sums start(std::int32_t) { return Sums{}; }
  static Floats end(Sums sums) { return sums; }
  inline Floats at(Words word, int j) const { return table[word >> (4 * j)]; }
  static inline Sums add(Sums total, Floats weight, const float* x, int j) {
    return total + weight * all(x[j / 2 + j % 2 * 4]);
  }
};

// Levels are whole numbers up to 64 in magnitude, raised by 64; activations are whole numbers up to 127 in magnitude.
// Two products of such bytes do not exceed 2 * 128 * 127 < 2^15, so that no instruction saturates.
struct Integers {
  typedef std::int8_t Given;
  typedef Words Sums;
  static constexpr int kSteps = 2, kRaised = 64;
  typedef std::uint8_t Bytes __attribute__((vector_size(16)));
  Bytes levels;

  explicit Integers(const void* from) : levels(get<Bytes>(from)) {}
  static Sums start(std::int32_t sum) { return Sums{} - kRaised * sum; }
  static Floats end(Sums sums) { return __builtin_convertvector(sums, Floats); }
  inline Words at(Words word, int j) const {
    const Words number = (word >> (4 * j)) & 0x0f0f0f0f;
#if defined(__AVX512BW__) && LANES == 16
    return (Words)_mm512_shuffle_epi8(_mm512_broadcast_i32x4((__m128i)levels), (__m512i)number);
#elif defined(__AVX2__) && LANES == 8
    return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)levels), (__m256i)number);
#elif defined(__aarch64__) && LANES == 8
    uint8x16x2_t asked;
    std::memcpy(&asked, &number, sizeof asked);
    for (uint8x16_t& one : asked.val) one = vqtbl1q_u8((uint8x16_t)levels, one);
    return get<Words>(&asked);
#else
    std::uint8_t held[16], found[4 * LANES];
    std::memcpy(held, &levels, sizeof held);
    std::memcpy(found, &number, sizeof found);
    for (std::uint8_t& one : found) one = held[one];
    return get<Words>(found);
#endif
  }
  static inline Sums add(Sums total, Words w, const std::int8_t* from, int j) {
    const Words x = Words{} + get<std::int32_t>(from + 4 * j);
#if defined(__AVX512VNNI__) && LANES == 16
    return (Words)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__) && LANES == 16
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
    return total + (Words)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__) && LANES == 8
    return (Words)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__) && LANES == 8
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    return total + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; ++byte) total += ((w >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24);
    return total;
#endif
  }
};

// Activations, [tokens, width], filled with zeros to whole words; where they are integers, also the sums of each group
// and the step of each token.
template <typename Kind>
struct Given {
  const typename Kind::Given* x;
  std::int64_t width;
  const std::int32_t* sums;
  const float* steps;
};

// Writes a tile's words as the weights that `Kind::add` takes, a vector for each step: what many tokens share.
template <typename Kind>
void unpack(const std::int32_t* words, const void* levels, std::int64_t width, std::int32_t* out) {
  const Kind kind(levels);
  for (std::int64_t column = 0; column < width; column += kColumns, words += kTile)
    each<Kind::kSteps>([&](auto j) {
      each<kVectors>([&](auto v) { put(out + v * LANES, kind.at(get<Words>(words + v * LANES), j)); });
      out += kTile;
    });
}

// The outputs of one tile for T tokens from `token` on. `words` may be `unpacked`.
template <typename Kind, int T, bool unpacked = false>
void outputs(const Linear& layer, const Given<Kind>& given, std::int64_t token, const std::int32_t* words,
             const float* scales, const void* levels, std::int64_t there, float* y) {
  const Kind kind(levels);
  const std::int64_t groups = layer.groups();
  float rest[T * kTile];
  float* const out = there == kTile ? y + token * layer.rows : rest;
  const std::int64_t stride = there == kTile ? layer.rows : kTile;
  for (std::int64_t group = 0, first = 0; group < groups; ++group) {
    typename Kind::Sums part[T][kVectors][kSums<T>] = {};
    each<T>([&](auto t) {
      const auto start = Kind::start(given.sums ? given.sums[(token + t) * groups + group] : 0);
      each<kVectors>([&](auto v) { part[t][v][0] = start; });
    });
    for (const std::int64_t end = std::min(first + layer.group, given.width); first < end; first += kColumns) {
      const auto* x = given.x + token * given.width + first;
      Words word[kVectors];
      if (!unpacked)
        each<kVectors>([&](auto v) {
          __builtin_prefetch((const char*)words + kAhead);
          word[v] = get<Words>(words);
          words += LANES;
        });
      each<Kind::kSteps>([&](auto j) {
        each<kVectors>([&](auto v) {
          typename Kind::Sums weight;
          if constexpr (unpacked)
            weight = get<typename Kind::Sums>(words + v * LANES);
          else
            weight = kind.at(word[v], j);
          each<T>([&](auto t) {
            part[t][v][j % kSums<T>] = Kind::add(part[t][v][j % kSums<T>], weight, x + t * given.width, j);
          });
        });
        if (unpacked) words += kTile;
      });
    }
    each<kVectors>([&](auto v) {
      const Floats scale = load(scales + (group * kVectors + v) * LANES);
      each<T>([&](auto t) {
        auto whole = part[t][v][0];
        if (kSums<T> > 1) whole += part[t][v][kSums<T> - 1];
        const Floats here = Kind::end(whole) * (given.steps ? scale * all(given.steps[token + t]) : scale);
        float* const to = out + t * stride + v * LANES;
        store(to, group ? load(to) + here : here);
      });
    });
  }
  if (out == rest)
    for (int t = 0; t < T; ++t)
      std::memcpy(y + (token + t) * layer.rows, rest + t * kTile, there * sizeof(float));
}

// Whole numbers of one token, and their sums over the groups; returns the step.
float quantise(const Linear& layer, const float* x, std::int8_t* out, std::int64_t width, std::int32_t* sums) {
  typedef std::int8_t Bytes __attribute__((vector_size(LANES)));
  Words most = {};  // bits of magnitudes, which have the order of these
  std::int64_t i = 0;
  for (; i + LANES <= layer.columns; i += LANES) {
    const Words size = as_words(load(x + i)) & 0x7fffffff;
    most = size > most ? size : most;
  }
  float top = largest(as_floats(most));
  for (; i < layer.columns; ++i) top = std::max(top, std::fabs(x[i]));
  const float factor = top > 0 ? 127.0f / top : 0.0f;
  // Adding 1.5 * 2^23 rounds to whole numbers, half to even, and leaves them in the lowest bits.
  constexpr float kMagic = 12582912.0f;
  constexpr std::int32_t kMagicBits = 0x4b400000;
  for (i = 0; i < layer.columns;) {
    const std::int64_t end = std::min(i + layer.group, layer.columns);
    Words total = {};
    for (; i + LANES <= end; i += LANES) {
      const Words number = as_words(load(x + i) * all(factor) + all(kMagic)) - kMagicBits;
      put(out + i, __builtin_convertvector(number, Bytes));
      total += number;
    }
    *sums = (std::int32_t)sum(__builtin_convertvector(total, Floats));
    for (; i < end; ++i) {
      const float shifted = x[i] * factor + kMagic;
      std::int32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      out[i] = (std::int8_t)(bits - kMagicBits);
      *sums += out[i];
    }
    ++sums;
  }
  std::fill(out + layer.columns, out + width, std::int8_t(0));
  return top / 127.0f;
}

// -- other codes ------------------------------------------------------------------------------------------------------

// Columns lie in the lanes: a word of 32 bits of each lane holds codes of columns that are LANES apart, so a step of
// LANES columns is one shift, what makes weights of codes, and one multiply-add for each token. Four rows make a tile.
constexpr int kRows = 4;

enum Kind { kBinary, kPower, kTwoPowers, kList };

// What codes stand for. `set` takes the scales of one row in one group; `at` gives the weights of step j of a word.
//
// Binary codes of four bits, eight to a word: the levels of a group are sums of four scales.
struct Binary {
  static constexpr int kSteps = 8, kScales = 4;
  Table table;

  inline void set(const float* scales, const float* levels) {
    each<Table::kParts>([&](auto i) {
      table.part[i] = Floats{};
      each<kScales>([&](auto s) { table.part[i] += load(levels + s * 16 + i * LANES) * all(scales[s]); });
    });
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
    each<Table::kParts>([&](auto i) {
      first.part[i] = load(levels + i * LANES) * all(scales[0]);
      second.part[i] = load(levels + 16 + i * LANES) * all(scales[0]);
    });
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

// The outputs of one tile of rows for T tokens. `x` is filled with zeros to whole words.
template <typename Codes, int T, bool whole_words>
void tile(const Linear& layer, const float* x, std::int64_t width, const std::int32_t* words, const float* scales,
          const float* levels, std::int64_t first_row, float* y) {
  constexpr int kSpan = Codes::kSteps * LANES;
  Codes codes[kRows];
  Floats total[kRows][T][kSums<T>] = {};

  auto next_group = [&] {
    each<kRows>([&](auto r) { codes[r].set(scales + r * Codes::kScales, levels); });
    scales += kRows * Codes::kScales;
  };
  auto span = [&](std::int64_t first) __attribute__((always_inline)) {
    Words word[kRows];
    each<kRows>([&](auto r) {
      __builtin_prefetch((const char*)words + kAhead);
      word[r] = get<Words>(words);
      words += LANES;
    });
    each<Codes::kSteps>([&](auto j) {
      const std::int64_t column = first + j * LANES;
      if (!whole_words && column % layer.group == 0 && column < layer.columns) next_group();
      Floats given[T];
      each<T>([&](auto t) { given[t] = load(x + t * width + column); });
      each<kRows>([&](auto r) {
        const Floats weight = codes[r].at(word[r], j, levels);
        each<T>([&](auto t) { total[r][t][j % kSums<T>] += weight * given[t]; });
      });
    });
  };
  for (std::int64_t first = 0; first < width;) {
    const std::int64_t end = whole_words ? std::min(first + layer.group, width) : width;
    if (whole_words) next_group();
    for (; first < end; first += kSpan) span(first);
  }
  each<kRows>([&](auto r) {
    if (first_row + r >= layer.rows) return;
    each<T>([&](auto t) {
      Floats whole = total[r][t][0];
      if (kSums<T> > 1) whole += total[r][t][kSums<T> - 1];
      y[t * layer.rows + first_row + r] = sum(whole);
    });
  });
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
  chunk(std::integral_constant<int, 2>());
  chunk(std::integral_constant<int, 1>());
}

using Rows = void (*)(const Linear&, std::int64_t, const float*, std::int64_t, const std::int32_t*, const float*,
                      const float*, std::int64_t, float*);

template <bool whole_words>
Rows rows_of(std::int64_t kind) {
  switch (kind) {
    case kBinary: return rows<Binary, whole_words>;
    case kPower: return rows<Power, whole_words>;
    case kTwoPowers: return rows<TwoPowers, whole_words>;
    case kList: return rows<List, whole_words>;
    default: return nullptr;
  }
}

// -- attention --------------------------------------------------------------------------------------------------------

// Angular attention of one head: y = r / |r|, r = v / 2 + b(q) (b(k)^T v) / pi, with additions alone in the products.
//
// Of every four rows that may be added, the 16 sums are formed once; four bits choose one. As many sums are held as the
// first cache does: those of some rows of v, then those of some columns of b(k)^T v. `x / |x| > t` is `x > t |x|`.

constexpr int kQuad = 4, kSubsets = 16;
constexpr std::int64_t kTable = 32 << 10;  // bytes of sums that are held

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

// Activations of a layer, a row of floats for each token, and where its results go.
struct Frame {
  Extents in, out;
  std::int64_t tokens;
  bool pixels;  // of an image of more than one: gathered before, scattered after
  const float* x;
  float *target, *y;
};

// What all layers do: tokens lie along the last axis, or are the pixels of an image.
struct Layer : Kernel {
  Linear linear;
  std::int64_t conv, stride_h, stride_w;

  ort::Status* read_attributes(const ort::Info* info) {
    TRY(api->attribute(info, "rows", &linear.rows));
    TRY(api->attribute(info, "columns", &linear.columns));
    TRY(api->attribute(info, "group", &linear.group));
    TRY(api->attribute(info, "conv", &conv));
    TRY(api->attribute(info, "stride_h", &stride_h));
    TRY(api->attribute(info, "stride_w", &stride_w));
    if (linear.rows < 1 || linear.columns < 1 || linear.group < 1 || stride_h < 1 || stride_w < 1)
      return api->fail("a layer of coded weights has an attribute below 1");
    return nullptr;
  }

  // Groups are of whole `unit`s of columns, or there is one, which is then filled to whole `word`s.
  ort::Status* fill_group(std::int64_t unit, std::int64_t word) {
    if (linear.group >= linear.columns)
      linear.group = filled(linear.columns, word);
    else if (linear.group % unit)
      return api->fail("groups of coded weights must be whole vectors");
    return nullptr;
  }

  static std::int64_t filled(std::int64_t size, std::int64_t of) { return (size + of - 1) / of * of; }

  // Finds the activations as `width` floats for each token, zeros after the columns.
  ort::Status* open(ort::Context* context, std::int64_t width, Frame* frame) const {
    static thread_local std::vector<float> wide, result;
    Extents &in = frame->in, &out = frame->out;
    TRY(read(context, 0, (const void**)&frame->x, &in));
    if (in.rank < (conv ? 4u : 1u) || (conv && in.rank != 4) || in.at[conv ? 1 : in.rank - 1] != linear.columns)
      return api->fail("the input does not have as many columns as the coded weights");
    out = in;
    frame->tokens = 1;
    if (conv) {
      out.at[1] = linear.rows;
      out.at[2] = (in.at[2] + stride_h - 1) / stride_h;
      out.at[3] = (in.at[3] + stride_w - 1) / stride_w;
      frame->tokens = out.at[0] * out.at[2] * out.at[3];
    } else {
      out.at[in.rank - 1] = linear.rows;
      for (std::size_t i = 0; i + 1 < in.rank; ++i) frame->tokens *= in.at[i];
    }
    TRY(write(context, out, &frame->y));
    frame->pixels = conv && in.at[2] * in.at[3] != 1;
    if (frame->pixels) result.resize(frame->tokens * linear.rows);
    frame->target = frame->pixels ? result.data() : frame->y;
    if (!frame->pixels && width == linear.columns) return nullptr;
    wide.resize(frame->tokens * width);
    for (std::int64_t t = 0; t < frame->tokens; ++t) {
      float* to = wide.data() + t * width;
      if (frame->pixels)
        gather(*frame, t, to);
      else
        std::memcpy(to, frame->x + t * linear.columns, linear.columns * sizeof(float));
      std::fill(to + linear.columns, to + width, 0.0f);
    }
    frame->x = wide.data();
    return nullptr;
  }

  // A token's columns: those of pixel (h, w) of image n.
  void gather(const Frame& frame, std::int64_t token, float* to) const {
    const Extents &in = frame.in, &out = frame.out;
    const std::int64_t w = token % out.at[3], h = token / out.at[3] % out.at[2], n = token / out.at[3] / out.at[2];
    const std::int64_t area = in.at[2] * in.at[3];
    const float* from = frame.x + n * linear.columns * area + h * stride_h * in.at[3] + w * stride_w;
    for (std::int64_t c = 0; c < linear.columns; ++c) to[c] = from[c * area];
  }

  // Makes images of the results, [tokens, rows].
  ort::Status* close(ort::Context* context, const Frame& frame) const {
    if (!frame.pixels) return nullptr;
    return share(context, linear.rows, [&, this](std::int64_t row) {
      const std::int64_t area = frame.out.at[2] * frame.out.at[3];
      for (std::int64_t n = 0; n < frame.out.at[0]; ++n)
        for (std::int64_t p = 0; p < area; ++p)
          frame.y[(n * linear.rows + row) * area + p] = frame.target[(n * area + p) * linear.rows + row];
    });
  }
};

template <typename Kind>
struct BookKernel : Layer {
  ort::Status* create(const ort::Info* info) {
    TRY(read_attributes(info));
    return fill_group(kColumns, kColumns);
  }

  ort::Status* compute(ort::Context* context) const {
    constexpr bool kIntegers = std::is_same_v<Kind, Integers>;
    static thread_local std::vector<std::int8_t> numbers;
    static thread_local std::vector<std::int32_t> sums;
    static thread_local std::vector<float> steps;
    const void *words, *scales, *levels;
    TRY(read(context, 1, &words));
    TRY(read(context, 2, &scales));
    TRY(read(context, 3, &levels));
    const std::int64_t width = filled(linear.columns, kColumns), groups = linear.groups();
    Frame frame;
    TRY(open(context, kIntegers ? linear.columns : width, &frame));
    Given<Kind> given;
    if constexpr (kIntegers) {
      numbers.resize(frame.tokens * width), sums.resize(frame.tokens * groups), steps.resize(frame.tokens);
      for (std::int64_t t = 0; t < frame.tokens; ++t)
        steps[t] = quantise(linear, frame.x + t * linear.columns, &numbers[t * width], width, &sums[t * groups]);
      given = {numbers.data(), width, sums.data(), steps.data()};
    } else {
      given = {frame.x, width, nullptr, nullptr};
    }
    TRY(share(context, filled(linear.rows, kTile) / kTile, [&, this](std::int64_t number) {
      const std::int32_t* from = (const std::int32_t*)words + number * kTile * (width / kColumns);
      const float* scale = (const float*)scales + number * kTile * groups;
      const std::int64_t first = number * kTile, there = std::min<std::int64_t>(kTile, linear.rows - first);
      std::int64_t t = 0;
      auto chunks = [&](auto most, auto unpacked) {
        each<most>([&](auto less) {
          constexpr int kSize = most - less;
          for (; t + kSize <= frame.tokens; t += kSize)
            outputs<Kind, kSize, unpacked>(linear, given, t, from, scale, levels, there, frame.target + first);
        });
      };
      if constexpr (LANES == 8) {
        static thread_local std::vector<Line> weights;
        const std::size_t bytes = width / kColumns * Kind::kSteps * kTile * sizeof(float);
        if (frame.tokens >= kMany && bytes <= kUnpacked) {
          weights.resize(bytes / sizeof(Line));
          unpack<Kind>(from, levels, width, (std::int32_t*)weights.data());
          from = (const std::int32_t*)weights.data();
          return chunks(std::integral_constant<int, kTokensUnpacked>(), std::true_type());
        }
      }
      chunks(std::integral_constant<int, kTokens>(), std::false_type());
    }));
    return close(context, frame);
  }
};

struct CodedKernel : Layer {
  std::int64_t kind, span;
  Rows run;

  ort::Status* create(const ort::Info* info) {
    TRY(read_attributes(info));
    TRY(api->attribute(info, "kind", &kind));
    span = (kind == kBinary ? 8 : 4) * LANES;
    TRY(fill_group(LANES, span));
    run = linear.group % span ? rows_of<false>(kind) : rows_of<true>(kind);
    return run ? nullptr : api->fail("there is no such kind of coded weights");
  }

  ort::Status* compute(ort::Context* context) const {
    const void *words, *scales, *levels;
    TRY(read(context, 1, &words));
    TRY(read(context, 2, &scales));
    TRY(read(context, 3, &levels));
    const std::int64_t width = filled(linear.columns, span);
    Frame frame;
    TRY(open(context, width, &frame));
    TRY(share(context, filled(linear.rows, kRows) / kRows, [&, this](std::int64_t number) {
      run(linear, frame.tokens, frame.x, width, (const std::int32_t*)words, (const float*)scales, (const float*)levels,
          number, frame.target);
    }));
    return close(context, frame);
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
  static Registered<BookKernel<Numbers>> book("BookLayer", {ort::kFloat, ort::kInt32, ort::kFloat, ort::kFloat});
  static Registered<BookKernel<Integers>> integer("IntegerLayer",
                                                  {ort::kFloat, ort::kInt32, ort::kFloat, ort::kUint8});
  static Registered<CodedKernel> coded("CodedLayer", {ort::kFloat, ort::kInt32, ort::kFloat, ort::kFloat});
  static Registered<AngularKernel> attention("AngularAttention",
                                             {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat});
  static ort::Domain* domain = nullptr;  // lives as long as sessions may
  if (!domain) {
    TRY(api->create_domain("ai.edgecompile.ort", &domain));
    TRY(api->add_operator(domain, &book));
    TRY(api->add_operator(domain, &integer));
    TRY(api->add_operator(domain, &coded));
    TRY(api->add_operator(domain, &attention));
  }
  return api->add_domain(options, domain);
}
