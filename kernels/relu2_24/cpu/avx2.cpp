// The element-wise code of a tile in AVX2; compiled for it whatever the compiler's own target is.
#include <cstdint>

#include "tile.h"

#ifdef ELAS_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace elas {
namespace {

#include "simd_avx2.h"
#include "rows.h"

}  // namespace
}  // namespace elas

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace elas {
extern const Tile tile_avx2{forward_any, backward_any};
}

#endif
