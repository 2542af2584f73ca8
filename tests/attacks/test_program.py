"""Files whose outer layer is right and whose program lies: each refused before anything runs."""

import json

import numpy as np
import pytest

from pennyweight.errors import FormatError
from pennyweight.runtime import load


def refuses(path, raw: bytes, what: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=what) as caught:
        load(path)
    assert str(path) in str(caught.value)


def set_attr(kind, key, value):
    def change(craft):
        craft.op(kind)[3][key] = value

    return change


def set_data(dtype, position, raw):
    """Overwrite bytes of the operand of an op."""

    def change(craft):
        kind, index = position
        begin = craft.header[craft.op(kind)[1][index]]["data_offsets"][0]
        craft.data[begin : begin + len(raw)] = raw

    return change


def f32(value):
    return np.float32(value).tobytes()


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


STRUCTURE = {
    "version": (lambda c: c.program.update(version=2), "program version 2 is unknown"),
    "version-text": (lambda c: c.program.update(version="1"), "program version '1'"),
    "missing-key": (lambda c: c.program.pop("symbols"), "lacks key 'symbols'"),
    "unknown-key": (lambda c: c.program.update(code="import os"), "unknown key 'code'"),
    "ops-object": (lambda c: c.program.update(ops={}), "ops is no list"),
    "op-short": (lambda c: c.program["ops"][0].pop(), "an op is not"),
    "op-null": (lambda c: c.program["ops"].__setitem__(0, None), "an op is not"),
    "op-kind-list": (lambda c: c.op("conv").__setitem__(0, []), "is no name"),
    "op-attrs-list": (lambda c: c.op("conv").__setitem__(3, []), "an op is not"),
    "site-newline": (lambda c: c.op("conv").__setitem__(4, "a\nb"), "is no name"),
    "site-nul": (lambda c: c.op("conv").__setitem__(4, "a\0b"), "is no name"),
    "site-escape": (lambda c: c.op("conv").__setitem__(4, "\x1b[31m"), "is no name"),
    "site-surrogate": (lambda c: c.op("conv").__setitem__(4, "\ud800"), "is no name"),
    "long-name": (lambda c: c.op("conv")[1].__setitem__(0, "x" * 2000), "is no name"),
    "unknown-op": (
        lambda c: c.op("conv").__setitem__(0, "conf"),
        "op 'conf' is unknown.*Did you mean 'conv'",
    ),
    "unknown-attr": (set_attr("conv", "zer", 1), "no attribute 'zer'"),
    "missing-attr": (lambda c: c.op("conv")[3].pop("groups"), "lacks attribute 'groups'"),
    "undefined": (
        lambda c: c.op("requant")[1].__setitem__(0, "nothing"),
        "reads 'nothing' before it is defined",
    ),
    "cycle": (lambda c: c.op("conv")[1].__setitem__(0, c.op("requant")[2][0]), "before it is defined"),
    "self": (lambda c: c.op("table")[1].__setitem__(0, c.op("table")[2][0]), "before it is defined"),
    "order": (lambda c: c.program["ops"].reverse(), "before it is defined"),
    "twice": (lambda c: c.op("table").__setitem__(2, list(c.op("requant")[2])), "defined twice"),
    "shadows-constant": (lambda c: c.op("table").__setitem__(2, [c.op("conv")[1][1]]), "defined twice"),
    "shadows-input": (lambda c: c.op("table").__setitem__(2, ["x"]), "defined twice"),
    "no-result": (lambda c: c.op("concat").__setitem__(2, []), "has 1 results, not 0|is not defined"),
    "two-results": (lambda c: c.op("concat")[2].append("more"), "has 1 results, not 2"),
    "no-operands": (lambda c: c.op("conv").__setitem__(1, []), "does not fit its operands"),
    "absent-operand": (lambda c: c.op("conv")[1].__setitem__(0, ""), "does not fit its operands"),
    "output-undefined": (lambda c: c.program["outputs"].append("nothing"), "output 'nothing' is not defined"),
    "tree-range": (lambda c: c.program.update(tree=99), "names output 99"),
    "tree-bool": (lambda c: c.program.update(tree=True), "names output True"),
    "tree-deep": (lambda c: c.program.update(tree=nested(60)), "tree is nested deeper"),
    "version-deep": (lambda c: c.program.update(version=nested(200)), "version .* is unknown"),
    "constant-deep": (lambda c: c.program["constants"].update(x=nested(200)), "constant 'x' is named"),
    "attribute-deep": (
        lambda c: c.program["ops"][0][3].update({next(iter(c.program["ops"][0][3])): nested(200)}),
        "is not",
    ),
    "tree-negative": (lambda c: c.program.update(tree=-1), "names output -1"),
    "input-dtype": (lambda c: c.program["inputs"][0].__setitem__(1, "f64"), "dtype 'f64'"),
    "input-twice": (lambda c: c.program["inputs"].append(c.program["inputs"][0]), "defined twice"),
    "input-size": (lambda c: c.program["inputs"][0][2].__setitem__(1, -3), "has a size '-3'"),
    "input-huge": (lambda c: c.program["inputs"][0][2].__setitem__(1, 2**40), "has a size"),
    "input-symbol": (lambda c: c.program["inputs"][0][2].__setitem__(0, "rows"), "has a size 'rows'"),
    "input-expression": (lambda c: c.program["inputs"][0][2].__setitem__(0, "2 * batch"), "has a size"),
    "symbol-unused": (lambda c: c.program["symbols"].update(spare=3), "'spare' is the size of no input"),
    "symbol-zero": (lambda c: c.program["symbols"].update(batch=0), "symbol 'batch' has size 0"),
    "symbol-huge": (lambda c: c.program["symbols"].update(batch=10**30), "symbol 'batch' has size"),
    "symbol-name": (lambda c: c.program["symbols"].update({"__import__('os')": 1}), "is no identifier"),
    "symbol-many": (lambda c: c.program.update(symbols={f"s{i}": 1 for i in range(40)}), "at most 16"),
    "constant-dtype": (lambda c: c.program["constants"].update({c.op("conv")[1][1]: "i4"}), "dtype 'i4'"),
    "constant-lie": (lambda c: c.program["constants"].update({c.op("conv")[1][1]: "u8"}), "but stored as I8"),
    "constant-missing": (lambda c: c.program["constants"].pop(c.op("conv")[1][1]), "is stored but not named"),
    "constant-extra": (lambda c: c.program["constants"].update(ghost="f32"), "is named but not stored"),
}

