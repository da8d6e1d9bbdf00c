// What the element-wise code does to one tile of tokens × features, and where its instruction sets are found.
//
// A tile is `rows` tokens by `cols` features, z and ds in fp32 as a matrix product left them. cols divides by 4 unless
// the mode is dense; rows of a tile are `cols` apart. Kept tensors are addressed at the tile's corner, with the strides
// of the whole.
#pragma once

#include <cstdint>

namespace elas {

// Pruning and its gradient; the numbers are cpu/__init__.py's.
enum Mode { DENSE = 0, MAGNITUDE_MASKED = 1, MAGNITUDE_STE = 2, SOFT_MASKED = 3, SOFT_STE = 4 };

// F32: fp32 throughout. ROUNDED: tensors are bf16, tiles hold bf16 values in fp32 for fp32 products. BF16: tensors are
// bf16, and what goes into a product is written as the bf16 products want it.
enum Kind { F32 = 0, ROUNDED = 1, BF16 = 2 };

// Masked pruning keeps packed values and codes; the others keep relu(z).
constexpr bool packs(Mode mode) { return mode == MAGNITUDE_MASKED || mode == SOFT_MASKED; }

struct Forward {
  int64_t rows, cols;
  float scale;
  float* z;          // in; F32 and ROUNDED: s out, in place
  uint16_t* s_rows;  // BF16: s out, [rows, cols]
  void* kept;        // nullptr: keep nothing; values or relu(z), float or bf16
  int64_t kept_ld;
  uint8_t* codes;
  int64_t codes_ld;
};

struct Backward {
  int64_t rows, cols;
  float scale;
  const float* z;    // nullptr: from what was kept
  const void* kept;
  int64_t kept_ld;
  const uint8_t* codes;
  int64_t codes_ld;
  const float* ds;
  float *s, *dz;                // F32 and ROUNDED: out; may be z and ds
  uint32_t *s_pairs, *dz_pairs; // BF16: out, [ceil(rows / 2), cols], even token in the low half, 0 for a missing one
  uint16_t* dz_rows;            // BF16: out, [rows, cols]
};

struct Tile {
  void (*forward)(const Forward&, Mode, Kind);
  void (*backward)(const Backward&, Mode, Kind);
};

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ELAS_X86 1
extern const Tile tile_avx512, tile_avx2;
#endif
extern const Tile tile_scalar;

}  // namespace elas
