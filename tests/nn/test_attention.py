"""nn.MultiheadAttention: twin, integer module, program."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.passes.solve import sqnr
from pennyweight.pipeline import prepare, quantize, state
from pennyweight.plan import Rule
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

N, L, S, E, H = 3, 5, 7, 16, 4


class Model(nn.Module):
    """Hands everything on to one attention."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, **options)
        if self.attn.in_proj_bias is not None:
            nn.init.normal_(self.attn.in_proj_bias, std=0.3)
            nn.init.normal_(self.attn.out_proj.bias, std=0.3)

    def forward(self, query, key, value, **options):
        return self.attn(query, key, value, **options)


class Alone(nn.Module):
    """Self-attention, then a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.fc = inner, nn.Linear(E, 2)

    def forward(self, x):
        return self.fc(self.inner(x, x, x)[0])


def operands(batch_first=True, same=True, width=E, value_width=E):
    if same:
        x = torch.randn(N, L, E)
        found = (x, x, x)
    else:
        found = (torch.randn(N, L, E), torch.randn(N, S, width), torch.randn(N, S, value_width))
    if batch_first:
        return found
    first = found[0].transpose(0, 1)
    return (first, first, first) if same else tuple(t.transpose(0, 1) for t in found)


def calls():
    """Every way to call it that changes the computation, by name: (module options, same operand, call options)."""
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 3:] = padding[2, 1:] = True
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    plain = {"need_weights": False}
    return {
        "self": ({}, True, plain),
        "sequence first": ({"batch_first": False}, True, plain),
        "cross": ({}, False, plain),
        "cross, sequence first": ({"batch_first": False}, False, plain),
        "other widths": ({"kdim": 6, "vdim": 10}, False, plain),
        "no bias": ({"bias": False}, True, plain),
        "weights": ({}, True, {}),
        "weights per head": ({}, True, {"average_attn_weights": False}),
        "padding": ({}, True, {"key_padding_mask": padding, **plain}),
        "padding, weights": ({}, True, {"key_padding_mask": padding}),
        "float padding": ({}, True, {"key_padding_mask": torch.randn(N, L), **plain}),
        "mask": ({}, True, {"attn_mask": future, **plain}),
        "float mask": ({}, True, {"attn_mask": torch.randn(L, L), **plain}),
        "mask per head": ({}, True, {"attn_mask": torch.randn(N * H, L, L), **plain}),
        "causal": ({}, True, {"attn_mask": future, "is_causal": True, **plain}),
        "causal, weights": ({}, True, {"attn_mask": future, "is_causal": True}),
        "causal, padding": ({}, True, {"attn_mask": future, "is_causal": True, "key_padding_mask": padding}),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_twin_and_converted_layers(name):
    options, same, call = calls()[name]
    options = {"batch_first": True, **options}
    model = Model(**options).eval()
    widths = {"width": options.get("kdim", E), "value_width": options.get("vdim", E)}
    batch = operands(options["batch_first"], same, **widths)
    named = dict(zip(("query", "key", "value"), batch, strict=True))
    want, want_weights = model(**named, **call)
    twin, twin_weights = prepare(model, {**named, **call}, "int8")(**named, **call)
    assert torch.allclose(twin, want, atol=1e-6)
    if want_weights is not None:
        assert torch.allclose(twin_weights, want_weights, atol=1e-6)
    for recipe, least in (("int8", 30), ("int8-dynamic", 36), ("int8-weight", 40)):
        got, weights = quantize(model, [{**named, **call}], recipe, progress=False)(**named, **call)
        assert got.shape == want.shape
        assert sqnr(want, got) > least, recipe
        assert not torch.equal(want, got)
        if want_weights is None:
            assert weights is None
        else:
            assert weights.shape == want_weights.shape
            assert sqnr(want_weights, weights) > least, recipe


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first):
    model = Model(batch_first=batch_first).eval()
    x = torch.randn(L, E)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.tensor([False] * 4 + [True])
    quantized = quantize(model, [operands(batch_first)], "int8", progress=False)
    for call in ({}, {"need_weights": False}, {"attn_mask": mask}, {"key_padding_mask": padding}):
        want, got = model(x, x, x, **call), quantized(x, x, x, **call)
        assert got[0].shape == want[0].shape == (L, E)
        assert sqnr(want[0], got[0]) > 25
        if want[1] is not None:
            assert got[1].shape == want[1].shape


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic"])
def test_program(recipe, batch_first):
    class Padded(Model):
        def forward(self, x, padding):
            return self.attn(x, x, x, key_padding_mask=padding)[0]

    model = Padded(batch_first=batch_first).eval()

    def batch(n, length):
        x = torch.randn(n, length, E)
        return x if batch_first else x.transpose(0, 1).contiguous(), torch.rand(n, length) < 0.2

    quantized = quantize(model, [batch(N, L)], recipe, progress=False)
    program = lower(quantized, batch(N, L))
    kinds = [op.kind for op in program.ops]
    assert ("attention" in kinds) == (recipe == "int8")
    assert kinds.count("softmax") == (recipe != "int8")  # the weights that nobody reads are gone
    for sizes in ((N, L), (5, 9), (1, 1)):
        x, padding = batch(*sizes)
        padding[:, 0] = False
        got = interpret(program, {"x": x.numpy(), "padding": padding.numpy()})[program.outputs[0]]
        want = quantized(x, padding).numpy()
        if recipe == "int8":
            assert np.array_equal(want, got)
        else:
            assert np.allclose(want, got, atol=2e-2)  # scores and softmax in float: a code may flip


def test_sites_and_ties():
    quantized = quantize(Model(batch_first=True).eval(), [operands()], "int8", progress=False)
    plan = state(quantized).plan
    inner = {"attn:query", "attn:key", "attn:value", "attn:context"}
    weights = {"attn:in_proj_weight", "attn:out_proj.weight"}
    inputs = {"attn:input", "attn:input1", "attn:input2"}
    assert {str(s) for s in plan.sites()} == inner | weights | inputs
    assert [{str(s) for s in tie} for tie in plan.ties] == [inputs]
    ranges = {e.site: e.data for e in state(quantized).journal.of("range")}
    assert set(ranges) == inner | inputs
    assert len({ranges[s]["scale"] for s in inputs}) == 1
    cross = quantize(Model(batch_first=True).eval(), [operands(same=False)], "int8", progress=False)
    assert state(cross).plan.ties == ()


def test_parameters_stay_shared_and_named():
    model = Model(batch_first=True).eval()
    prepared = prepare(model, operands(), "int8")
    assert isinstance(prepared.attn, nn.MultiheadAttention)
    mine = dict(prepared.named_parameters())
    assert all(mine[n] is p for n, p in model.named_parameters())
    prepared.load_state_dict(model.state_dict(), strict=False)
    copy.deepcopy(prepared)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_refused_by_name_and_can_be_kept(options):
    model = Model(batch_first=True, **options).eval()
    with pytest.raises(
        UnrealisableSite, match=r"add_bias_kv or add_zero_attn.*at attn.*recipe\.keep\('attn'\)"
    ):
        quantize(model, [operands()], "int8", progress=False)
    x = operands()[0]
    both = Alone(model)
    kept = quantize(both.eval(), [x], Recipe.preset("int8").keep("inner.attn"), progress=False)
    assert type(kept.inner.attn) is nn.MultiheadAttention
    assert "kept in float32" in state(kept).plan.kept["inner.attn"]
    assert sqnr(both(x), kept(x)) > 30


def test_rows_that_share_a_scale_are_refused():
    rule = Rule(weight=QuantSpec.parse("int8n[4,*]"))
    with pytest.raises(UnrealisableSite, match="several products"):
        prepare(Model(batch_first=True).eval(), operands(), Recipe("x", (rule,)))


def test_causal_without_a_mask_is_refused_as_in_torch():
    quantized = quantize(Model(batch_first=True).eval(), [operands()], "int8", progress=False)
    with pytest.raises(InputError, match="attn_mask"):
        quantized(*operands(), is_causal=True)


def test_groups_of_four_bits():
    model = Model(batch_first=True).eval()
    rule = Rule(weight=QuantSpec.parse("int4[8]"))
    got, _ = quantize(model, [operands()], Recipe("x", (rule,), Recipe.preset("int4-weight").passes))(
        *(batch := operands())
    )
    assert sqnr(model(*batch)[0], got) > 15
