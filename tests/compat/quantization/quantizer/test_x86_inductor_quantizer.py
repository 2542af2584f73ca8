"""Settings of `X86InductorQuantizer`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e
from pennyweight.compat.quantization.quantizer import X86InductorQuantizer
from pennyweight.compat.quantization.quantizer.x86_inductor_quantizer import (
    get_default_x86_inductor_quantization_config as config,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.l, self.m = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        x = self.l(F.avg_pool2d(F.max_pool2d(x, 2), 2).flatten(1))
        x = x + self.m(x)
        return x @ x.T


X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sites(quantizer):
    torch.manual_seed(0)
    model = Net().eval()
    prepared = prepare_pt2e(capture_pre_autograd_graph(model, (X,)), quantizer)
    prepared(X)
    quantized = convert_pt2e(prepared)
    with torch.no_grad():
        want = model(X)
        assert (quantized(X) - want).abs().max() < 0.05 * want.abs().max()
    return {e.site.rpartition(":")[0] for e in pw.journal(quantized).of("site")}


def test_global_takes_the_sums_behind_convolutions_and_pools_between():
    assert sites(X86InductorQuantizer().set_global(config())) == {
        "a",
        "b",
        "l",
        "m",
        ":add/0",
        ":avg_pool2d/0",
    }


def test_matrix_products_are_asked_for():
    quantizer = X86InductorQuantizer().set_global(config()).set_function_type_qconfig(torch.matmul, config())
    assert ":matmul/0" in sites(quantizer)


def test_the_most_specific_setting_decides():
    quantizer = X86InductorQuantizer().set_global(config())
    quantizer.set_module_type_qconfig(nn.Linear, None).set_module_name_qconfig("m", config())
    assert sites(quantizer) == {"a", "b", "m", ":add/0", ":avg_pool2d/0"}
    assert sites(X86InductorQuantizer().set_function_type_qconfig(F.linear, config())) == {"l", "m"}
    assert sites(X86InductorQuantizer().set_module_name_qconfig("a", config())) == {"a"}


def test_a_reduced_range_is_not_needed():
    reduced = config(reduce_range=True)
    assert reduced.input_activation.quant_max == 127
    assert sites(X86InductorQuantizer().set_global(reduced)) == sites(
        X86InductorQuantizer().set_global(config())
    )


@pytest.mark.parametrize(
    "set_it",
    [
        lambda q: q.set_module_type_qconfig(nn.LSTM, config()),
        lambda q: q.set_function_type_qconfig(F.softmax, config()),
    ],
)
def test_what_it_does_not_quantize_is_said(set_it):
    with pytest.raises(pw.errors.InputError, match=r"(?i)lin|max"):
        set_it(X86InductorQuantizer())
