"""Finished modules are not computed again, and nothing else changes by that."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.pipeline import record
from pennyweight.reconstruction.capture import visit
from pennyweight.reconstruction.replay import Replay, _Gone


class Net(nn.Module):
    """A shortcut around the second layer, and results changed in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        y = F.relu_(self.a(x))
        y = y + self.b(y)
        return self.d(self.c(y).mul_(2))


@pytest.fixture
def replay():
    model, batches = Net().eval(), [torch.randn(n, 6) for n in (3, 4)]
    graph = record(model, batches[0])
    return Replay(model, graph, lambda: iter(batches)), model, batches


def seen(replay, model, name):
    found, runs = [], []
    handles = [m.register_forward_hook(lambda m, a, r: runs.append(m)) for m in (model.a, model.b, model.c)]
    forwards = {n: getattr(model, n).forward for n in "abcd"}
    with replay.running():
        computed = [n for n in "abc" if getattr(model, n).forward == forwards[n]]
        visit(
            model, replay.batches(), getattr(model, name), lambda args, kwargs: found.append(args[0].clone())
        )
    for handle in handles:
        handle.remove()
    return found, computed


def test_what_is_finished_answers_from_memory(replay):
    replay, model, _ = replay
    wanted, computed = seen(replay, model, "d")
    assert computed == ["a", "b", "c"]
    for name, left in (("a", ["b", "c"]), ("b", ["c"]), ("c", [])):
        results = replay.finish(name)
        assert [len(r) for r in results] == [3, 4]
        for _ in range(2):  # in-place operations behind it leave the memory as it is
            found, computed = seen(replay, model, "d")
            assert computed == left
            assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_what_nobody_reads_is_let_go(replay):
    replay, _, _ = replay
    replay.finish("a")
    replay.finish("b")
    assert not isinstance(replay._kept["a"][0], _Gone)  # the shortcut reads it
    replay.finish("c")
    assert [isinstance(replay._kept[n][0], _Gone) for n in "abc"] == [True, True, False]


def test_errors_leave_the_model_as_it_was(replay):
    replay, model, _ = replay
    replay.finish("a")
    with pytest.raises(KeyboardInterrupt), replay.running():
        raise KeyboardInterrupt
    assert "forward" not in model.a.__dict__
