// Fragment loads from shared memory. PTX ISA: "ldmatrix".
// No "memory" clobber: the barriers around a tile's use carry it. volatile keeps the order.
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8x8 blocks; lane l gives row l % 8 of block l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr));
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16: four 8x8 blocks, each transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr));
}

}  // namespace jitattn::ptx