RANGES = {
    "nan-scale": (set_attr("quantize", "scale", {"float": "nan"}), "quantize.scale"),
    "inf-scale": (set_attr("quantize", "scale", {"float": "inf"}), "quantize.scale"),
    "zero-scale": (set_attr("quantize", "scale", 0.0), "quantize.scale"),
    "negative-scale": (set_attr("quantize", "scale", -1.0), "quantize.scale"),
    "tiny-scale": (set_attr("quantize", "scale", 1e-45), "quantize.scale"),
    "overflowing-scale": (set_attr("dequantize", "scale", 1e39), "dequantize.scale"),
    "zero-point": (set_attr("conv", "zero", 256), "conv.zero = 256 is not a code"),
    "zero-point-negative": (set_attr("conv", "zero", -1), "conv.zero"),
    "zero-point-float": (set_attr("conv", "zero", 1.5), "conv.zero"),
    "zero-point-bool": (set_attr("conv", "zero", True), "conv.zero"),
    "zero-point-null": (set_attr("conv", "zero", None), "conv.zero"),
    "clamp": (lambda c: c.op("requant")[3].update(lo=200, hi=100), "requant clamps to 200 .. 100"),
    "multiplier": (set_attr("add_q", "a_multiplier", {"float": "nan"}), "add_q.a_multiplier"),
    "multiplier-large": (set_attr("add_q", "a_multiplier", 1e39), "add_q.a_multiplier"),
    "stride-zero": (set_attr("conv", "stride", [0, 1]), "conv.stride"),
    "stride-negative": (set_attr("conv", "stride", [-1, 1]), "conv.stride"),
    "stride-long": (set_attr("conv", "stride", [1] * 50), "conv.stride"),
    "pads-negative": (set_attr("conv", "pads", [-1, 0, 0, 0]), "pads must not be negative"),
    "pads-huge": (set_attr("conv", "pads", [2**31 - 1] * 4), "absurd size|do not broadcast"),
    "groups": (set_attr("conv", "groups", 0), "conv.groups"),
    "groups-odd": (set_attr("conv", "groups", 2), "do not fit a weight"),
    "perm": (set_attr("transpose", "perm", [0, 0, 1, 2]), "not a list of different axes"),
    "perm-short": (set_attr("transpose", "perm", [1, 0]), "no permutation"),
    "perm-bool": (set_attr("transpose", "perm", [False, True, 2, 3]), "transpose.perm"),
    "axes-twice": (set_attr("sum_q", "axes", [1, 1]), "sum_q.axes"),
    "axes-negative": (set_attr("sum_q", "axes", [-1]), "sum_q.axes"),
    "function": (set_attr("unary", "fn", "eval"), "unknown function 'eval'"),
    "function-object": (set_attr("unary", "fn", {"a": 1}), "unary.fn"),
    "reduction": (set_attr("reduce", "fn", "system"), "unknown reduction"),
    "cast": (set_attr("cast", "dtype", "object"), "cast to object"),
    "bits": (set_attr("linear_w", "bits", 3), "codes|bits"),
    "nibbles": (set_attr("linear_w", "n", 3), "does not fit rows of 3"),
    "nibbles-long": (set_attr("linear_w", "n", 2**30), "do not hold rows"),
    "grouped-bits": (set_attr("linear_grouped", "bits", 8), "an operand is u4, wanted i8"),
    "grouped-long": (set_attr("linear_grouped", "n", 3), "does not fit rows of 3"),
    "grouped-uneven": (
        lambda c: c.op("linear_grouped")[1].__setitem__(2, c.op("linear_w")[1][2]),
        r"scales \(5, 2\) for 6 rows",
    ),
    "grouped-zero-points": (
        lambda c: c.op("linear_grouped")[1].__setitem__(3, c.op("conv")[1][2]),
        r"run-time zero points have shape \(4,\)",
    ),
    "fill-code": (set_attr("pad", "value", 256), "fills u8 with 256"),
    "fill-negative": (set_attr("pad", "value", -1), "fills u8 with -1"),
    "fill-fraction": (set_attr("stuff", "value", 0.5), "fills u8 with 0.5"),
    "fill-infinite": (set_attr("stuff", "value", {"float": "inf"}), "fills u8 with inf"),
    "repeats": (set_attr("upsample", "repeats", [2**31 - 1, 2**31 - 1, 2, 2]), "absurd size"),
    "factors": (set_attr("stuff", "factors", [1, 2**30, 2**30, 1]), "absurd size"),
    "iota": (set_attr("iota", "size", 2**31 - 1), None),
    "full": (set_attr("full", "shape", [2**20, 2**20]), "absurd size"),
    "expand": (
        set_attr("expand", "shape", [2**31 - 1, 2**31 - 1, 1, 5]),
        "do not broadcast|absurd size|does not expand",
    ),
    "rank": (set_attr("full", "shape", [1] * 12), "absurd size"),
    "expression-code": (set_attr("full", "shape", ["__import__('os').system('true')"]), "full.shape"),
    "expression-call": (set_attr("full", "shape", ["batch()"]), "is not a size"),
    "expression-power": (set_attr("full", "shape", ["9**9**9**9"]), "is not a size"),
    "expression-long": (set_attr("full", "shape", ["batch+" * 200 + "1"]), "full.shape"),
    "expression-deep": (set_attr("full", "shape", ["(" * 240 + "1" + ")" * 240]), "is not a size"),
    "expression-minus": (set_attr("full", "shape", ["-" * 400 + "1"]), None),
    "expression-big": (set_attr("full", "shape", ["*".join(["9" * 40] * 12)]), "absurd size|does not fit"),
    "expression-zero": (set_attr("full", "shape", ["batch // 0"]), "is not a size"),
    "expression-symbol": (set_attr("full", "shape", ["rows"]), "is not a size"),
    "expression-negative": (set_attr("full", "shape", ["batch - 5"]), "absurd size"),
    "slice-outside": (set_attr("slice", "stops", [9, 3, 4, 4]), "slice 0:9"),
    "nan-multiplier": (set_data("f32", ("requant", 1), f32(np.nan)), "requant is not finite"),
    "inf-rescale": (set_data("f32", ("rescale", 1), f32(np.inf)), "rescale is not finite"),
    "nan-weight-scale": (set_data("f32", ("linear_w", 2), f32(np.nan)), "linear_w is not finite"),
    "nan-group-scale": (set_data("f32", ("linear_grouped", 2), f32(np.nan)), "linear_grouped is not finite"),
    "inf-group-bias": (set_data("f32", ("linear_grouped", 5), f32(np.inf)), "linear_grouped is not finite"),
    "nan-table-scale": (set_data("f32", ("embedding", 2), f32(-np.inf)), "embedding is not finite"),
    "nan-lstm": (set_data("f32", ("lstm", 4), f32(np.nan)), "lstm is not finite"),
    "truth": (set_data("bool", ("where", 0), b"\2"), "truth values other than 0 and 1"),
    "bias": (set_data("i32", ("conv", 2), np.int32(2**31 - 1).tobytes()), "sums of conv can reach"),
    "bias-low": (set_data("i32", ("linear", 2), np.int32(-(2**31)).tobytes()), "sums of linear can reach"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(craft, tmp_path, name):
    change, what = STRUCTURE[name]
    change(craft)
    refuses(tmp_path / "a.dwt", craft.bytes(), what)


@pytest.mark.parametrize("name", RANGES)
def test_ranges(craft, tmp_path, name):
    change, what = RANGES[name]
    change(craft)
    if what is None:  # strange, but within every promise: it must load
        path = tmp_path / "a.dwt"
        path.write_bytes(craft.bytes())
        assert load(path, backend="reference").program.ops
    else:
        refuses(tmp_path / "a.dwt", craft.bytes(), what)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "program is not JSON"),
        ("null", "no JSON object"),
        ("[]", "no JSON object"),
        ("{", "program is not JSON"),
        ('{"version": 1, "version": 1}', "twice"),
        ('{"version": 1e999}', "version inf"),
        ('{"version": NaN}', "NaN is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"tree":' * 900, "nested too deeply|not JSON"),
        ('{"version": 1, "tree": ' + "[" * 60 + "]" * 60 + "}", "lacks key"),
        ('{"version": ' + "1" * 5000 + "}", "program is not JSON"),
    ],
)
def test_texts(craft, tmp_path, text, what):
    refuses(tmp_path / "a.dwt", craft.bytes(text=text), what)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("pennyweight.format", "3", "format version '3' is unknown.*newer"),
        ("pennyweight.format", None, "'pennyweight.format' is missing"),
        ("pennyweight.program", None, "'pennyweight.program' is missing"),
        ("pennyweight.secret", "x", "metadata key 'pennyweight.secret' is unknown"),
        ("pennyweight.meta", "[]", "meta is no JSON object"),
        ("pennyweight.meta", "{", "meta is not JSON"),
        ("pennyweight.meta", '{"a":' * 40 + "1" + "}" * 40, "nested deeper"),
    ],
)
def test_metadata(craft, tmp_path, key, value, what):
    if value is None:
        del craft.metadata[key]
    else:
        craft.metadata[key] = value
    refuses(tmp_path / "a.dwt", craft.bytes(), what)


def test_a_broken_meta_is_told_when_it_is_asked_for(craft, tmp_path):
    craft.metadata["pennyweight.meta"] = "{"
    path = tmp_path / "a.dwt"
    path.write_bytes(craft.bytes())
    session = load(path, backend="reference")
    for _ in range(2):
        with pytest.raises(FormatError, match=r"meta is not JSON.*a\.dwt"):
            _ = session.program.meta


def test_foreign_metadata_is_kept(craft, tmp_path):
    craft.metadata["author"] = "somebody"
    path = tmp_path / "a.dwt"
    path.write_bytes(craft.bytes())
    assert load(path, backend="reference").program.ops


def test_journal_of_another_shape_does_not_break_reading(craft, tmp_path):
    craft.metadata["pennyweight.meta"] = json.dumps({"journal": {"not": "a list"}})
    path = tmp_path / "a.dwt"
    path.write_bytes(craft.bytes())
    assert load(path, backend="reference").program.meta == {"journal": {"not": "a list"}}
