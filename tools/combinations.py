"""Prints the guide's table of supported combinations: ``python tools/combinations.py``.

Every pair of arguments and every layout goes through the validation of calls, so the table states
what the code does. A test compares it with the page; ``--write`` updates the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.errors import JitAttnError
from jitattn.request.layouts import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

_BEGIN: Final = "<!-- tools/combinations.py -->"
_END: Final = "<!-- end -->"
_BATCH, _HEADS, _LENGTH, _DIM = 2, 2, 16, 8


def arguments() -> dict[str, dict[str, Any]]:
    """Return the arguments of a call for each feature, by name."""
    ones = torch.ones(_BATCH, _LENGTH, dtype=torch.bool)
    rules: dict[str, Any] = {
        "Causal": jitattn.Causal(),
        "Window": jitattn.Window(3),
        "LocalStride": jitattn.LocalStride(64, 1, 2),
        "BlockSparse": jitattn.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 8),
        "PerHead": jitattn.PerHead([jitattn.Full(), jitattn.Causal()]),
        "KeyPadding": jitattn.KeyPadding(ones),
        "Dense": jitattn.Dense(ones[:, None, None]),
        "MaskMod": jitattn.MaskMod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
    }
    others: dict[str, dict[str, Any]] = {
        "bias": {"bias": torch.zeros(1, 1, 1, _LENGTH)},
        "relative_bias": {"relative_bias": torch.zeros(1, 3)},
        "alibi_slopes": {"alibi_slopes": torch.zeros(_HEADS)},
        "softcap": {"softcap": 1.0},
        "sinks": {"sinks": torch.zeros(_HEADS)},
        "dropout_p": {"dropout_p": 0.5},
        "qk_norm": {"qk_norm": jitattn.L2Norm()},
        "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: score * 0.5},
    }
    return {name: {"mask": rule} for name, rule in rules.items()} | others


def layouts() -> dict[str, dict[str, Any]]:
    """Return the arguments of a call for each sequence layout, with a fitting k."""
    lengths = torch.full((_BATCH,), _LENGTH, dtype=torch.int32)
    starts = torch.arange(_BATCH, dtype=torch.int32) * _LENGTH
    ragged = jitattn.Ragged(starts, lengths, max_length=_LENGTH)
    table = torch.arange(_BATCH, dtype=torch.int32)[:, None]
    return {
        "batched": {},
        "ragged": {"q_seqs": ragged, "kv_seqs": ragged},
        "padded": {"kv_seqs": jitattn.Padded(lengths)},
        "paged": {"kv_seqs": jitattn.Paged(table, lengths)},
    }


def works(*parts: dict[str, Any]) -> bool:
    """Return whether a call with all these arguments is accepted."""
    given: dict[str, Any] = {}
    try:
        for part in parts:
            if "mask" in part and "mask" in given:
                given["mask"] = given["mask"] & part["mask"]
            else:
                given |= {name: value for name, value in part.items() if name not in given}
        shape = (_BATCH, _LENGTH, _HEADS, _DIM)
        qkv = [torch.zeros(shape) for _ in range(3)]
        for idx, side in enumerate(("q_seqs", "kv_seqs", "kv_seqs")):
            if isinstance(given.get(side), jitattn.Ragged):
                qkv[idx] = qkv[idx].flatten(0, 1)
        tensors, call = bind(qkv[0], qkv[1], qkv[2], given)
        parse(tensors["q"], tensors["k"], tensors["v"], call)
    except JitAttnError:
        return False
    return True


def table() -> str:
    """Return the table as Markdown."""
    features, places = arguments(), layouts()
    names = list(features)
    head = ["", *(f"`{name}`" for name in names), *places]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, feature in features.items():
        cells = ["" if other == name else _cell(works(feature, features[other])) for other in names]
        cells += [_cell(works(feature, place)) for place in places.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(taken: bool) -> str:
    return "yes" if taken else "no"


def in_page(text: str) -> str:
    """Return the text of the page with the table replaced."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    page = REPOSITORY / "tools" / "guide" / "masks.md"
    if parser.parse_args(argv).write:
        page.write_text(in_page(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
