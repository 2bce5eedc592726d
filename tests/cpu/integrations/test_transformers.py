"""Tests that models of transformers compute with jitattn what they compute eagerly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.0")

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.integrations.transformers import register
from tests.support.compare import rel_l2
from tests.support.models import DECODERS, MODELS, WINDOW, inputs_of, model_of, tokens
from tests.support.training import assert_curves_are_together

register()
# Arguments of models change their names from version to version.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def both(name: str, **config: Any) -> tuple[Any, Any]:
    return model_of(name, "eager", **config), model_of(name, "jitattn", **config)


def padding(side: str, length: int = 23) -> Tensor:
    keep = torch.ones(2, length, dtype=torch.long)
    keep[1, slice(7) if side == "left" else slice(-7, None)] = 0
    return keep


def gradients(model: Any, logits: Tensor) -> Tensor:
    model.zero_grad()
    logits.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str) -> None:
    eager, ours = both(name)
    inputs = inputs_of(name)
    expected, found = eager(**inputs).logits, ours(**inputs).logits
    assert rel_l2(found, expected) < 2e-6
    assert rel_l2(gradients(ours, found), gradients(eager, expected)) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "t5"])
def test_padding(name: str, side: str) -> None:
    """Rows of padding are finite; tokens neither see it nor have gradients through it."""
    eager, ours = both(name)
    inputs = {**inputs_of(name), "attention_mask": padding(side)}
    keep = padding(side).bool() if name != "t5" else slice(None)
    expected, found = eager(**inputs).logits, ours(**inputs).logits
    assert found.isfinite().all()
    assert rel_l2(found[keep], expected[keep]) < 2e-6
    wanted = gradients(eager, expected[keep])
    assert rel_l2(gradients(ours, found[keep]), wanted) < 1e-5


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_positions_that_restart(name: str, use_cache: bool) -> None:
    """Each document is as if alone."""
    eager, ours = both(name)
    sizes = (9, 5, 9)
    ids = inputs_of(name)["input_ids"]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split(sizes, 1)], 1)
    assert rel_l2(eager(input_ids=ids, use_cache=False).logits, alone) > 0.1
    packed = ours(input_ids=ids, position_ids=positions.expand(2, -1), use_cache=use_cache)
    assert rel_l2(packed.logits, alone) < 2e-6
    one = ours(input_ids=ids[:1], position_ids=positions, use_cache=use_cache)
    assert rel_l2(one.logits, alone[:1]) < 2e-6


def test_positions_written_anew_are_read_anew() -> None:
    eager, ours = both("llama")
    ids = tokens(1, 12)
    positions = torch.arange(12)[None]
    ours(input_ids=ids, position_ids=positions)
    positions[0, 6:] -= 6
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split(6, 1)], 1)
    assert rel_l2(ours(input_ids=ids, position_ids=positions).logits, alone) < 2e-6


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_cumulative_lengths(name: str) -> None:
    """As DataCollatorWithFlattening makes them; the bound may be a tensor."""
    eager, ours = both(name)
    ids = tokens(1, 20)
    stops = torch.tensor([0, 8, 20], dtype=torch.int32)
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split((8, 12), 1)], 1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for longest in (12, torch.tensor(12)):
        found = ours(
            input_ids=ids, position_ids=positions, cu_seq_lens_q=stops, cu_seq_lens_k=stops,
            max_length_q=longest, max_length_k=longest, use_cache=False,
        ).logits  # fmt: skip
        assert rel_l2(found, alone) < 2e-6


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, is_padded: bool, cache: str | None) -> None:
    ids = tokens(2, 13)
    keep = padding("left", 13) if is_padded else torch.ones_like(ids)
    expected, found = (
        model.generate(
            ids, attention_mask=keep, max_new_tokens=16, min_new_tokens=16, do_sample=False,
            cache_implementation=cache, disable_compile=True,
        )
        for model in both(name)
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_generate_from_an_encoder() -> None:
    inputs = {"input_ids": tokens(2, 13), "attention_mask": padding("right", 13)}
    eager, ours = both("t5")
    expected, found = (
        model.generate(**inputs, max_new_tokens=10, num_beams=2, do_sample=False)
        for model in (eager, ours)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_static_cache_without_a_mask(name: str) -> None:
    """Keys that are yet to come are not seen."""
    from transformers import StaticCache

    eager, ours = both(name)
    ids = tokens(1, 10)
    expected = eager(input_ids=ids).logits
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with torch.no_grad():
        first = ours(input_ids=ids[:, :6], past_key_values=cache).logits
        more = ours(input_ids=ids[:, 6:], past_key_values=cache).logits
    assert rel_l2(torch.cat([first, more], 1), expected) < 2e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    eager, ours = both("mistral")
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = {**inputs_of("mistral"), "attention_mask": padding("left")}
    keep = padding("left").bool()
    found = gradients(ours, ours(**inputs, use_cache=False).logits[keep])
    assert rel_l2(found, gradients(eager, eager(**inputs).logits[keep])) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_compiled(name: str) -> None:
    """Without a mask, documents may be in the positions: a tracer makes a matrix of them."""
    eager, ours = both(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=name != "gpt_oss")
    for inputs in (inputs_of(name), {**inputs_of(name), "attention_mask": padding("left")}):
        keep = inputs.get("attention_mask", torch.ones(2, 23)).bool()
        expected, found = eager(**inputs).logits[keep], compiled(**inputs, use_cache=False).logits
        assert rel_l2(found[keep], expected) < 2e-6
        assert rel_l2(gradients(ours, found[keep]), gradients(eager, expected)) < 1e-5


def test_compiled_documents() -> None:
    eager, ours = both("mistral")
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split((8, 12), 1)], 1)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert rel_l2(found, alone) < 2e-6


def masked(ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Inputs with a mask of the caller's, [1, 1, L, L]."""
    return {"input_ids": ids, "attention_mask": keep[None, None]}


