"""torch.nn.attention.flex_attention's names, computed by jitattn.

``flex_attention``, ``create_block_mask`` and ``BlockMask`` take and mean what torch's do;
``and_masks``, ``or_masks``, ``noop_mask``, ``create_mask`` and the types are torch's own. What
differs: nothing is compiled by torch, a new length or number compiles nothing, and
``create_block_mask`` makes no blocks until their tensors are asked for: kernels evaluate the
function.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.attention import flex_attention as _torchs
from torch.nn.attention.flex_attention import and_masks, create_mask, noop_mask, or_masks

from jitattn.compat._core import attention
from jitattn.compat._errors import ExtensionError, errors_as
from jitattn.errors import UnsupportedError
from jitattn.values.masks import BlockSparse, Full, MaskMod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = [
    "BlockMask",
    "activated",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

_WORDS: Final = {"q": "query", "k": "key", "v": "value"}
#: Sizes of blocks that a pattern may have.
_PATTERNS: Final = (16, 32, 64, 128)
_FULL: Final = Full()
#: Torch's own, also while ours stands under its name.
_create_torchs: Final = _torchs.create_block_mask


class BlockMask(_torchs.BlockMask):
    """A mask function with the sizes that it is for.

    It is one of torch's, but for its tensors (kv_num_blocks, kv_indices, full_kv_num_blocks,
    full_kv_indices, and those of queries), which are made, by torch, when one is first asked for.
    """

    def __init__(
        self,
        mask_mod: Callable[..., Any],
        shape: tuple[int, int, int, int],
        block_size: int | tuple[int, int],
        device: torch.device | str,
        options: dict[str, Any],
    ) -> None:
        self.mask_mod = mask_mod
        self.seq_lengths = shape[2:]
        self.BLOCK_SIZE = (block_size, block_size) if isinstance(block_size, int) else block_size
        self._of, self._device, self._options = shape, device, options

    @property
    def shape(self) -> tuple[int, ...]:
        """B, H, Q_LEN and KV_LEN."""
        return self._of

    @classmethod
    def from_torch(cls, block_mask: Any) -> Any:  # noqa: ANN401 - torch's
        """Return torch's mask as it is: `flex_attention` takes it."""
        return block_mask

    def to_torch(self) -> Any:  # noqa: ANN401 - torch's
        """Return torch's `BlockMask` of the same arguments."""
        made = self.__dict__.get("_made")
        if made is None:
            made = self.__dict__["_made"] = _create_torchs(
                self.mask_mod,
                *self._of,
                device=self._device,
                BLOCK_SIZE=self.BLOCK_SIZE,
                **self._options,
            )
        return made

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.to_torch(), name)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as torch's
        return self.to_torch()[index]

    def __str__(self) -> str:
        return str(self.to_torch())

    def __repr__(self) -> str:
        return f"BlockMask(shape={self._of}, BLOCK_SIZE={self.BLOCK_SIZE})"


def create_block_mask(
    mask_mod: Callable[..., Any],
    B: int | None,  # noqa: N803 - torch's names
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
    _compile: bool = False,
    **options: Any,  # noqa: ANN401 - of torch's later versions
) -> BlockMask:
    """Return a mask of a function; as torch's, without making its blocks.

    Parameters
    ----------
    mask_mod : callable
        ``f(b, h, q_idx, kv_idx) -> bool``.
    B, H : int or None
        None: the same for all.
    Q_LEN, KV_LEN : int
    device : torch.device or str, optional
        Of the blocks, should they be made; the default device if left out.
    BLOCK_SIZE : int or (int, int)
        Of the blocks; kernels choose their own.
    """
    del _compile
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    return BlockMask(mask_mod, shape, BLOCK_SIZE, device, options)


