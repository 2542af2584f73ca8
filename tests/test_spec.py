"""Specs are values: text, JSON and pickle round trips, shapes of scales, and errors that name the nearest choice."""

import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.errors import RegistryError, SpecError
from pennyweight.formats import grids
from pennyweight.journal import Journal
from pennyweight.spec import QuantSpec

sizes = st.one_of(st.none(), st.integers(1, 4096))
blocks = st.lists(sizes, max_size=4).map(tuple).filter(lambda b: b != (None,))
plain = st.sampled_from(["fp32", "fp16", "bf16"])
flat = st.builds(
    QuantSpec, st.sampled_from(list(grids)), blocks, st.sampled_from(["none", "int", "float"]), plain
)
specs = st.builds(
    QuantSpec,
    st.sampled_from(list(grids)),
    blocks,
    st.sampled_from(["none", "int", "float"]),
    st.one_of(plain, flat, flat.map(lambda s: QuantSpec("uint8", (64,), "none", s))),
)


@given(specs)
def test_text_json_and_pickle_round_trip(spec):
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.parse(json.loads(json.dumps(str(spec)))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert hash(QuantSpec.parse(str(spec))) == hash(spec)
    log = Journal()
    log.add("site", "a:weight", spec=str(spec))
    assert QuantSpec.parse(Journal.from_json(log.to_json()).last("site").data["spec"]) == spec


@given(specs, specs)
def test_different_specs_have_different_texts(a, b):
    assert (str(a) == str(b)) == (a == b)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("int8[*]", QuantSpec("int8")),
        ("int8n[1,*]", QuantSpec("int8n", (1, None))),
        ("int4[128]+z", QuantSpec("int4", (128,), "int")),
        ("int4[32]+zf", QuantSpec("int4", (32,), "float")),
        (" int8 [4, 4] ", QuantSpec("int8", (4, 4))),
        ("uint8[1,*]+z^fp16", QuantSpec("uint8", (1, None), "int", "fp16")),
        ("int4[32]^(uint8[*])", QuantSpec("int4", (32,), "none", QuantSpec("uint8"))),
        ("int4[32]^(uint8[16]^(uint8[*]^bf16))",
         QuantSpec("int4", (32,), "none", QuantSpec("uint8", (16,), "none", QuantSpec("uint8", (), "none", "bf16")))),
    ],
)  # fmt: skip
def test_the_text_form(text, spec):
    assert QuantSpec.parse(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "int8", "int8[", "int8[]x", "int8[1;2]", "int8[*]+y", "int8[*]^", "int8[*]^fp8", "int8[0]", "int8[-4]",
     "int8[1.5]", "8[*]", "int8[*]^(uint8)", "int8[*]^(uint8[*]"],
)  # fmt: skip
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(SpecError):
        QuantSpec.parse(text)


def test_a_block_of_one_whole_axis_is_ambiguous():
    with pytest.raises(SpecError, match=r"\[1,\*\]"):
        QuantSpec("int8", (None,))


@given(specs.filter(lambda s: len(s.block) <= 3), st.data())
def test_scales_divide_the_tensor(spec, data):
    front = data.draw(st.lists(st.integers(0, 5), max_size=2))
    tail = [(b or 1) * data.draw(st.integers(1, 3)) for b in spec.block]
    shape = (*front, *tail)
    scales = spec.scale_shape(shape)
    assert len(scales) == len(shape)
    assert all(s == 0 == n or (s and n % s == 0) for n, s in zip(shape, scales, strict=True) if n or s)
    for size, blocks_, block in zip(
        tail, scales[len(front) :] if spec.block else (), spec.block, strict=False
    ):
        assert size // blocks_ == (size if block is None else block)
    if not spec.block:
        assert scales == (1,) * len(shape)


@pytest.mark.parametrize(
    ("text", "shape", "hint"),
    [("int4[32]", (8, 40), "nearest block that divides it is 40"), ("int4[1,64]", (8, 96), "is 48"),
     ("int8[4,4]", (6, 8), "is 3")],
)  # fmt: skip
def test_a_block_that_does_not_divide_names_the_nearest_that_does(text, shape, hint):
    with pytest.raises(SpecError, match="is not a multiple of the block") as caught:
        QuantSpec.parse(text).scale_shape(shape)
    assert hint in str(caught.value)
    assert str(shape) in str(caught.value)


def test_a_block_of_more_axes_than_the_tensor_is_refused():
    with pytest.raises(SpecError, match="2 axes, the tensor 1"):
        QuantSpec.parse("int8[1,*]").scale_shape((8,))


@pytest.mark.parametrize(
    ("text", "bits"),
    [("int8[*]", 8 + 32 / 4096), ("int8n[1,*]", 8 + 32 / 128), ("int4[32]^fp16", 4 + 16 / 32),
     ("int4[32]+z^fp16", 4 + 20 / 32), ("int4[32]+zf", 4 + 64 / 32), ("int4[32]^(uint8[*])", 4 + 8 / 32 + 32 / 4096)],
)  # fmt: skip
def test_bits_per_element_count_scales_and_zero_points(text, bits):
    assert QuantSpec.parse(text).bits_per_element((32, 128)) == pytest.approx(bits)


def test_an_unknown_grid_names_the_nearest():
    with pytest.raises(RegistryError, match="Did you mean 'int8"):
        QuantSpec("int88").bits_per_element((4,))
    assert math.isfinite(QuantSpec("int8").bits_per_element(()))


def test_codes_of_float_zero_points_are_the_nearest():
    from pennyweight.qtensor import QParams, quantize

    x = torch.linspace(-1.0, 2.0, 301)[None]
    params = QParams(torch.tensor([[0.2]]), torch.tensor([[5.4]]))
    q = quantize(x, QuantSpec.parse("uint4[1,*]+zf"), params)
    assert float((q.dequantize() - x).abs().max()) <= 0.1 + 1e-6
