"""LSTM, GRU and their cells: twins, integer modules, and the programs made of them."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.pipeline import calibrate, prepare, quantize, state
from pennyweight.plan import Rule
from pennyweight.program.interpret import interpret
from pennyweight.program.lower import lower
from pennyweight.recipe import Recipe
from pennyweight.spec import QuantSpec

KINDS = [nn.LSTM, nn.GRU]
CELLS = [nn.LSTMCell, nn.GRUCell]
SHAPES = [
    {},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def sqnr(want, got):
    want, got = torch.cat([w.flatten() for w in want]), torch.cat([g.flatten() for g in got])
    return float(10 * torch.log10((want**2).sum() / ((want - got) ** 2).sum()))


def leaves(result):
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def layer(kind, seed=0, **options):
    torch.manual_seed(seed)
    return kind(6, 16, **options).eval()


def run(program, *inputs):
    arrays = {n: t.numpy() for n, t in zip(program.inputs, leaves(inputs), strict=True)}
    results = interpret(program, arrays)
    return [results[n] for n in program.outputs]


class Wrapped(nn.Module):
    """A layer inside of a model, so that it has a name."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, state=None):
        return self.inner(x, state)


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8", "int8-weight", "int4-weight"])
def test_close_to_float(kind, options, recipe):
    model, x = layer(kind, **options), torch.randn(5, 4, 6)
    quantized = quantize(model, [x], recipe, progress=False)
    want, got = leaves(model(x)), leaves(quantized(x))
    assert [t.shape for t in got] == [t.shape for t in want]
    assert sqnr(want, got) > 35
    assert any(not torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_program_equals_the_module_at_every_size(kind, options):
    model = layer(kind, **options)
    quantized = quantize(model, [torch.randn(5, 4, 6)], "int8-dynamic", progress=False)
    program = lower(quantized, torch.randn(3, 2, 6))
    assert {op.kind for op in program.ops} & {"lstm", "gru"}
    for shape in ((3, 2, 6), (7, 5, 6), (1, 1, 6)):
        x = torch.randn(shape)
        for want, got in zip(leaves(quantized(x)), run(program, x), strict=True):
            assert np.array_equal(want.numpy(), got)


@pytest.mark.parametrize("kind", KINDS)
def test_given_states_and_their_program(kind):
    model = Wrapped(layer(kind, num_layers=2, batch_first=True))
    quantized = quantize(model, [torch.randn(3, 4, 6)], "int8-dynamic", progress=False)
    count = 2 if kind is nn.LSTM else 1

    def states(rows):
        found = tuple(torch.randn(2, rows, 16) for _ in range(count))
        return found if count == 2 else found[0]

    x, given = torch.randn(3, 4, 6), states(3)
    assert sqnr(leaves(model(x, given)), leaves(quantized(x, given))) > 35
    program = lower(quantized, (x, given), dynamic={"x": (0, 1), "state": (1,)})
    assert all(t.shape[1] == "batch" for n, t in program.inputs.items() if n != "x")
    for rows, steps in ((3, 4), (1, 9)):
        x, given = torch.randn(rows, steps, 6), states(rows)
        for want, got in zip(leaves(quantized(x, given)), run(program, x, given), strict=True):
            assert np.array_equal(want.numpy(), got)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_is_many_calls_that_pass_the_state_on(kind):
    model = layer(kind, num_layers=2)
    quantized = quantize(model, [torch.randn(5, 4, 6)], "int8-dynamic", progress=False)
    x = torch.randn(6, 3, 6)
    whole, last = quantized(x)
    first, middle = quantized(x[:2])
    second, end = quantized(x[2:], middle)
    assert torch.equal(whole, torch.cat([first, second]))
    assert all(torch.equal(a, b) for a, b in zip(leaves(last), leaves(end), strict=True))


@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input(kind, recipe, options):
    model = layer(kind, **options)
    quantized = quantize(model, [torch.randn(5, 4, 6)], recipe, progress=False)
    x = torch.randn(7, 6)
    directions = 2 if options.get("bidirectional") else 1
    given = torch.randn(directions, 16)
    given = (given, given + 1) if kind is nn.LSTM else given
    for hx in (None, given):
        want, got = leaves(model(x, hx)), leaves(quantized(x, hx))
        assert [t.shape for t in got] == [t.shape for t in want]
        assert sqnr(want, got) > 35


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-weight"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_each_sequence_alone(kind, sort, recipe):
    model = layer(kind, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 4, 6), torch.tensor([6, 5, 5, 2] if sort else [2, 6, 5, 2])
    quantized = quantize(model, [x], recipe, progress=False)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sort)
    out, last = quantized(packed)
    want_out, want_last = model(packed)
    assert torch.equal(out.batch_sizes, want_out.batch_sizes)
    assert sqnr([want_out.data], [out.data]) > 35
    assert sqnr(leaves(want_last), leaves(last)) > 35
    y, found = pad_packed_sequence(out)
    assert torch.equal(found, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, end = quantized(x[:n, i : i + 1])
        assert torch.allclose(y[:n, i : i + 1], alone, atol=1e-6)
        for a, b in zip(leaves(last), leaves(end), strict=True):
            assert torch.allclose(a[:, i : i + 1], b, atol=1e-6)


def test_a_model_that_packs_is_quantized():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 16), nn.Linear(16, 3)

        def forward(self, x, lengths):
            _, (h, _) = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return self.fc(h[-1])

    torch.manual_seed(0)
    model, batch = Model().eval(), (torch.randn(5, 3, 6), torch.tensor([5, 2, 4]))
    for recipe in ("int8", "int8-dynamic"):
        assert sqnr([model(*batch)], [quantize(model, [batch], recipe, progress=False)(*batch)]) > 25


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8", "int8-weight"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, recipe, bias):
    model = Wrapped(layer(kind, bias=bias))
    x, h = torch.randn(4, 6), torch.randn(4, 16)
    hx = (h, torch.randn(4, 16)) if kind is nn.LSTMCell else h
    quantized = quantize(model, [x], recipe, progress=False)
    for given in (None, hx):
        want, got = leaves(model(x, given)), leaves(quantized(x, given))
        assert [t.shape for t in got] == [t.shape for t in want]
        assert sqnr(want, got) > 35
    alone = leaves(quantized(x[0], None))
    assert [t.shape for t in alone] == [(16,)] * len(alone)
    program = lower(quantized, (x, hx), dynamic={0: (0,), 1: (0,)})
    for want, got in zip(leaves(quantized(x, hx)), run(program, x, hx), strict=True):
        assert np.allclose(want.numpy(), got, atol=0 if recipe != "int8-weight" else 1e-6)


