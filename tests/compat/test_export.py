"""The names that torch took away give what they gave: a callable graph, an exported program."""

import pytest
import torch
from torch import fx, nn

from pennyweight.compat import export

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_a_captured_graph_is_called_like_the_model_and_shares_its_parameters():
    float_model, x = model().eval(), torch.randn(3, 4)
    graph = export.capture_pre_autograd_graph(float_model, (x,))
    assert isinstance(graph, fx.GraphModule)
    assert {n.target for n in graph.graph.nodes if n.op == "call_function"} >= {torch.ops.aten.linear.default}
    assert torch.equal(graph(x), float_model(x))
    assert dict(graph.named_parameters())["0.weight"] is float_model[0].weight


def test_the_mode_is_exported():
    x = torch.ones(64, 4)
    training = export.capture_pre_autograd_graph(model().train(), (x,))
    assert not torch.equal(training(x), training(x))
    inference = export.capture_pre_autograd_graph(model().eval(), (x,))
    assert torch.equal(inference(x), inference(x))


def test_sizes_that_may_vary_do():
    x, batch = torch.randn(3, 4), export.Dim("batch")
    graph = export.capture_pre_autograd_graph(model().eval(), (x,), dynamic_shapes=({0: batch},))
    assert graph(torch.randn(7, 4)).shape == (7, 2)


def test_keyword_arguments_are_taken():
    class Scaled(nn.Module):
        def forward(self, x, *, factor):
            return x * factor

    graph = export.capture_pre_autograd_graph(Scaled(), (torch.ones(2),), {"factor": torch.tensor(3.0)})
    assert graph(torch.ones(2), factor=torch.tensor(5.0)).tolist() == [5, 5]


def test_an_exported_program():
    x = torch.randn(3, 4)
    program = export.export_for_training(model().eval(), (x,))
    assert isinstance(program, torch.export.ExportedProgram)
    assert torch.equal(program.module()(x), model().eval()(x))


def test_other_names_are_those_of_torch():
    assert export.save is torch.export.save
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = export.nothing_like_it