@errors_as(ExtensionError, _WORDS)
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    block_mask: Any = None,  # noqa: ANN401 - ours, or torch's
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,  # noqa: ANN401 - torch's AuxRequest
) -> Any:  # noqa: ANN401 - as torch's
    """Compute attention with a score function and a block mask.

    Parameters
    ----------
    query : Tensor, [B, Hq, L, E]
    key : Tensor, [B, Hkv, S, E]
    value : Tensor, [B, Hkv, S, Ev]
    score_mod : callable, optional
        ``f(score, b, h, q_idx, kv_idx) -> score``.
    block_mask : BlockMask, optional
        Of `create_block_mask`, or torch's.
    scale : float, default 1 / sqrt(E)
    enable_gqa : bool
        Let Hq be a multiple of Hkv.
    return_lse : bool
    kernel_options : dict, optional
        Steers torch's kernels: taken and ignored.
    return_aux : AuxRequest, optional
        With lse; max_scores are not in memory.

    Returns
    -------
    Tensor [B, Hq, L, Ev]; or that and the LSE [B, Hq, L]; or that and an AuxOutput

    Raises
    ------
    UnsupportedError
        Something in a function cannot be traced, or max_scores are asked for.
    """
    del kernel_options
    if not enable_gqa and query.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ExtensionError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: pass enable_gqa=True"
        )
    if getattr(return_aux, "max_scores", False):
        raise UnsupportedError("AuxRequest(max_scores=True): maxima are never in memory here")
    wants_lse = return_lse or bool(getattr(return_aux, "lse", False))
    found = attention(
        query,
        key,
        value,
        mask=_mask_of(block_mask),
        scale=scale,
        layout="bhsd",
        score_mod=score_mod,
        return_lse=wants_lse,
    )
    if return_aux is None:
        return found
    out, lse = found if wants_lse else (found, None)
    return out, _torchs.AuxOutput(lse=lse)


def _mask_of(block_mask: Any) -> Any:  # noqa: ANN401
    """Return the mask of a block mask: its function alone, or with its blocks if torch made it."""
    if block_mask is None:
        return _FULL
    if isinstance(block_mask, BlockMask):
        return MaskMod(block_mask.mask_mod)
    kept = getattr(block_mask, "_jitattn_mask", None)
    if kept is None:
        kept = _of_torch(block_mask)
        with contextlib.suppress(AttributeError):  # a frozen one is taken apart at every call
            block_mask._jitattn_mask = kept
    return kept


def _of_torch(block_mask: Any) -> Any:  # noqa: ANN401
    """Return the mask of torch's blocks: full ones as they are, others by their function."""
    rows, columns = block_mask.BLOCK_SIZE
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    batch, heads = partial.shape[:2]
    mask_mod = block_mask.mask_mod

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401
        where = (b % batch, h % heads, q_idx // rows, kv_idx // columns)
        return full[where] | (partial[where] & mask_mod(b, h, q_idx, kv_idx))

    mask: Any = MaskMod(visible)
    if rows == columns and rows in _PATTERNS:
        mask = BlockSparse((full | partial).any(0), rows, first_row=0) & mask
    return mask


def _dense(counts: Tensor, indices: Tensor) -> Tensor:
    """Return the blocks that lists [B, H, rows, columns] name, as bools."""
    columns = indices.shape[-1]
    place = torch.arange(columns, device=indices.device, dtype=torch.int64)
    is_named = place < counts[..., None]
    found = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(-1, torch.where(is_named, indices.long(), columns), True)
    return found[..., :columns]


@contextlib.contextmanager
def activated() -> Iterator[None]:
    """Put ours under torch's names, for later look-ups, and under transformers' flex road."""
    places: list[tuple[Any, str, Any]] = [
        (_torchs, "flex_attention", flex_attention),
        (_torchs, "create_block_mask", create_block_mask),
    ]
    try:
        from transformers import masking_utils
        from transformers.integrations import flex_attention as of_transformers
    except ImportError:
        pass
    else:
        places += [
            (of_transformers, "compile_friendly_flex_attention", _of_transformers),
            (masking_utils, "create_block_mask", create_block_mask),
        ]
    before = [(home, name, getattr(home, name)) for home, name, _ in places if hasattr(home, name)]
    try:
        for home, name, ours in places:
            if hasattr(home, name):
                setattr(home, name, ours)
        yield
    finally:
        for home, name, theirs in before:
            setattr(home, name, theirs)


def _of_transformers(*args: Any, training: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
    del training
    return flex_attention(*args, **kwargs)
