"""Convolutions: the module on codes, the program and the fake-quantized model are one thing."""

import numpy as np
import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.nn.conv import backward_weight, conv_matrix, forward_weight

CASES = {
    "1d": (nn.Conv1d(5, 7, 3, padding=1), (3, 5, 17)),
    "1d unbatched": (nn.Conv1d(5, 7, 3), (5, 17)),
    "2d": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 11, 13)),
    "2d pointwise": (nn.Conv2d(17, 9, 1), (2, 17, 5, 6)),
    "2d groups": (nn.Conv2d(12, 18, 3, groups=3, padding=(0, 2)), (2, 12, 7, 9)),
    "2d depthwise": (nn.Conv2d(19, 19, 5, groups=19, padding=2, stride=(2, 1)), (2, 19, 9, 8)),
    "2d multiplier": (nn.Conv2d(6, 12, 3, groups=6, bias=False), (2, 6, 8, 8)),
    "2d dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (2, 4, 9, 9)),
    "2d even same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 9)),
    "2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "2d replicate": (nn.Conv2d(4, 6, 5, padding=(2, 1), padding_mode="replicate"), (2, 4, 9, 9)),
    "1d reflect": (nn.Conv1d(4, 6, 5, padding=3, padding_mode="reflect"), (2, 4, 9)),
    "2d circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(3, 5, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 7, 6)),
    "transposed 1d": (nn.ConvTranspose1d(5, 4, 4, stride=2, padding=1), (2, 5, 9)),
    "transposed 2d": (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, padding=1), (2, 6, 5, 6)),
    "transposed groups": (nn.ConvTranspose2d(8, 6, 3, groups=2, dilation=2), (2, 8, 5, 6)),
    "transposed 3d": (nn.ConvTranspose3d(3, 4, 2, stride=2), (1, 3, 3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("recipe", ["int8", "int8-dynamic", "int8-weight"])
@pytest.mark.parametrize("name", CASES)
def test_module_program_and_model(name, recipe):
    torch.manual_seed(0)
    layer, shape = CASES[name]
    model = nn.Sequential(layer, nn.Hardswish()).eval()
    batches = [torch.randn(shape) for _ in range(3)]
    prepared = pw.calibrate(pw.prepare(model, batches[0], recipe), batches, progress=False)
    converted = pw.convert(prepared)
    with torch.no_grad():
        float_, fake, integer = (m(batches[1]) for m in (model, prepared, converted))
    assert integer.shape == float_.shape
    assert float((integer - float_).norm() / float_.norm()) < 0.02
    if recipe == "int8":
        torch.testing.assert_close(integer, fake, rtol=1e-4, atol=1e-4)
    program = pw.lower(converted, batches[0])
    got = next(iter(pw.interpret(program, {next(iter(program.inputs)): batches[1].numpy()}).values()))
    np.testing.assert_allclose(got, integer.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (8, 2, 5)])
def test_views_of_transposed_weights(shape):
    w = torch.randn(shape)
    for groups in (1, 2):
        forward = forward_weight(w, True, groups)
        assert forward.shape[0] == shape[1] * groups
        assert torch.equal(backward_weight(forward, True, groups), w)
        assert conv_matrix(w, True, groups).shape == (shape[1] * groups, w.numel() // (shape[1] * groups))


def test_output_sizes_of_transposed_layers():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return self.up(x, output_size=[10, 9])

    torch.manual_seed(0)
    model, x = Sized().eval(), torch.randn(2, 4, 5, 5)
    prepared = pw.calibrate(pw.prepare(model, x), [x], progress=False)
    with torch.no_grad():
        assert prepared(x).shape == model(x).shape == (2, 3, 10, 9)
        assert float((prepared(x) - model(x)).norm() / model(x).norm()) < 0.02
