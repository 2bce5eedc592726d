// Stores of 8x8 matrices from the fragments of a warp. PTX ISA: "stmatrix".
#pragma once

#include "jitattn/types.cuh"

namespace jitattn::ptx {

// stmatrix.sync.aligned.m8n8.x4.shared.b16: lane l gives the address of row l % 8 of matrix l / 8
__device__ __forceinline__ void stmatrix_x4(uint32_t s_row, const uint32_t (&matrix)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(s_row),
               "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
               : "memory");
}

}  // namespace jitattn::ptx