@pytest.mark.parametrize(("kind", "cell"), list(zip(KINDS, CELLS, strict=True)))
def test_a_cell_is_one_step_of_the_layer(kind, cell):
    one, many = layer(cell), layer(kind)
    for name, parameter in one.named_parameters():
        parameter.data = getattr(many, f"{name}_l0").data
    x = torch.randn(4, 6)
    a = quantize(one, [x], "int8-dynamic", progress=False)(x)
    b, _ = quantize(many, [x[None]], "int8-dynamic", progress=False)(x[None])
    assert torch.equal(leaves(a)[0], b[0])


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_twin_is_the_float_layer_until_it_is_solved(kind):
    model = Wrapped(layer(kind))
    x = torch.randn(4, 6) if kind in CELLS else torch.randn(4, 3, 6)
    prepared = prepare(model, x, "int8-dynamic")
    assert prepared.inner is not model.inner
    assert isinstance(prepared.inner, kind)
    assert list(prepared.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert dict(prepared.named_parameters())[name] is parameter
    for want, got in zip(leaves(model(x)), leaves(prepared(x)), strict=True):
        assert torch.equal(want, got)
    calibrate(prepared, [x], progress=False)
    again = leaves(prepared(x))
    assert any(not torch.equal(a, b) for a, b in zip(leaves(model(x)), again, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), prepared.parameters(), strict=True))
    assert sqnr(leaves(model(x)), again) > 35


