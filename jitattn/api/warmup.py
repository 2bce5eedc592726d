"""`warmup`: compile and load kernels before they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jitattn.api.apply_rotary import rotary_specs
from jitattn.api.attention import bind
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.jit import backend, build
from jitattn.jit.device import device as device_of
from jitattn.jit.pool import build_all
from jitattn.kernels.mask_lists import mask_lists_spec
from jitattn.plan.all_lengths import backward_specs, forward_specs
from jitattn.plan.choices import expand, read_entries
from jitattn.plan.choices import preset as preset_choices
from jitattn.plan.score_gradients import target_of
from jitattn.request.layouts import parse_any
from jitattn.request.mask_blocks import may_have_lists, replace_rule
from jitattn.request.norm import call_of_normalized
from jitattn.request.problem import is_deterministic
from jitattn.request.scores import added_tensor, captured_names, stagings
from jitattn.run import normalize, workspace
from jitattn.run.append import append_spec
from jitattn.run.execute import has_wgmma
from jitattn.spec.enums import Access, ScoreTarget
from jitattn.spec.program import parse
from jitattn.values.masks import Full, FunctionBlocks, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from jitattn.plan.choice_fields import Choice
    from jitattn.request.problem import Call
    from jitattn.request.scores import Scores
    from jitattn.spec.kernel_spec import KernelSpec, Problem
    from jitattn.values.rotary import Rotary


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """Result of `warmup`."""

    kernels: int  #: loaded on the device now; 0 for CPU tensors
    compiled: int  #: number of them that were compiled


def warmup(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    preset: str | Sequence[str] | None = None,
    spec_file: str | Path | None = None,
    specs: Iterable[Choice] | None = None,
    device: torch.device | int | str | None = None,
    jobs: int | None = None,
    gradients: bool = False,
    append: bool = False,
    rotary: Rotary | None = None,
    **arguments: Any,  # noqa: ANN401 - those of attention
) -> WarmedUp:
    """Compile and load the kernels of later calls of `attention`, on one device.

    Lengths do not matter: kernels for short and long queries are loaded, and the one that merges
    splits. Call it before a CUDA graph capture, and before serving requests. (Block lists of a
    `BlockSparse`, a `PerHead`, or a `LocalStride` that needs them, are made by the first call with
    the mask, so make one call before a capture.)

    Parameters
    ----------
    q, k, v, **arguments
        A call of `attention`; nothing is computed, and the tensors' contents do not matter.
    preset : str or sequence of str, optional
        Instead: model families, as `jitattn-cache prebuild --preset` knows them ("llama", "all").
    spec_file : path, optional
        Instead: a TOML or JSON file of choices, or a record that ``JITATTN_RECORD`` wrote. Its
        architectures are ignored: the kernels are made for the device. An unreadable line of a
        record is logged as a warning.
    specs : iterable of mapping, optional
        Instead: choices, as such a file holds them: ``{"dtype": "bf16", "head_dim": 128, "mask":
        "causal"}``.
    device : torch.device, int or str, default that of q, else the current one
        Device that the kernels are loaded on.
    jobs : int, default the number of processors
        Processes that compile.
    gradients : bool
        With a call: load the kernels of its backward pass as well.
    append : bool
        With a call: load the kernel that appends to a cache as well, for `attention_with_kvcache`.
    rotary : Rotary, optional
        With a call: load the kernels of `apply_rotary` as well; with `append`, the tables that such
        calls will pass.

    Returns
    -------
    WarmedUp
        Number of kernels loaded, and number of them that were compiled. Nothing is done for CPU
        tensors.

    Raises
    ------
    InvalidInputError
        No call, preset, file or spec is given, or more than one of them; or an argument is wrong.
    UnsupportedError
        There is no GPU of sm_80 or newer.
    CompileError, LaunchError, CacheMissError
        A kernel could not be compiled or loaded. The others are loaded nevertheless.

    Examples
    --------
    >>> jitattn.warmup(q, k, v, mask=jitattn.Causal())       # doctest: +SKIP
    >>> jitattn.warmup(preset=["llama", "sd"])                # doctest: +SKIP
    """
    ways = {"q": q, "preset": preset, "spec_file": spec_file, "specs": specs}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise InvalidInputError(
            f"warmup got {', '.join(given) or 'nothing'}: it takes one of a call (q, k, v and the "
            "other arguments of attention), preset, spec_file or specs"
        )
    if q is not None:
        return _warm_call(q, k, v, arguments, device, jobs, gradients, append, rotary)
    if arguments or k is not None or v is not None:
        raise InvalidInputError(
            f"warmup({given[0]}=...) takes no {', '.join(arguments) or 'k and v'}: arguments of "
            "attention go with q, k and v"
        )
    if preset is not None:
        names = [preset] if isinstance(preset, str) else preset
        entries = [("preset", choice) for choice in preset_choices(names)]
    elif spec_file is not None:
        entries = read_entries(Path(spec_file))
    else:
        entries = [_entry(number, choice) for number, choice in enumerate(specs or ())]
    index = _index(device)
    arch = device_of(index).arch
    found, errors = expand([(place, {**choice, "arch": arch}) for place, choice in entries])
    for error in errors:
        raise error
    return _warm(found, index, jobs)


def _entry(number: int, choice: object) -> tuple[str, Choice]:
    place = f"specs[{number}]"
    if not isinstance(choice, Mapping):
        raise InvalidInputError(
            f"{place} is a {type(choice).__name__}: it must be a mapping of fields, as in "
            '{"dtype": "bf16", "head_dim": 128, "mask": "causal"}'
        )
    return place, choice


def _warm_call(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    arguments: dict[str, Any],
    device: torch.device | int | str | None,
    jobs: int | None,
    gradients: bool,
    append: bool,
    rotary: Rotary | None,
) -> WarmedUp:
    if k is None or v is None:
        raise InvalidInputError("warmup got q without k and v: it takes all three of a call")
    tensors, call = bind(q, k, v, arguments)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    parse_any(q, k, v, call)  # raises as a call does
    if device is None and not q.is_cuda:
        return WarmedUp(kernels=0, compiled=0)
    index = _index(q.device if device is None else device)
    arch = device_of(index).arch
    specs = specs_of_call(q, k, v, call, arch, has_wgmma=has_wgmma(arch), gradients=gradients)
    if append:
        specs += [append_spec(q.dtype, rotary, access, arch) for access in Access]
    if rotary is not None:
        specs += rotary_specs(q.dtype, rotary, arch)
    return _warm(list(dict.fromkeys(specs)), index, jobs)


def specs_of_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    arch: str,
    *,
    has_wgmma: bool,
    gradients: bool,
) -> list[KernelSpec]:
    """Return the kernels that calls like this can need, at all lengths."""
    specs: list[KernelSpec] = []
    function = call.scores.function
    if function is not None and parse(function.program).mask is not None:
        specs.append(mask_lists_spec(function.program, arch))
        rule = parts_of(call.mask).rule
        if isinstance(rule, Full) and may_have_lists(call.q_seqs, call.kv_seqs):
            # Longer sequences have lists of blocks.
            blocks = FunctionBlocks(function, 1, False, q.shape[0], k.shape[0])
            longer = call._replace(mask=replace_rule(call.mask, blocks))
            specs += specs_of_call(q, k, v, longer, arch, has_wgmma=has_wgmma, gradients=gradients)
    problem, runtime, _ = parse_any(q, k, v, call)
    norm = call.scores.qk_norm
    if norm is not None and norm.normalize:
        made = normalize.norm_spec(q, k, norm, call, arch)
        specs.append(made)
        if gradients:
            specs += normalize.norm_grad_specs(made)
        call = call_of_normalized(call, runtime.scale)
        problem, runtime, _ = parse_any(*normalize.like_normalized(q, k), v, call)
    if gradients:
        targets = _targets_of(call.scores)
        specs += backward_specs(
            problem,
            runtime,
            targets,
            arch,
            has_wgmma=has_wgmma,
            deterministic=is_deterministic(call),
            captured=_followed_captures(call.scores),
        )

    def problems_at(len_q: int) -> Iterator[Problem]:
        for bias_staged, dense_staged in stagings(call, problem, len_q):
            yield replace(problem, bias_staged=bias_staged, dense_staged=dense_staged)

    return [*specs, *forward_specs(problems_at, runtime, call, arch, has_wgmma=has_wgmma)]


def _targets_of(scores: Scores) -> list[ScoreTarget]:
    """Return the score inputs that may need gradients in a call."""
    targets = [] if scores.bias is None else [target_of(tuple(scores.bias.shape))]
    if scores.relative_bias is not None or scores.alibi_slopes is not None:
        targets.append(ScoreTarget.DISTANCE)
    return targets


def _followed_captures(scores: Scores) -> tuple[str, ...]:
    """Return the names of the captured tensors that require gradients."""
    names = captured_names(scores)
    return tuple(name for name in names if added_tensor(scores, name).requires_grad)


def _index(device: torch.device | int | str | None) -> int:
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "torch sees no CUDA device to load kernels on; to compile without one, use "
            "jitattn-cache prebuild --arch"
        )
    if device is None:
        return torch.cuda.current_device()
    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if chosen.type != "cuda":
        raise InvalidInputError(
            f"device={device}: kernels are loaded on a CUDA device; the CPU path needs none"
        )
    return torch.cuda.current_device() if chosen.index is None else chosen.index


def _warm(specs: Sequence[KernelSpec], device_index: int, jobs: int | None) -> WarmedUp:
    cold = [spec for spec in specs if not backend.active.is_loaded(spec, device_index)]
    missing = [spec for spec in cold if build.find(spec) is None]
    outcomes = list(build_all(missing, jobs))
    failed = {outcome.spec: outcome for outcome in outcomes if outcome.error}
    with backend.active.on_device(device_index):
        workspace.prepare(device_index)
        for spec in cold:
            if spec not in failed:
                backend.active.load(spec, device_index)
    for outcome in failed.values():
        raise outcome.exception()
    return WarmedUp(len(specs), sum(outcome.origin == "compiled" for outcome in outcomes))
