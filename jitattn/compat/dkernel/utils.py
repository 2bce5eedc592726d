"""dkernel's functions on block patterns: building, conversion and checks, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn import patterns
from jitattn.compat._errors import check

if TYPE_CHECKING:
    from torch import Tensor


def get_sparse_attn_mask(
    num_heads: int,
    seqlen: int,
    block_size: int = 64,
    local_blocks: int | tuple[int, int] = 4,
    vert_stride: int = 4,
    homo_head: bool = False,
    num_kv_heads: int | None = None,
    past_len: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    return_dense: bool = False,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    kv_seqlen: int | None = None,
    q_start_position: int | None = None,
    kv_start_position: int | None = None,
    vert_position_type: str | None = None,
    causal: bool = True,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """Materialize a local + stride pattern.

    With i and j a query's and a key's block and h the kv head of a query head, a block is attended
    to if it is local, on the stride, or its head is dense; causal, if j <= i as well.

    Parameters
    ----------
    num_heads : int
        Query heads.
    seqlen : int
        Tokens, of queries and, without `kv_seqlen`, of keys.
    block_size : int
    local_blocks : int, or (int, int) if not causal
        Blocks around the query's own, its own among them: to the left and to the right.
    vert_stride : int
        Of the blocks beyond, one in so many; 1 is dense.
    homo_head : bool
        One pattern for all heads.
    num_kv_heads : int, default num_heads
        It divides `num_heads`.
    past_len : int, optional
        Leave out the rows of the blocks before the one that this token is in.
    dtype : torch.dtype
        Of the masks.
    device : default the current CUDA device, or the CPU where there is none
    return_dense : bool
        Return the mask of tokens as well: a matrix for each head.
    head_sliding_step : int, default max(1, vert_stride // num_heads)
        By which each kv head's stride is moved.
    head_sliding_offset : int
        By which all are. Block 0 is on the stride of kv head h if h * step + offset is a multiple
        of `vert_stride`.
    num_dense_heads : int
        kv heads, the last ones.
    kv_seqlen : int, optional
    q_start_position, kv_start_position : int, optional
        Positions of the first query and of the first key, multiples of `block_size`: for a part of
        the queries and of the keys.
    vert_position_type : "absolute" or "relative", optional
        Whether strides count from the first key (the default if causal), or from a query's local
        blocks (if not).
    causal : bool

    Returns
    -------
    (crow, col) : Tensor, int32 [heads, rows + 1] and [heads, most blocks], padded with -1
    block_mask : Tensor, [heads or 1, rows, columns], dtype
    dense : Tensor, [heads or 1, seqlen - past_len, kv_seqlen], dtype, or None
        Causal, by the positions of tokens.

    Raises
    ------
    CheckFailedError
        As the original's assertions.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int):
        device = torch.device("cuda", device)
    past, len_kv = past_len or 0, seqlen if kv_seqlen is None else kv_seqlen
    check(block_size >= 1, f"block_size={block_size}: it must be at least 1")
    check(
        past == 0 or q_start_position is None,
        f"past_len={past_len} with q_start_position={q_start_position}: give one of them",
    )
    check(0 <= past <= seqlen, f"past_len={past_len}: it must be from 0 to seqlen, {seqlen}")
    starts = (q_start_position or 0, kv_start_position or 0)
    for name, start in zip(("q", "kv"), starts, strict=True):
        check(
            start % block_size == 0,
            f"{name}_start_position={start}: it must be a multiple of the block size {block_size}",
        )
    rows, columns = (
        range(start // block_size, start // block_size - (-length // block_size))
        for start, length in zip(starts, (seqlen, len_kv), strict=True)
    )
    seen = local_stride_blocks(
        num_heads,
        rows,
        columns,
        local_blocks,
        vert_stride,
        homo_head,
        num_kv_heads,
        head_sliding_step=head_sliding_step,
        head_sliding_offset=head_sliding_offset,
        num_dense_heads=num_dense_heads,
        vert_position_type=vert_position_type,
        causal=causal,
        device=device,
    )
    mask = seen[:, past // block_size :].to(dtype)
    dense = None
    if return_dense:
        wide = seen.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
        wide = wide[:, past:seqlen, :len_kv]
        if causal:
            position = starts[0] + torch.arange(past, seqlen, device=device)[:, None]
            wide = wide & (starts[1] + torch.arange(len_kv, device=device) <= position)
        dense = wide.to(dtype)
    return dense_to_crow_col(mask), mask, dense


def local_stride_blocks(
    num_heads: int,
    rows: range,
    columns: range,
    local_blocks: int | tuple[int, int],
    vert_stride: int,
    homo_head: bool = False,
    num_kv_heads: int | None = None,
    *,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    vert_position_type: str | None = None,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Materialize blocks of a local + stride pattern, [heads or 1, rows, columns], bool.

    As `get_sparse_attn_mask` has the arguments. Nothing here waits for a device.

    Raises
    ------
    CheckFailedError
    """
    for name, value, least in (
        ("num_heads", num_heads, 1),
        ("vert_stride", vert_stride, 1),
        ("num_dense_heads", num_dense_heads, 0),
    ):
        check(
            isinstance(value, int) and value >= least,
            f"{name}={value!r}: it must be an int from {least}",
        )
    heads_kv = num_kv_heads or num_heads
    check(
        isinstance(heads_kv, int) and heads_kv > 0 and num_heads % heads_kv == 0,
        f"num_kv_heads={num_kv_heads!r}: it must divide num_heads, {num_heads}",
    )
    kind = vert_position_type or ("absolute" if causal else "relative")
    check(
        kind in ("absolute", "relative"),
        f"vert_position_type={vert_position_type!r}: it must be 'absolute' or 'relative'",
    )
    check(
        not (homo_head and num_dense_heads),
        f"num_dense_heads={num_dense_heads} with homo_head: heads that are alike are all sparse",
    )
    left, right = _local(local_blocks, vert_stride, causal)
    count = 1 if homo_head else num_heads
    step = head_sliding_step
    if step is None:
        step = max(1, vert_stride // count)
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=device)[None, :]
    head = torch.arange(count, device=device)[:, None, None] // (num_heads // heads_kv)
    if kind == "absolute":
        seen = (i - j < left) & (j - i < right)
        seen = seen | ((j + head * step + head_sliding_offset) % vert_stride == 0)
    else:
        outside = (i - j - left + 1).clamp(min=0) + (j - i - right + 1).clamp(min=0)
        seen = (outside % vert_stride == 0)[None]
    if num_dense_heads:
        seen = seen | (head >= heads_kv - num_dense_heads)
    return seen & (j <= i) if causal else seen


def _local(local_blocks: int | tuple[int, int], vert_stride: int, causal: bool) -> tuple[int, int]:
    if isinstance(local_blocks, int):
        least = 1 if causal and vert_stride > 1 else 0
        check(local_blocks >= least, f"local_blocks={local_blocks}: it must be at least {least}")
        return local_blocks, 1 if causal else local_blocks
    check(
        not causal
        and isinstance(local_blocks, tuple)
        and len(local_blocks) == 2
        and min(local_blocks) > 0,
        f"local_blocks={local_blocks!r}: it must be an int, or, not causal, two from 1, to the "
        "left and to the right",
    )
    return local_blocks


def dense_to_crow_col(x: Tensor, include_values: bool = False) -> tuple[Tensor, Tensor]:
    """Return the compressed rows of a pattern.

    Parameters
    ----------
    x : Tensor, [rows, columns] or [heads, rows, columns]
    include_values : bool
        Return what stands in the pattern beside its columns: [..., most blocks, 2].

    Returns
    -------
    crow : Tensor, int32 [rows + 1] or [heads, rows + 1]
    col : Tensor, int32 [most blocks] or [heads, most blocks], padded with -1 (values: 0)
    """
    crow, col = patterns.to_csr(x != 0)
    if include_values:
        heads = x if x.dim() == 3 else x[None]
        values = torch.zeros_like(col)
        for head, own in enumerate(heads):
            found = own[own != 0]
            values[head, : len(found)] = found.to(torch.int32)
        col = torch.stack((col, values), dim=-1)
    return (crow, col) if x.dim() == 3 else (crow[0], col[0])


def crow_col_to_dense(crows: Tensor, cols: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return the pattern of compressed rows, as wide as its last block."""
    heads_crow = crows if crows.dim() == 2 else crows[None]
    heads_col = cols if crows.dim() == 2 else cols[None]
    column, value = heads_col, torch.ones_like(heads_col)
    if heads_col.dim() == 3:
        column, value = heads_col.unbind(-1)
    width = int(column.max()) + 1 if column.numel() else 0
    dense = patterns.from_csr(heads_crow, column, width).to(dtype)
    if heads_col.dim() == 3:
        for head, own in enumerate(dense):
            count = int(heads_crow[head, -1])
            own[own != 0] = value[head, :count].to(dtype)
    return dense if crows.dim() == 2 else dense[0]


def dense_to_ccol_row(x: Tensor, include_values: bool = False) -> tuple[Tensor, Tensor]:
    """Return compressed columns, as `dense_to_crow_col` of the transposed pattern."""
    return dense_to_crow_col(x.transpose(-2, -1), include_values)


def ccol_row_to_dense(ccol: Tensor, rows: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return the pattern of compressed columns, as high as its last block."""
    return crow_col_to_dense(ccol, rows, dtype).transpose(-2, -1).contiguous()


def is_kv_cache_efficient(sparse_pattern: Tensor, block_m: int, block_n: int) -> bool:
    """Return whether keys below the diagonal that a row skips are skipped by all later rows.

    Parameters
    ----------
    sparse_pattern : Tensor, [rows, columns] or [heads, rows, columns]
    block_m, block_n : int
        Tokens of a row and of a column.
    """
    rows, columns = sparse_pattern.shape[-2:]
    row = torch.arange(rows, device=sparse_pattern.device)[1:, None]
    column = torch.arange(1, columns + 1, device=sparse_pattern.device)
    seen = sparse_pattern != 0
    returns = seen[..., 1:, :] & ~seen[..., :-1, :] & (row * block_m >= column * block_n)
    return not bool(returns.any())


def verify_sparse_pattern(sparse_pattern: Tensor) -> None:
    """Refuse an invalid pattern.

    Raises
    ------
    CheckFailedError
        It is no tensor, or has neither 2 nor 3 dimensions.
    """
    check(
        isinstance(sparse_pattern, torch.Tensor),
        f"sparse_pattern is a {type(sparse_pattern).__name__}: it must be a tensor",
    )
    check(
        sparse_pattern.dim() in (2, 3),
        f"sparse_pattern has shape {list(sparse_pattern.shape)}: it must be [rows, columns] or "
        "[heads, rows, columns]",
    )


def is_causal(sparse_pattern: Tensor) -> bool:
    """Return whether nothing above the diagonal of a square pattern is set."""
    rows, columns = sparse_pattern.shape[-2:]
    check(rows == columns, f"sparse_pattern is {rows} x {columns}: it must be square")
    return not bool(sparse_pattern.triu(1).any())


def merge_split_fwd_kernel_blocks(
    block_size: int, sparse_pattern: Tensor, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Return the compressed rows of a pattern in the blocks of a kernel.

    Kept for those who look at layouts; our kernels make lists of their own.

    Parameters
    ----------
    block_size : int
        Of the pattern.
    sparse_pattern : Tensor, [heads, rows, columns]
        Causal.
    block_m, block_n : int
        Queries and keys of the kernel's blocks; `block_n` divides `block_size`.

    Returns
    -------
    crow, col : Tensor, int32
        With `block_m` larger than `block_size`, col is [..., 2], beside the column the queries of
        the block up to the last one that sees it.
    """
    if block_m == block_n == block_size:
        return dense_to_crow_col(sparse_pattern)
    check(
        block_size % block_n == 0,
        f"block_n={block_n}: it must divide the block size {block_size}",
    )
    pattern = (sparse_pattern != 0).to(torch.int32)
    rows_each, columns_each = max(1, block_size // block_m), block_size // block_n
    pattern = pattern.repeat_interleave(rows_each, 1).repeat_interleave(columns_each, 2)
    if rows_each * columns_each > 1:
        end = (torch.arange(pattern.shape[1], device=pattern.device)[:, None] + 1) * block_size
        begin = torch.arange(pattern.shape[2], device=pattern.device) * block_n
        pattern = pattern * (begin * rows_each < end)
    if block_m <= block_size:
        return dense_to_crow_col(pattern)
    each = block_m // block_size
    heads, rows, columns = pattern.shape
    check(rows % each == 0, f"{rows} rows of {block_size}: no whole number of blocks of {block_m}")
    number = torch.arange(1, each + 1, device=pattern.device)[:, None]
    last = (pattern.view(heads, rows // each, each, columns) * number).amax(2)
    return dense_to_crow_col(last * block_size, include_values=True)


def zero_stride(x: Tensor, dim: int = 0) -> Tensor:
    """Return x with a stride of 0 in a dimension of at most one entry."""
    check(
        -x.dim() <= dim < x.dim(), f"dim={dim}: x has {x.dim()} dimensions; it must be one of them"
    )
    check(x.shape[dim] <= 1, f"dimension {dim} has {x.shape[dim]} entries: at most 1 is possible")
    strides = list(x.stride())
    strides[dim] = 0
    return x.as_strided(x.shape, strides)


def multiple_of(x: int, y: int) -> int:
    """Return the smallest multiple of y that is no less than x."""
    return -(-x // y) * y


def get_q_block_ids(past_len: int, q_len: int, block_size: int) -> range:
    """Return the indices of the blocks that contain queries after `past_len` tokens."""
    return range(past_len // block_size, -(-(past_len + q_len) // block_size))
