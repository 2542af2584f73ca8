"""The trap: switching an exported model between train and eval mode must change the mode and nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization.pt2e import (
    allow_exported_model_train_eval,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, eps=3e-3, momentum=0.7)
        self.planes = nn.Dropout2d(0.1)
        self.drop = nn.Dropout(0.9)
        self.slope = nn.RReLU()

    def forward(self, x):
        x = self.planes(self.slope(self.norm(self.conv(x)))).flatten(1)
        q = x[:, None]
        p = 0.4 if self.training else 0.0
        return self.drop(x) + F.scaled_dot_product_attention(q, q, q, dropout_p=p)[:, 0]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def constants(graph_module):
    """Every number among the operands of what heeds the mode, but the mode itself."""
    kinds = ("batch_norm", "dropout", "rrelu")
    found = [n.args for n in graph_module.graph.nodes if any(k in str(n.target) for k in kinds)]
    return [[a for a in args if isinstance(a, float)] for args in found]


@pytest.mark.parametrize("start", [True, False])
def test_every_hyper_parameter_survives_there_and_back(net, start):
    graph = capture_pre_autograd_graph(net.train(start), (X,))
    before = [c for c in constants(graph) if c]
    for _ in range(2):
        move_exported_model_to_eval(graph)
        move_exported_model_to_train(graph)
    after = [c for c in constants(graph) if c]
    assert [c for c in after if len(c) < 3][0] == before[0] == [0.7, 3e-3]
    assert {c[0] for c in after if len(c) == 1} == {0.1, 0.9}


def test_eval_mode_is_the_models_own(net):
    graph = capture_pre_autograd_graph(copy.deepcopy(net).train(), (X,))
    assert move_exported_model_to_eval(graph) is graph
    torch.testing.assert_close(graph(X), net.eval()(X))
    state = {k: v.clone() for k, v in graph.state_dict().items()}
    graph(X)
    assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())


def test_train_mode_is_the_models_own(net):
    graph = capture_pre_autograd_graph(copy.deepcopy(net).train(), (X,))
    move_exported_model_to_train(move_exported_model_to_eval(graph))
    for _ in range(2):
        torch.manual_seed(3)
        a = graph(X)
        torch.manual_seed(3)
        torch.testing.assert_close(a, net.train()(X))
    buffers = dict(graph.named_buffers())
    torch.testing.assert_close(buffers["norm.running_var"], net.norm.running_var)
    assert int(buffers["norm.num_batches_tracked"]) == int(net.norm.num_batches_tracked) == 2


def test_a_graph_made_in_eval_mode_counts_its_batches_in_train_mode(net):
    graph = move_exported_model_to_train(capture_pre_autograd_graph(net.eval(), (X,)))
    graph(X)
    assert int(dict(graph.named_buffers())["norm.num_batches_tracked"]) == 1


def test_train_and_eval_can_be_called_where_they_are_allowed(net):
    graph = capture_pre_autograd_graph(net.train(), (X,))
    with pytest.raises(NotImplementedError):
        graph.eval()
    assert allow_exported_model_train_eval(graph) is graph
    graph.eval()
    assert torch.equal(graph(X), graph(X)) and not graph.training
    graph.train()
    assert not torch.equal(graph(X), graph(X)) and graph.training
    assert torch.equal(*(graph.train(False)(X) for _ in range(2)))


def test_other_modules_are_switched_as_ever(net):
    assert not move_exported_model_to_eval(net).drop.training
    assert move_exported_model_to_train(net).drop.training
    assert allow_exported_model_train_eval(net) is net
    assert not model_is_exported(net)
    assert model_is_exported(capture_pre_autograd_graph(net, (X,)))
