"""`Problem`, the part of a call that changes machine code, and the base of all kernel specs.

A fact is in a spec if and only if it changes machine code. Lengths, batch, head counts, strides,
pointers and the direction of the diagonal are arguments (`spec/arguments.py`). Specs are frozen,
hashable, and render to one canonical JSON text, from which the cache key is made.

The families are in `jitattn.kernels`, one file each, which are imported when a family is first
looked up by name. This module imports no torch and no CuPy.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, ClassVar, Final, Self, get_type_hints

from jitattn.spec.arguments import ArgumentStruct, ArgumentTable
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    MatrixSize,
    Numerics,
    SeqLayout,
    Staging,
    Switch,
)
from jitattn.spec.program import parse

#: Architecture names; a compiler may support fewer.
ARCH: Final = re.compile(r"sm_[1-9][0-9]{1,2}[af]?")
#: Largest value of int fields with a limit of their own.
_LARGEST: Final = {"head_dim": 256, "head_dim_v": 256, "num_parts": 2}
_LARGEST_OTHER: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Properties of a call that change machine code."""

    dtype: Dtype
    out_dtype: Dtype
    head_dim: int  #: of q and k, 1…256
    head_dim_v: int  #: of v and out, 1…256
    mask: MaskKind
    numerics: Numerics
    q_layout: SeqLayout = SeqLayout.BATCHED
    kv_layout: SeqLayout = SeqLayout.BATCHED
    access: Access = Access.VEC16
    bias: BiasKind = BiasKind.NONE
    relative_bias: Switch = Switch.OFF
    alibi: Switch = Switch.OFF
    softcap: Switch = Switch.OFF
    sinks: Switch = Switch.OFF
    key_padding: Switch = Switch.OFF
    dense: Switch = Switch.OFF
    dropout: Switch = Switch.OFF
    fixed_shift: Switch = Switch.OFF  #: scores are bounded, so no running maximum is needed
    bias_staged: Staging = Staging.OFF
    dense_staged: Staging = Staging.OFF
    function: str = ""  #: text of the program that scores or pairs go through (`program.py`)

    @property
    def has_scores(self) -> bool:
        """Whether scores have a mask other than full or causal, a bias, or any other modifier."""
        return (
            self.mask not in (MaskKind.FULL, MaskKind.CAUSAL)
            or self.bias is not BiasKind.NONE
            or bool(self.function)
            or any(getattr(self, name) is Switch.ON for name in SWITCHES)
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length and mask, known at compile time."""
        batched = self.q_layout is SeqLayout.BATCHED is self.kv_layout
        return batched and self.mask is not MaskKind.BLOCK_LISTS

    @property
    def gather_group(self) -> int:
        """Number of keys per lookup; 0 if keys are contiguous."""
        return self.kv_layout.page_group or (16 if self.mask is MaskKind.BLOCK_LISTS else 0)


#: Fields of `Problem` that say whether an optional input is there.
SWITCHES: Final = tuple(
    field.name for field in fields(Problem) if isinstance(field.default, Switch)
)


def padded_head_dim(head_dim: int) -> int:
    """Round a head dimension up to the MMA granularity of 16 columns."""
    return -(-head_dim // 16) * 16


class KernelSpec:
    """Base of the specs: one frozen dataclass per family; its fields determine machine code.

    A field that is itself a dataclass stands for all its fields.
    """

    __slots__ = ()
    family: ClassVar[str]
    derived: ClassVar[tuple[str, ...]] = ()  #: properties rendered besides the fields
    tensor_maps: ClassVar[tuple[str, ...]] = ()  #: arguments that TMA copies, each with a map
    derives_captured: ClassVar[bool] = False  #: by what a function reads of captured tensors
    sees_only: ClassVar[bool] = False  #: asks a function's mask for many pairs of a row and a key
    arch: str

    @property
    def num_threads(self) -> int:
        """Threads per CTA."""
        return 256

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory per CTA, in bytes."""
        return 0

    @property
    def arguments(self) -> ArgumentTable:
        """Parameter struct of this kernel."""
        raise NotImplementedError

    @property
    def structs(self) -> tuple[ArgumentStruct, ...]:
        """Structs of the generated header."""
        return self.arguments.structs

    @classmethod
    def tables(cls) -> tuple[ArgumentTable, ...]:
        """Return the parameter structs of all kernels of this family."""
        return (cls.arguments,) if isinstance(cls.arguments, ArgumentTable) else ()

    @classmethod
    def matrix(cls, arch: str, size: MatrixSize) -> Iterator[KernelSpec]:
        """Yield the specs of this family in the compile matrix."""
        raise NotImplementedError

    def flat_fields(self) -> Iterator[tuple[str, StrEnum | str | int]]:
        """Yield name and value of every field except `arch`, in the order of declaration."""
        for field in fields(self):  # type: ignore[arg-type]  # of the families, which are dataclasses
            value = getattr(self, field.name)
            if is_dataclass(value):
                yield from ((one.name, getattr(value, one.name)) for one in fields(value))
            elif field.name != "arch":
                yield field.name, value

    def to_dict(self) -> dict[str, str | int]:
        """Return the flat fields: family, arch, then the others in the order of declaration."""
        flat: dict[str, str | int] = {"family": self.family, "arch": self.arch}
        for name, value in self.flat_fields():
            if value != "":  # a program that is not there: older specs have no field for it
                flat[name] = value.value if isinstance(value, StrEnum) else value
        return flat

    def to_key(self) -> str:
        """Return the canonical JSON text of the spec: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_choice(self) -> dict[str, str | int]:
        """Return the choice (`plan/choices.py`) that selects exactly this kernel."""
        return self.to_dict()

    def command(self) -> str:
        """Return the shell command that compiles this kernel and those that its calls may need."""
        words = [self._prebuild(), f"--dtype {self.to_dict()['dtype']}"]
        words.append(f"--set family={self.family}")
        others = [(name, value) for name, value in self.flat_fields() if name != "dtype"]
        return " ".join([*words, *(f"--set {name}={value}" for name, value in others)])

    def _prebuild(self) -> str:
        return f"jitattn-cache prebuild --arch {self.arch.removeprefix('sm_')}"

    def fault(self) -> str | None:
        """Describe the first invalid number of the spec; None if all are valid."""
        for name, value in self.flat_fields():
            most = _LARGEST.get(name, _LARGEST_OTHER)
            if type(value) is int and not 1 <= value <= most:
                return f"{name}={value}: it must be from 1 to {most}"
            if type(value) is str and value:
                try:
                    parse(value)
                except ValueError as error:
                    return str(error)
        return None

    @classmethod
    def from_fields(cls, arch: str, values: dict[str, Any], flat: Mapping[str, Any]) -> Self:
        """Build a spec from its flat fields, which are removed from `values`.

        Raises
        ------
        ValueError
            A field is missing or has another type; the message shows `flat`.
        """
        return cls(arch=arch, **_typed(cls, values, flat))  # type: ignore[call-arg]


@functools.cache
def families() -> dict[str, type[KernelSpec]]:
    """Return the spec class of each family; cuda_src/entry/<name>.cu has kernel jitattn_<name>."""
    kinds: tuple[type[KernelSpec], ...] = importlib.import_module("jitattn.kernels").FAMILIES
    return {kind.family: kind for kind in kinds}


def entry_symbol(spec: KernelSpec) -> str:
    """Return the name of the one extern "C" kernel in the cubin of `spec`."""
    return f"jitattn_{spec.family}"


def spec_from_dict(flat: Mapping[str, Any]) -> KernelSpec:
    """Build a spec from its `to_dict`.

    Raises
    ------
    ValueError
        The family is unknown, a field is missing or unknown, or a value is invalid. `render`
        accepts every spec that is returned.
    """
    values = dict(flat)
    family, arch = values.pop("family", None), values.pop("arch", None)
    if not (isinstance(arch, str) and ARCH.fullmatch(arch)):
        raise ValueError(f"no architecture in the spec {flat}")
    kind = families().get(str(family))
    if kind is None:
        raise ValueError(f"unknown family in the spec {flat}")
    spec = kind.from_fields(arch, values, flat)
    if values:
        raise ValueError(f"unknown fields {sorted(values)} in the spec {flat}")
    reason = spec.fault()
    if reason is not None:
        raise ValueError(f"{reason} in the spec {flat}")
    return spec


def _typed(kind: type, values: dict[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the fields of a dataclass from `values`, each converted to its declared type."""
    typed: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = field.name, hints[field.name]
        if name == "arch":
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            typed[name] = hint(**_typed(hint, values, flat))
            continue
        if name not in values and hint is str:
            values[name] = field.default
        if name not in values:
            raise ValueError(f"field {name} is missing in the spec {flat}")
        value = values.pop(name)
        if issubclass(hint, StrEnum):
            value = hint(value)
        elif type(value) is not hint:
            raise ValueError(f"field {name} is {value!r} in the spec {flat}")
        typed[name] = value
    return typed


def arch_number(arch: str) -> int:
    """Return the number of an architecture: 'sm_90' and 'sm_90a' → 90."""
    return int(arch.removeprefix("sm_").rstrip("af"))