@pytest.mark.parametrize("kind", KINDS)
def test_weight_only_computes_in_float_from_the_codes(kind):
    model, x = layer(kind, num_layers=2), torch.randn(5, 3, 6)
    quantized = quantize(model, [x], "int8-weight", progress=False)
    plain = copy.deepcopy(model)
    for name in dict(plain.named_parameters()):
        if name.startswith("weight"):
            weight = getattr(quantized, name)
            getattr(plain, name).data = weight.codes.float() * weight.scale.float()
    for want, got in zip(leaves(plain(x)), leaves(quantized(x)), strict=True):
        assert torch.allclose(want, got, atol=1e-6)


def test_sites_are_called_as_the_weights():
    model = Wrapped(layer(nn.LSTM, num_layers=2, bidirectional=True))
    quantized = quantize(model, [torch.randn(5, 3, 6)], "int8-dynamic", progress=False)
    names = {str(site) for site in state(quantized).plan.sites()}
    assert {"inner:weight_ih_l0", "inner:weight_hh_l1_reverse", "inner:input"} <= names
    assert len(names) == 9
    solved = {e.site for e in state(quantized).journal.of("weight")}
    assert solved == names - {"inner:input"}
    assert all(e.data["sqnr_db"] > 35 for e in state(quantized).journal.of("weight"))


def test_scales_are_stored_in_16_bits_and_biases_once():
    model = layer(nn.LSTM)
    quantized = quantize(model, [torch.randn(5, 3, 6)], "int8-dynamic", progress=False)
    assert quantized.weight_ih_l0.scale.dtype == torch.bfloat16
    assert quantized.bias_hh_l0 is None
    assert torch.equal(quantized.bias_ih_l0, model.bias_ih_l0 + model.bias_hh_l0)
    program = lower(quantized, torch.randn(5, 3, 6))
    stored = 64 * 6 + 64 * 16 + 2 * 64 * 2 + 64 * 4  # codes, scales, bias
    assert program.nbytes == stored


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_projected_states_are_refused_by_name_and_can_be_kept():
    model = Wrapped(nn.LSTM(6, 16, proj_size=4).eval())
    x = torch.randn(5, 3, 6)
    with pytest.raises(UnrealisableSite, match=r"proj_size 4.*at inner.*recipe\.keep\('inner'\)"):
        quantize(model, [x], "int8", progress=False)
    both = nn.Sequential(nn.Linear(6, 6), model).eval()
    kept = quantize(both, [x], Recipe.preset("int8").keep("1.inner"), progress=False)
    assert type(kept[1].inner) is nn.LSTM
    assert "kept in float32" in state(kept).plan.kept["1.inner"]


def test_one_scale_for_all_rows_is_refused():
    rule = Rule(weight=QuantSpec.parse("int8n[1,*]"), input=QuantSpec.parse("uint8[*]+z"))
    with pytest.raises(UnrealisableSite, match=r"every row.*uint8\[1,\*\]"):
        prepare(Wrapped(layer(nn.GRU)), torch.randn(5, 3, 6), Recipe("x", (rule,)))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_sizes_are_named(kind):
    quantized = quantize(Wrapped(layer(kind)), [torch.randn(5, 3, 6)], "int8-dynamic", progress=False)
    with pytest.raises(InputError, match="7 features, not 6"):
        quantized(torch.randn(5, 3, 7))
    bad = torch.randn(1, 4, 16)
    with pytest.raises(InputError, match=r"initial state.*wanted \(1, 3, 16\)"):
        quantized(torch.randn(5, 3, 6), (bad, bad) if kind is nn.LSTM else bad)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_copies_and_files(kind):
    model = Wrapped(layer(kind))
    x = torch.randn(4, 6) if kind in CELLS else torch.randn(4, 3, 6)
    quantized = quantize(model, [x], "int8-dynamic", progress=False)
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(quantized), torch.load(buffer, weights_only=False)):
        for want, got in zip(leaves(quantized(x)), leaves(other(x)), strict=True):
            assert torch.equal(want, got)


def test_twins_copy_with_shared_parameters():
    prepared = prepare(layer(nn.LSTM), torch.randn(4, 3, 6), "int8-dynamic")
    other = copy.deepcopy(prepared, {id(p): p for p in prepared.parameters()})
    assert all(a is b for a, b in zip(prepared.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(other._flat_weights, other.parameters(), strict=True))
