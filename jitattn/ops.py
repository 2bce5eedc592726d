"""Attention as operators of torch.library: what `torch.compile` and `torch.export` see of a call.

``jitattn::attention`` and ``jitattn::attention_backward`` take tensors, and everything else of a
call as integers and numbers (`encode`). Their fake implementations say shapes only; the real ones
decode the call and take the usual way down. Eager calls do not come here: they need no operator.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.backward import run_backward
from jitattn.cosine import L2Norm
from jitattn.dispatch import run
from jitattn.dropout import Dropout
from jitattn.errors import UnsupportedError
from jitattn.masks import (
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    PerHead,
    Window,
    parts_of,
)
from jitattn.problem import Call
from jitattn.scores import Scores
from jitattn.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.masks import Mask, Rule

_NONE: Final = -(2**40)  #: stands for an integer that is None
_LAYOUTS: Final = ("bshd", "bhsd")
_DTYPES: Final = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: What may have a gradient beside q, k and v, as `Scores` names it.
_ADDED: Final = ("bias", "relative_bias", "alibi_slopes", "sinks")
_MOST_PATTERNS: Final = 64
#: Patterns seen before: lists of blocks are kept for the value that they were made of.
_patterns: OrderedDict[tuple[Any, ...], BlockSparse] = OrderedDict()


class Encoded(NamedTuple):
    """A call beside q, k and v."""

    tensors: list[Tensor]
    ints: list[int]
    floats: list[float]


class _Writer:
    """Takes a call apart, in the order in which `_Reader` puts it together."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []
        self.floats: list[float] = [0.0]  # autograd takes an empty list for one of tensors

    def tensor(self, value: Tensor | None) -> None:
        if value is None:
            self.ints.append(_NONE)
        else:
            self.ints.append(len(self.tensors))
            self.tensors.append(value)

    def integer(self, value: int | None) -> None:
        self.ints.append(_NONE if value is None else int(value))

    def number(self, value: float | None) -> None:
        self.ints.append(0 if value is None else 1)
        if value is not None:
            self.floats.append(float(value))

    def rule(self, rule: Rule) -> None:
        if isinstance(rule, Full):
            self.integer(0)
        elif isinstance(rule, Causal):
            self.integer(1)
            self.integer(rule.align == "bottom_right")
        elif isinstance(rule, Window):
            self.integer(2)
            self.integer(rule.left)
            self.integer(rule.right)
            self.integer(rule.keep_first)
            self.integer(rule.full_on_decode)
        elif isinstance(rule, LocalStride):
            local = rule.local_blocks
            self.integer(3)
            self.integer(rule.block_size)
            self.integer(local[0] if isinstance(local, tuple) else local)
            self.integer(local[1] if isinstance(local, tuple) else None)
            self.integer(rule.vert_stride)
            self.integer(rule.head_step)
            self.integer(rule.head_offset)
            self.integer(rule.num_dense_heads)
            self.integer(rule.homo_head)
            self.integer(rule.causal)
        elif isinstance(rule, BlockSparse):
            self.integer(4)
            self.tensor(rule.pattern)
            self.integer(rule.block_size)
            self.integer(rule.causal)
            self.integer(rule.first_row)
        else:
            self.integer(5)
            self.integer(len(rule.rules))
            for part in rule.rules:
                self.rule(part)

    def sequences(self, seqs: Any) -> None:  # noqa: ANN401 - one of three, or None
        if seqs is None:
            self.integer(0)
            return
        self.integer(1 if isinstance(seqs, Ragged) else 2 if isinstance(seqs, Padded) else 3)
        self.tensor(seqs.start)
        self.tensor(seqs.stop)
        self.integer(seqs.stop_is_length)
        self.integer(seqs._max_length)
        if isinstance(seqs, Padded):
            self.tensor(seqs.batch_idx)
        elif isinstance(seqs, Paged):
            self.tensor(seqs.block_table)


