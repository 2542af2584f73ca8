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


class Block(nn.Module):
    """Two layers, something in between, a shortcut; what it computes itself is counted."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.runs = nn.Linear(6, 8), nn.Linear(8, 6), 0

    def forward(self, x):
        self.runs += 1
        return {"y": x + self.down(F.gelu(self.up(x)))}


class Ways(nn.Module):
    """Called twice, another layer each time."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, first):
        return self.one(x) if first else self.other(x)


class Blocks(nn.Module):
    """Two blocks, one module called twice, one whose layers are called past it, and a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList([Block(), Block()])
        self.ways, self.past, self.last = Ways(), Block(), nn.Linear(6, 6)

    def forward(self, x):
        for block in self.body:
            x = block(x)["y"]
        x = self.ways(self.ways(x, True), False)
        return self.last(self.past.down(self.past.up(x)))


def test_blocks_whose_layers_are_settled_answer_as_one():
    model, batches = Blocks().eval(), [torch.randn(n, 6) for n in (3, 4)]
    order = [
        "body.0.up",
        "body.0.down",
        "body.1.up",
        "body.1.down",
        "ways.one",
        "ways.other",
        "past.up",
        "past.down",
    ]
    order.append("last")
    replay = Replay(model, record(model, batches[0]), lambda: iter(batches), order)
    found: dict[str, list[str]] = {}
    with torch.no_grad():
        wanted = [model(x) for x in batches]
        for path in order:
            replay.settle(path)
            found[path] = list(replay._kept)
            runs = model.body[0].runs
            with replay.running():
                results = [model(x) for x in replay.batches()]
            assert all(torch.equal(r, w) for r, w in zip(results, wanted, strict=True))
            assert (model.body[0].runs == runs) == ("body.0" in found[path])
    assert found["body.0.up"] == ["body.0.up"]
    assert found["body.0.down"] == ["body.0"]
    assert found["body.1.up"] == ["body.0", "body.1.up"]
    assert found["body.1.down"] == ["body.0", "body.1"]
    assert found["last"] == ["body.0", "body.1", *order[4:]]


def test_a_layer_that_comes_again_holds_its_block_open():
    model, x = Blocks().eval(), torch.randn(3, 6)
    replay = Replay(
        model, record(model, x), lambda: [x], ["body.0.up", "body.0.down", "body.0.up", "body.0:add/0"]
    )
    replay.settle("body.0.down")
    replay.settle("body.0.up")
    assert sorted(replay._kept) == ["body.0.down", "body.0.up"]
