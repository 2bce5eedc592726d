"""THE oracle: attention in plain PyTorch, slow and obvious.

Every test, the CPU path and the benchmarks are compared with `reference`. It shares no code with
anything that it judges (but a matrix product that autocast does not reach): the score matrix is
materialised, the mask is an explicit boolean matrix, kv heads are repeated. Memory is O(Lq · Lkv).
"""

from jitattn.reference.attention import reference
from jitattn.reference.kvcache import with_kvcache
from jitattn.reference.masks import attended, block_pattern, of_sequence, pattern, visible
from jitattn.reference.scores import Scores

__all__ = [
    "Scores",
    "attended",
    "block_pattern",
    "of_sequence",
    "pattern",
    "reference",
    "visible",
    "with_kvcache",
]
