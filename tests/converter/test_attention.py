"""Opened-up attention gives what nn.MultiheadAttention gives, under every mask and layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from converter.attention import FactoredAttention
from converter.convert import convert, plan
from converter.factors import FactoredLinear, factored_layers

close = torch.testing.assert_close
E, HEADS, N, L = 12, 3, 2, 5


def attention(**options) -> nn.MultiheadAttention:
    dense = nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **options).eval()
    if dense.in_proj_bias is not None:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    return dense


def inputs(batch_first: bool, batched: bool, length: int = L) -> torch.Tensor:
    shape = (N, length, E) if batch_first else (length, N, E)
    return torch.randn(shape if batched else (length, E)).double()


def masks(kind: str, keys: int) -> dict:
    causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
    padding = torch.zeros(N, keys, dtype=torch.bool)
    padding[0, -2:] = True
    return {
        "none": {},
        "boolean": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, keys).double()},
        "per head": {"attn_mask": torch.randn(N * HEADS, L, keys).double()},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
    }[kind]


@given(
    kind=st.sampled_from(["none", "boolean", "float", "per head", "padding", "both", "causal"]),
    batch_first=st.booleans(),
    bias=st.booleans(),
    crossed=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
)
def test_it_is_multihead_attention(kind, batch_first, bias, crossed, need_weights, average):
    dense = attention(batch_first=batch_first, bias=bias)
    opened = FactoredAttention.from_dense(dense)
    x = inputs(batch_first, True)
    memory = inputs(batch_first, True, 6) if crossed else x
    options = {"need_weights": need_weights, "average_attn_weights": average}
    options |= masks(kind, memory.shape[1 if batch_first else 0])
    expected, found = (m(x, memory, memory, **options) for m in (dense, opened))
    close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None) == (not need_weights)
    if need_weights:
        close(found[1], expected[1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_sequences_are_taken_too(need_weights):
    dense, x = attention(), inputs(False, False)
    opened = FactoredAttention.from_dense(dense)
    for mask in (None, torch.randn(L, L).double(), torch.randn(HEADS, L, L).double()):
        expected = dense(x, x, x, attn_mask=mask, need_weights=need_weights)
        close(opened(x, x, x, attn_mask=mask, need_weights=need_weights), expected)
    padding = torch.tensor([False] * 4 + [True])
    close(opened(x, x, x, key_padding_mask=padding)[0], dense(x, x, x, key_padding_mask=padding)[0])


def test_without_weights_it_stays_scaled_dot_product_attention(monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: seen.append(1) or original(*a, **k),
    )
    x = inputs(True, True)
    FactoredAttention.from_dense(attention(batch_first=True))(x, x, x, need_weights=False)
    assert seen == [1]


def test_opening_shares_the_parameters_and_closing_gives_them_back():
    dense = attention()
    opened = FactoredAttention.from_dense(dense)
    assert opened.in_proj.weight is dense.in_proj_weight
    closed = opened.dense()
    assert type(closed) is nn.MultiheadAttention
    assert {k: id(v) for k, v in closed.named_parameters()} == {
        k: id(v) for k, v in dense.named_parameters()
    }


@pytest.mark.parametrize("crossed", [False, True])
def test_both_projections_shrink_and_closing_multiplies_them_out(crossed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = attention(batch_first=True)

        def forward(self, x):
            return self.mix(x, x.flip(1) if crossed else x, x, need_weights=False)[0]

    dense, x = Net(), inputs(True, True)
    exact = convert(dense, plan(dense, 1.0, layers={"*": {"rank": 1.0}}))
    close(exact(x), dense(x))
    small = convert(dense, plan(dense, 4))
    assert {n: m.rank for n, m in factored_layers(small).items()} == {
        "mix.in_proj": 4,
        "mix.out_proj": 4,
    }
    before = small(x)
    small.mix = small.mix.dense()
    close(small(x), before)


def test_attention_that_nothing_shrinks_comes_back_as_it_was():
    dense = nn.Sequential(attention(), nn.Linear(E, E).double())
    small = convert(dense, plan(dense, 2, layers={"0.*": "keep"}))
    assert type(small[0]) is nn.MultiheadAttention
    assert small[0].state_dict().keys() == dense[0].state_dict().keys()
    assert isinstance(small[1], FactoredLinear)


@pytest.mark.parametrize("kept", ["", "layers.*.linear*", "layers.*.self_attn.*"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "fast path"])
def test_transformer_encoders_run_factored_on_either_path(kept, grad):
    block = nn.TransformerEncoderLayer(E, HEADS, 24, batch_first=True, dtype=torch.float64)
    dense = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()
    keep = {kept: "keep"} if kept else {}
    exact = convert(dense, plan(dense, 1.0, layers={"*": {"rank": 1.0}} | keep))
    assert factored_layers(exact)
    x, padding = inputs(True, True), masks("padding", L)["key_padding_mask"]
    with torch.set_grad_enabled(grad):
        close(exact(x), dense(x))
        shown = ~padding  # what is padded is anybody's
        close(
            exact(x, src_key_padding_mask=padding)[shown],
            dense(x, src_key_padding_mask=padding)[shown],
        )


def test_dropout_falls_in_training_only():
    opened, x = FactoredAttention.from_dense(attention(dropout=0.5)), inputs(False, True)
    assert torch.equal(opened(x, x, x)[0], opened(x, x, x)[0])
    opened.train()
    for need_weights in (True, False):
        once, again = (opened(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(once, again)
