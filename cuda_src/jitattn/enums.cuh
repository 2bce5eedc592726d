// The values that the generated Spec uses; twins of the enums in jitattn/spec/enums.py.
#pragma once

namespace jitattn {

enum class Dtype { kFp16, kBf16, kFp32 };

// Which rule decides what a query sees; its numbers are runtime parameters.
enum class MaskKind {
  kFull,
  kCausal,
  kWindow,
  kLocalStride,
  kFineStride,  // the same, in blocks of fewer keys than a backward kernel's (fine_stride.cuh)
  kBlockLists,
};

// Whether an optional input is there.
enum class Switch { kOff, kOn };

// Whether a matrix comes through shared memory, in tiles or, where all rows are alike, one row.
enum class Staging { kOff, kRow, kMatrix };

// Element type of the bias, if there is one: that of q, or fp32.
enum class BiasKind { kNone, kSame, kFp32 };

// Where the sequences of q, or of k and v, lie.
enum class SeqLayout {
  kBatched,  // [B, L, H, D]: every sequence fills its row
  kRagged,   // a start and a length each, in one tensor or in a row of their own
  kPaged,    // keys only: pages of rows, found through a block table
  kPaged16,  // the same, where every page begins and ends at a multiple of 16 keys
};

// How products are formed and summed.
enum class Numerics {
  kF32Acc,   // 16-bit operands, fp32 accumulators, P rounded to 16 bits
  kSplitP,   // the same, but P as two 16-bit parts, and sums promoted
  kF16Acc,   // fp16 operands, P V in fp16 accumulators, promoted every 64 keys
  kInt8,     // Q and K in 8 bits, scaled by rows and by blocks; P V as kF32Acc
  kInt8F16,  // the same, but P V in fp16 accumulators over up to 2048 keys, for V in fp16
  kF16x3,    // fp32 operands as two fp16 parts, scaled by rows and by blocks, three MMAs a product
  kF16x1,    // the same, of which only the high parts
  kTf32x3,   // fp32 operands as two TF32 parts, three MMAs a product
  kTf32,     // fp32 operands rounded to TF32
};

// Alignment class of q, k, v and out together.
enum class Access {
  kVec16,    // every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long
  kElement,  // one element at a time
};

// Which columns a rotary embedding turns with each other.
enum class RotaryStyle {
  kNone,
  kInterleaved,  // 2i and 2i + 1
  kHalfSplit,    // i and i + rotary_dim / 2
};

// Of what is added to scores: whose gradient a kernel computes.
enum class ScoreTarget {
  kMatrix,    // a bias with rows of its own
  kRow,       // a bias whose rows are alike
  kDistance,  // sums by key - query
};

}  // namespace jitattn