def test_a_matrix_of_the_callers() -> None:
    """Bool, or added to the scores."""
    eager, ours = both("llama")
    ids = tokens(1, 10)
    generator = torch.Generator().manual_seed(0)
    keep = (torch.rand(10, 10, generator=generator) < 0.5) | torch.eye(10, dtype=torch.bool)
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    expected = eager(**masked(ids, added)).logits
    for mask in (keep, added):
        assert rel_l2(ours(**masked(ids, mask)).logits, expected) < 2e-6


@pytest.mark.parametrize("keep_first", [0, 3])
def test_options_of_a_name(keep_first: int) -> None:
    """A window and first keys, as a mask of the caller's has them; in generate() too."""
    name = register("jitattn_window", window=WINDOW, keep_first=keep_first)
    eager, ours = model_of("llama", "eager"), model_of("llama", name)
    ids = tokens(1, 20)
    q, kv = torch.arange(20)[:, None], torch.arange(20)
    seen = (kv <= q) & ((kv > q - WINDOW) | (kv < keep_first))
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = eager(**masked(ids, added)).logits
    assert rel_l2(ours(input_ids=ids).logits, expected) < 2e-6
    generated = ours.generate(ids, max_new_tokens=1, do_sample=False)
    assert generated[0, -1] == expected[0, -1].argmax()


def test_full_attention_on_decode() -> None:
    name = register("jitattn_decode", window=WINDOW, full_on_decode=True)
    eager, ours = model_of("llama", "eager"), model_of("llama", name)
    ids = tokens(1, 20)
    with torch.no_grad():
        cache = eager(input_ids=ids[:, :-1], use_cache=True).past_key_values
        expected = model_of("llama", "eager")(input_ids=ids).logits[:, -1:]
        found = ours(input_ids=ids[:, -1:], past_key_values=cache).logits
    assert rel_l2(found, expected) < 2e-6


def test_names_stand_side_by_side_and_are_replaced() -> None:
    ids = tokens(1, 20)
    wide, narrow = register("jitattn_a"), register("jitattn_b", window=3)
    first, second = (model_of("llama", name)(input_ids=ids).logits for name in (wide, narrow))
    assert rel_l2(second, first) > 0.1
    register("jitattn_a", window=3)
    assert torch.equal(model_of("llama", "jitattn_a")(input_ids=ids).logits, second)


@pytest.mark.parametrize("name", ["", "jitattn_flash", "paged", "a|b", "a/b", 3])
def test_names_that_transformers_reads_otherwise(name: Any) -> None:
    with pytest.raises(InvalidInputError, match="register"):
        register(name)


@pytest.mark.parametrize("given", [{"window": 0}, {"window": 1.5}, {"keep_first": -1}], ids=str)
def test_options_that_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        register("jitattn_refused", **given)


def test_weights_are_refused() -> None:
    from jitattn.integrations.transformers import Options, attend

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match="eager"):
        attend(Options(), torch.nn.Identity(), q, q, q, None, output_attentions=True)


@pytest.mark.parametrize("name", ["GPT2", "OPT"])
def test_weights_that_layers_do_not_ask_for_are_refused(name: str) -> None:
    """transformers collects what layers return, without a word to the attention function."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=32, n_embd=32, num_hidden_layers=1, n_layer=1,
        num_attention_heads=2, n_head=2, ffn_dim=32, word_embed_proj_dim=32,
    )  # fmt: skip
    config._attn_implementation = register()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="jitattn")
    ids = tokens(1, 9)
    assert model(input_ids=ids).attentions is None
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(input_ids=ids, output_attentions=True)


def test_first_keys_with_a_model_of_windows_warn() -> None:
    from jitattn.integrations import transformers

    transformers._warn_of_dropped_keys.cache_clear()
    model = model_of("mistral", register("jitattn_sinks", window=4, keep_first=2))
    with pytest.warns(UserWarning, match="sliding_window=None"):
        model(input_ids=tokens(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens(1, 9))


def test_dropout_is_of_training_alone() -> None:
    model = model_of("llama", "jitattn", attention_dropout=0.5)
    ids = tokens(1, 16)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_training_curves_are_together() -> None:
    assert_curves_are_together()