class _Reader:
    """Puts a call together again."""

    def __init__(self, tensors: list[Tensor], ints: list[int], floats: list[float]) -> None:
        self._tensors, self._ints, self._floats = tensors, iter(ints), iter(floats[1:])

    def integer(self) -> Any:  # noqa: ANN401 - int or None
        value = next(self._ints)
        return None if value == _NONE else value

    def tensor(self) -> Any:  # noqa: ANN401 - Tensor or None
        value = self.integer()
        return None if value is None else self._tensors[value]

    def number(self) -> float | None:
        return next(self._floats) if self.integer() else None

    def rule(self) -> Any:  # noqa: ANN401 - a rule
        kind = self.integer()
        if kind == 0:
            return Full()
        if kind == 1:
            return Causal("bottom_right" if self.integer() else "top_left")
        if kind == 2:
            left, right = self.integer(), self.integer()
            return Window(left, right, self.integer(), bool(self.integer()))
        if kind == 3:
            size, first, second = self.integer(), self.integer(), self.integer()
            return LocalStride(
                size,
                first if second is None else (first, second),
                self.integer(),
                self.integer(),
                self.integer(),
                self.integer(),
                bool(self.integer()),
                bool(self.integer()),
            )
        if kind == 4:
            pattern = self.tensor()
            return _known(pattern, self.integer(), bool(self.integer()), self.integer())
        return PerHead([self.rule() for _ in range(self.integer())])

    def sequences(self) -> Any:  # noqa: ANN401 - one of three, or None
        kind = self.integer()
        if kind == 0:
            return None
        start, stop = self.tensor(), self.tensor()
        is_length, longest = bool(self.integer()), self.integer()
        made: Any
        if kind == 1:
            made = Ragged.__new__(Ragged)
            made._set(start, stop, is_length, longest, "Ragged")
        elif kind == 2:
            made = Padded.__new__(Padded)
            made._set_padded(start, stop, is_length, longest, self.tensor())
        else:
            made = Paged.__new__(Paged)
            made._set(start, stop, is_length, longest, "Paged")
            object.__setattr__(made, "block_table", self.tensor())
        return made


def _known(pattern: Tensor, size: int, causal: bool, first_row: int | None) -> BlockSparse:
    """Return the value that stood for this pattern the last time."""
    where = (pattern.device, pattern.data_ptr(), pattern._version)
    key = (*where, tuple(pattern.shape), pattern.stride(), size, causal, first_row)
    found = _patterns.get(key)
    if found is None:
        found = _patterns[key] = BlockSparse(pattern, size, causal, first_row)
        if len(_patterns) > _MOST_PATTERNS:
            _patterns.popitem(last=False)
    _patterns.move_to_end(key)
    return found


def encode(call: Call) -> Encoded:
    """Take a call apart; `torch.compile` traces this."""
    writer = _Writer()
    # First what shapes depend on.
    writer.integer(_LAYOUTS.index(call.layout))
    writer.integer(_DTYPES.index(call.out_dtype))
    parts = parts_of(call.mask)
    writer.rule(parts.rule)
    writer.tensor(None if parts.key_padding is None else parts.key_padding.keep)
    writer.tensor(None if parts.dense is None else parts.dense.keep)
    writer.number(call.scale)
    writer.integer(call.gear)
    writer.integer(call.num_splits)
    writer.integer(call.tile_rows)
    writer.integer(call.deterministic)
    writer.sequences(call.q_seqs)
    writer.sequences(call.kv_seqs)
    scores = call.scores
    for value in (scores.bias, scores.relative_bias, scores.alibi_slopes, scores.sinks):
        writer.tensor(value)
    writer.number(scores.softcap)
    writer.integer(None if scores.dropout is None else scores.dropout.threshold)
    writer.tensor(None if scores.dropout is None else scores.dropout.state)
    norm = scores.qk_norm
    writer.integer(None if norm is None else norm.groups)
    writer.tensor(None if norm is None else norm.head_scale)
    writer.number(None if norm is None else norm.bound)
    writer.integer(None if norm is None else norm.normalize)
    return Encoded(writer.tensors, writer.ints, writer.floats)


def decode(tensors: list[Tensor], ints: list[int], floats: list[float]) -> Call:
    """Put a call together; it asks for the LSE."""
    reader = _Reader(tensors, ints, floats)
    layout, out_dtype = _LAYOUTS[reader.integer()], _DTYPES[reader.integer()]
    rule, padding, dense = reader.rule(), reader.tensor(), reader.tensor()
    mask: Mask = rule
    if padding is not None or dense is not None:
        mask = Both(
            rule,
            None if padding is None else KeyPadding(padding),
            None if dense is None else Dense(dense),
        )
    scale = reader.number()
    gear, num_splits, tile_rows = reader.integer(), reader.integer(), reader.integer()
    deterministic = bool(reader.integer())
    q_seqs, kv_seqs = reader.sequences(), reader.sequences()
    bias, relative, slopes, sinks = (reader.tensor() for _ in range(4))
    softcap = reader.number()
    threshold, state = reader.integer(), reader.tensor()
    dropout = None if threshold is None else Dropout(threshold, state)
    groups, head_scale, bound = reader.integer(), reader.tensor(), reader.number()
    normalize = reader.integer()
    norm = None if groups is None else L2Norm(groups, head_scale, bound, bool(normalize))
    scores = Scores(bias, relative, slopes, softcap, sinks, dropout, norm)
    return Call(
        mask,
        scale,
        layout,
        gear,
        None,
        out_dtype,
        num_splits,
        True,
        q_seqs,
        kv_seqs,
        scores,
        deterministic,
        tile_rows,
    )


