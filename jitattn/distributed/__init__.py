"""Context parallelism on torch.distributed: attention over sequences that several ranks share.

`context_parallel_attention` computes it, `plan` says who holds what, `shard` and `unshard` follow a
plan, and `decode_attention` serves a cache that ranks share. README.md beside this file is a guide.
"""

from __future__ import annotations

from jitattn.distributed.attention import context_parallel_attention
from jitattn.distributed.decode import decode_attention
from jitattn.distributed.sharding import Plan, plan, shard, unshard

__all__ = [
    "Plan",
    "context_parallel_attention",
    "decode_attention",
    "plan",
    "shard",
    "unshard",
]
