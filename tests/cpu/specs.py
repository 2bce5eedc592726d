"""Small specs for tests of the service: the combine kernel compiles in a tenth of a second."""

from __future__ import annotations

import hashlib
import random
import struct

from jitattn.cache.entry import Entry, Metadata, cache_key, sha256
from jitattn.kernels.combine import CombineSpec
from jitattn.kernels.fwd import FwdSpec, fwd_spec
from jitattn.spec.enums import Dtype, MaskKind, Numerics, RowClass
from jitattn.spec.kernel_spec import Problem


def combine_spec(arch: str = "sm_80", head_dim_v: int = 16) -> CombineSpec:
    return CombineSpec(dtype=Dtype.BF16, out_dtype=Dtype.BF16, head_dim_v=head_dim_v, arch=arch)


def forward_spec(arch: str = "sm_80", head_dim: int = 16, **other: object) -> FwdSpec:
    problem = Problem(
        **{
            "dtype": Dtype.BF16,
            "out_dtype": Dtype.BF16,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": MaskKind.FULL,
            "numerics": Numerics.F32_ACC,
            **other,
        }
    )
    return fwd_spec(problem, arch, RowClass.ROWS16)


def fake_entry(number: int, size: int = 4096, toolchain: str = "nvrtc 13.0.88") -> Entry:
    """An entry that every check accepts but no GPU would run: for tests of files only."""
    header = bytearray(64)
    header[:8] = b"\x7fELF\x02\x01\x01\x33"
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<I", header, 48, 80)
    cubin = bytes(header) + random.Random(number).randbytes(size - 64)
    spec = combine_spec().to_dict()
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    options = ("-a",)
    return Entry(
        cubin,
        Metadata(
            key=cache_key(spec, digest, "", options, toolchain),
            spec=spec,
            arch="sm_80",
            toolchain=toolchain,
            options=options,
            source_digest=digest,
            header_digest="",
            registers=32,
            stack_bytes=0,
            spill_bytes=0,
            smem_bytes=0,
            compile_ms=1.0,
            log="",
            bytes=len(cubin),
            sha256=sha256(cubin),
        ),
    )


#: The kernels of the fixture `filled`.
CACHED = (combine_spec(), combine_spec("sm_86"), forward_spec())
