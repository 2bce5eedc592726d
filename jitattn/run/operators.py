"""Registers `attention` as torch.library operators, for `torch.compile` and `torch.export`.

``jitattn::attention`` and ``jitattn::attention_backward`` take tensors, and the other arguments of
a call as integers and floats (operator_encoding.py). Their fake implementations return shapes only;
the real ones decode the call and run it as an eager call. Eager calls bypass the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from jitattn.errors import UnsupportedError
from jitattn.request.scores import ADDED, added_tensor, captured_names, in_fp32
from jitattn.run.backward import run_backward
from jitattn.run.forward import run
from jitattn.run.operator_encoding import DTYPES, LAYOUTS, decode, encode, filled
from jitattn.values.autocast import outside_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call

#: Whether torch.compile can trace the check for an active transform.
_TRACES_TRANSFORMS: Final = TorchVersion(torch.__version__) >= "2.9"


def refuse_in_graph(call: Call) -> None:
    """Refuse a call in a `torch.compile` graph that the operators do not support.

    Raises
    ------
    UnsupportedError
        `out` is given, or the graph has a transform of torch.func or forward mode in it.
    """
    if call.out is not None:
        raise UnsupportedError("out is given under torch.compile: leave it out, and use the result")
    in_transform = _TRACES_TRANSFORMS and torch._C._are_functorch_transforms_active()
    if in_transform or forward_ad._current_level >= 0:
        raise UnsupportedError(
            "a transform of torch.func (grad, vmap, jvp ...) or forward mode is inside of what "
            "torch.compile compiles, where operators have none; transform a function that is not "
            "compiled, or compile without the transform and use backward()"
        )


def call_operator(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:  # noqa: ANN401
    """Call the operator, and return the output, with the LSE on request.

    Raises
    ------
    UnsupportedError
        The operator does not support the call.
    """
    refuse_in_graph(call)
    out, lse = torch.ops.jitattn.attention(q, k, v, *filled(encode(call), q))
    return (out, lse) if call.return_lse else out


# ---- The operators


@outside_autocast
def _attention(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Tensor, Tensor]:
    call = decode(tensors, ints, floats)
    if q.is_cuda:
        call = call._replace(scores=in_fp32(call.scores))
    with torch.no_grad():
        out, lse = run(q, k, v, call)
    return out.contiguous(), lse.contiguous()


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Tensor, Tensor]:
    del k, tensors, floats
    return fake_results(q, v, ints)


def fake_results(q: Tensor, v: Tensor, ints: list[int]) -> tuple[Tensor, Tensor]:
    """Return fake out and LSE; `ints` begins with the shape fields written by `encoder`."""
    out_dtype = DTYPES[ints[1]]
    if q.dim() == 3:
        shape: tuple[Any, ...] = (q.shape[1], q.shape[0])
    elif LAYOUTS[ints[0]] == "bshd":
        shape = (q.shape[0], q.shape[2], q.shape[1])
    else:
        shape = tuple(q.shape[:3])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype or q.dtype)
    return out, q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@outside_autocast
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
        of_names = [names[idx] for idx in wanted if idx in names]
        call = call._replace(scores=in_fp32(call.scores))
        found = run_backward(q, k, v, out, lse, d_out, d_lse, call, of_names)
        more = [found.added[names[idx]].to(tensors[idx].dtype) for idx in wanted]
        return [found.dq, found.dk, found.dv, *more]
    # By autograd through the eager path: on the CPU, and through a normalisation.
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
    """Return the positions of tensors that may have gradients, by name."""
    found: dict[str, int] = {}
    for name in (*ADDED, *captured_names(call.scores)):
        own = added_tensor(call.scores, name)
        taken = found.values()  # one tensor may be given twice, at two positions
        places = (i for i, one in enumerate(tensors) if one is own and i not in taken)
        place = next(places, None) if own is not None else None
        if place is not None:
            found[name] = place
    return found


def _autograd_at_work() -> Any:  # noqa: ANN401 - a guard of torch
    """Enable autograd inside an operator, where torch's dispatcher disables it; of views too."""
    names = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(names.AutogradFunctionality)
    for key in (names.AutogradCPU, names.AutogradCUDA, names.ADInplaceOrView):
        keys = keys | torch._C.DispatchKeySet(key)
    excluded = torch._C._dispatch_tls_local_exclude_set() - keys
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - autograd's
    q, k, v, tensors, ints, floats = inputs
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.ints, ctx.floats = ints, floats
    ctx.num_tensors = len(tensors)
    ctx.set_materialize_grads(False)  # it would make real zeros among fake tensors


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:  # noqa: ANN401
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
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