def call_operator(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:  # noqa: ANN401
    """Call the operator: Tensor, or two with the LSE.

    Raises
    ------
    UnsupportedError
        `out` is given.
    """
    if call.out is not None:
        raise UnsupportedError("out is given under torch.compile: leave it out, and use the result")
    tensors, ints, floats = encode(call)
    out, lse = torch.ops.jitattn.attention(q, k, v, tensors, ints, floats)
    return (out, lse) if call.return_lse else out


# ---- The operators


def _attention(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out, lse = run(q, k, v, decode(tensors, ints, floats))
    return out.contiguous(), lse.contiguous()


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Tensor, Tensor]:
    del k, tensors, floats
    out_dtype = _DTYPES[ints[1]]
    if q.dim() == 3:
        shape: tuple[Any, ...] = (q.shape[1], q.shape[0])
    elif _LAYOUTS[ints[0]] == "bshd":
        shape = (q.shape[0], q.shape[2], q.shape[1])
    else:
        shape = tuple(q.shape[:3])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype or q.dtype)
    return out, q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    wanted: list[int],
) -> list[Tensor]:
    call = decode(tensors, ints, floats)
    norm = call.scores.qk_norm
    names = {idx: name for name, idx in _places(call, tensors).items()}
    if q.is_cuda and (norm is None or not norm.normalize):
        found = run_backward(
            q, k, v, out, lse, d_out, d_lse, call, [names[idx] for idx in wanted if idx in names]
        )
        more = [found._asdict()[names[idx]] for idx in wanted]
        return [found.dq, found.dk, found.dv, *more]
    # Through the usual way down, under autograd: on the CPU, and through a normalisation.
    with _autograd_at_work(), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        inner = [x.detach() for x in tensors]
        for idx in wanted:
            inner[idx].requires_grad_()
        results = run(leaves[0], leaves[1], leaves[2], decode(inner, ints, floats))
        inputs = [*leaves, *(inner[idx] for idx in wanted)]
        pairs = [(x, dx) for x, dx in zip(results, (d_out, d_lse), strict=True) if x.requires_grad]
        gradients = torch.autograd.grad(
            [x for x, _ in pairs],
            inputs,
            [dx.masked_fill(torch.isneginf(x), 0.0) for x, dx in pairs],
            allow_unused=True,
        )
    return [
        torch.zeros_like(x) if dx is None else dx.contiguous()
        for x, dx in zip(inputs, gradients, strict=True)
    ]


def _attention_backward_fake(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    wanted: list[int],
) -> list[Tensor]:
    del d_out, d_lse, out, lse, ints, floats
    inputs = [q, k, v, *(tensors[idx] for idx in wanted)]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _places(call: Call, tensors: list[Tensor]) -> dict[str, int]:
    """Where the tensors that may have gradients are, by name."""
    found = {}
    for name in _ADDED:
        for idx, tensor in enumerate(tensors):
            if tensor is getattr(call.scores, name):
                found[name] = idx
    return found


def _autograd_at_work() -> Any:  # noqa: ANN401 - a guard of torch
    """Let autograd follow what an operator does, which torch's dispatcher switches off."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
        keys = keys | torch._C.DispatchKeySet(key)
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
    q, k, v, tensors, ints, floats = inputs
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.ints, ctx.floats = ints, floats
    ctx.num_tensors = len(tensors)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:  # noqa: ANN401 - autograd's
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[3]
    wanted = [idx for idx in range(ctx.num_tensors) if needs[idx]]
    dq, dk, dv, *others = torch.ops.jitattn.attention_backward(
        d_out, d_lse, q, k, v, out, lse, tensors, ctx.ints, ctx.floats, wanted
    )
    by_place: list[Tensor | None] = [None] * ctx.num_tensors
    for idx, gradient in zip(wanted, others, strict=True):
        by_place[idx] = gradient
    return dq, dk, dv, by_place, None, None


_library: Any = torch.library.Library("jitattn", "DEF")
_CALL: Final = "Tensor[] tensors, int[] ints, float[] floats"
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_CALL}, int[] wanted) -> Tensor[]"
)
_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("jitattn::attention", _attention_fake, lib=_library)
torch.library.register_fake("jitattn::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd(
    "jitattn::attention", _backward, setup_context=_setup_context, lib=_library
)
