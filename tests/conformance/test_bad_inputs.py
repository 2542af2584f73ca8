"""Every way to hold it wrong that a user will find on the first day: one clear error each, and nothing left behind."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import (
    EmptyCalibration,
    FormatError,
    GraphError,
    InputError,
    LowerError,
    NonFinite,
    NothingQuantized,
    RecipeError,
    UnusedRule,
)


@pytest.fixture
def file(cnn, pictures, tmp_path):
    return pw.save(pw.quantize(cnn, pictures), tmp_path / "model.dwt")


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((2, 3, 8, 8)), "is float64, not float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), "is uint8, not float32"),
        (np.zeros((3, 8, 8), np.float32), "wrong rank"),
        (np.zeros((2, 4, 8, 8), np.float32), "wrong shape"),
        (np.zeros((2, 8, 8, 3), np.float32), "wrong shape"),
    ],
)
def test_wrong_arrays_at_run(file, array, what):
    with pytest.raises(InputError, match=what):
        pw.load(file).run(array)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_calibration_that_is_not_finite(cnn, pictures, poison):
    pictures[2][1, 2, 3, 4] = poison
    with pytest.raises(NonFinite, match=r"1 of 384 values of calibration batch 2 .*input"):
        pw.quantize(cnn, pictures)


def test_values_that_stop_being_finite_inside(cnn, pictures):
    with torch.no_grad():
        cnn.stem.weight.fill_(3e38)
    with pytest.raises(NonFinite, match=r"depth|head|add|pool"):
        pw.quantize(cnn, [p * 1e3 for p in pictures], pw.Recipe.preset("int8").keep("stem"))


@pytest.mark.parametrize("batches", [[], (), iter([]), list, None])
def test_empty_calibration(cnn, batches):
    with pytest.raises(EmptyCalibration, match="no calibration batch"):
        pw.quantize(cnn, batches)


def test_an_example_but_no_calibration(cnn, pictures):
    with pytest.raises(EmptyCalibration, match=r"there is no batch.*int8-dynamic"):
        pw.quantize(cnn, [], example=pictures[0])


def test_labels_left_in_the_batches(cnn, pictures):
    with pytest.raises(GraphError, match=r"does not take such a batch.*images for images, labels"):
        pw.quantize(cnn, [(p, torch.zeros(2)) for p in pictures])


@pytest.mark.parametrize("match", ["head2", "layer*", "Stem"])
def test_a_rule_that_matches_nothing(cnn, pictures, match):
    with pytest.raises(UnusedRule, match=r"matches nothing.*(stem|head)"):
        pw.quantize(cnn, pictures, pw.Recipe.preset("int8").keep(match))


def test_a_model_without_anything_to_quantize(pictures):
    with pytest.raises(NothingQuantized, match="quantize nothing"):
        pw.quantize(nn.ReLU(), pictures, "int8-dynamic")


@pytest.mark.parametrize("name", ["int9", "INT8", ""])
def test_unknown_recipe(cnn, pictures, name):
    with pytest.raises(RecipeError, match=r"no recipe.*int8-dynamic"):
        pw.quantize(cnn, pictures, name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rules = [", "not TOML"),
        ('nme = "x"', r"unknown key 'nme'.*Did you mean 'name'"),
        ('[[rules]]\nwieght = "int8[*]"', r"unknown key 'wieght'.*Did you mean 'weight'"),
        ('[[passes]]\npass = "solv"', r"'solv'.*Did you mean 'solve'"),
        ('[[passes]]\npass = "solve"\nslver = "rtn"', r"unknown key 'slver'.*Did you mean 'solver'"),
    ],
)
def test_recipe_texts(text, what):
    with pytest.raises(RecipeError, match=what):
        pw.Recipe.parse(text)


@pytest.mark.parametrize("damage", ["truncated", "header", "data", "longer", "empty", "other"])
def test_damaged_files(file, damage):
    raw = bytearray(file.read_bytes())
    if damage == "header":
        raw[raw.index(b"quantize")] ^= 1
    elif damage == "data":
        raw[-3] ^= 64
    elif damage == "truncated":
        raw = raw[: len(raw) // 2]
    elif damage == "longer":
        raw += b"\0"
    else:
        raw = bytearray(b"" if damage == "empty" else b"\x89PNG" * 50)
    file.write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        pw.load(file)
    assert str(file) in str(caught.value)


class ReadsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        n = int(x.abs().sum().item()) % 3 + 1  # a size that depends on data
        return self.layer(x)[:, :n]


def test_a_model_that_cannot_be_exported(tmp_path):
    quantized = pw.quantize(ReadsItsInput().eval(), [torch.ones(2, 4)])
    with pytest.raises(
        LowerError, match=r"no whole-graph form.*test_bad_inputs\.py:\d+.*runs quantized all the same"
    ):
        pw.save(quantized, tmp_path / "a.dwt")
    assert list(tmp_path.iterdir()) == []
    assert quantized(torch.ones(2, 4)).shape[0] == 2
