// The element-wise code of a tile without intrinsics.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tile.h"

namespace elas {
namespace {

inline int32_t as_int(float x) {
  int32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline float as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

#include "simd_scalar.h"
#include "rows.h"

}  // namespace

extern const Tile tile_scalar{forward_any, backward_any};

}  // namespace elas
