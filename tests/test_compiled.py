"""`pw.compile`: an ordinary module over the planned program: same results, same structures, few plans, clear refusals."""

import copy
import pickle
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn

import pennyweight as pw
from pennyweight.errors import InputError, LowerError
from pennyweight.runtime.engine import Engine


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 16), nn.Linear(16, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop(torch.relu(self.a(x))))


class Pair(NamedTuple):
    score: torch.Tensor
    note: None
    count: int
    hidden: list


class Tokens(nn.Module):
    """Keyword arguments, an option, a nested result."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, ids, scale=None, weight=None, double: bool = False):
        h = self.table(ids)
        if weight is not None:
            h = h * weight.unsqueeze(-1)
        y = self.out(h)
        return Pair(y.sum(-1) * (2 if double else 1), None, 3, [h, {"y": y}])


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
WEIGHT = torch.rand(2, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    return pw.quantize(Net().eval(), [X], progress=False)


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    return Tokens().eval()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_it_is_the_program(quantized, backend):
    fast = pw.compile(quantized, backend=backend)
    y = fast(X)
    assert isinstance(y, torch.Tensor)
    program = pw.lower(quantized, X)
    assert torch.equal(y, torch.from_numpy(pw.interpret(program, {"x": X.numpy()})[program.outputs[0]]))
    assert torch.allclose(y, quantized(X), atol=0.05)
    assert pw.journal(fast).events == pw.journal(quantized).events
    assert set(fast.state_dict()) == {f"module.{key}" for key in quantized.state_dict()}


def test_inputs_are_not_copied(quantized, monkeypatch):
    fast = pw.compile(quantized)
    seen = []
    plan = fast.session.engine.plan_for(((4, 8),))
    monkeypatch.setattr(plan, "call", lambda given, taken: seen.append((given, taken)))
    y = fast(X)
    assert seen == [([X.data_ptr()], [y.data_ptr()])]


def test_strided_inputs_and_any_size(quantized):
    fast = pw.compile(quantized)
    wide = torch.randn(8, 33)
    assert torch.equal(fast(wide.T[::2]), fast(wide.T[::2].contiguous()))
    for n in (1, 7, 32, 0):
        assert fast(torch.randn(n, 8)).shape == (n, 4)


def test_results_belong_to_the_caller(quantized):
    fast = pw.compile(quantized)
    first = fast(X)
    kept = first.clone()
    fast(X + 1)
    assert torch.equal(first, kept)


def test_structures_keywords_and_options(tokens):
    example = {"weight": WEIGHT, "ids": IDS}  # not in the order of the signature
    fast = pw.compile(tokens, example)
    want = tokens(IDS, weight=WEIGHT)
    for got in (
        fast(ids=IDS, weight=WEIGHT), fast(weight=WEIGHT, ids=IDS), fast(IDS, weight=WEIGHT)
    ):  # fmt: skip
        assert isinstance(got, Pair)
        assert got.note is None and got.count == 3
        assert torch.allclose(got.score, want.score, atol=1e-5)
        assert torch.allclose(got.hidden[0], want.hidden[0])
        assert torch.allclose(got.hidden[1]["y"], want.hidden[1]["y"], atol=1e-5)
    doubled = pw.compile(tokens, {"ids": IDS, "double": True})
    assert torch.allclose(doubled(IDS, double=True).score, 2 * tokens(IDS).score, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda f: f(IDS, None), "others than those"),
        (lambda f: f(IDS), "others than those"),
        (lambda f: f(IDS, weight=WEIGHT, double=True), "others than those"),
        (lambda f: f(IDS, WEIGHT), "others than those"),  # that is `scale`
        (lambda f: f(), "do not fit"),
        (lambda f: f(IDS, wieght=WEIGHT), "do not fit"),
        (lambda f: f(ids=IDS, weight="heavy"), "is a str, not a tensor"),
        (lambda f: f(ids=IDS.float(), weight=WEIGHT), "torch.float32, not torch.int64"),
        (lambda f: f(ids=IDS, weight=WEIGHT.double()), "torch.float64, not torch.float32"),
        (lambda f: f(ids=IDS[0], weight=WEIGHT), "wrong rank"),
        (lambda f: f(ids=IDS[:1], weight=WEIGHT), "2 in another|1 in one"),
        (lambda f: f(ids=IDS, weight=WEIGHT.to("meta")), "lies on meta"),
        (lambda f: f(ids=IDS + 1000, weight=WEIGHT), "out of range"),
    ],
)  # fmt: skip
def test_refusals(tokens, call, what):
    fast = pw.compile(tokens, {"ids": IDS, "weight": WEIGHT})
    with pytest.raises(InputError, match=what):
        call(fast)


def test_an_option_of_another_value(tokens):
    fast = pw.compile(tokens, {"ids": IDS, "double": False})
    with pytest.raises(InputError, match="was False when it was compiled, and is True"):
        fast(IDS, double=True)


def test_gradients_are_refused_where_they_would_be_lost(quantized):
    fast = pw.compile(quantized)
    x = X.clone().requires_grad_()
    with pytest.raises(InputError, match=r"requires a gradient.*no_grad") as refused:
        fast(x)
    assert ".module" in str(refused.value)
    with torch.no_grad():
        assert not fast(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(fast(x), fast(X))
    assert torch.equal(fast(x.detach()), fast(X))


def test_no_example_and_no_graph():
    with pytest.raises(LowerError, match="no example"):
        pw.compile(Net().eval())

    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(LowerError, match="whole-graph form"):
        pw.compile(Branching().eval(), X)


def test_one_plan_for_each_set_of_sizes(tokens):
    any_size = {"ids": (0, 1), "weight": (0, 1)}
    fast = pw.compile(tokens, {"ids": IDS, "weight": WEIGHT}, plans=40, dynamic=any_size)
    engine = fast.session.engine
    sizes = [(batch, length) for batch in (1, 2, 8, 32) for length in (3, 5, 9, 17, 33)]
    for _ in range(3):
        for batch, length in sizes:
            ids = torch.randint(0, 50, (batch, length))
            weight = torch.rand(batch, length)
            got = fast(ids=ids, weight=weight)
            assert torch.allclose(got.score, tokens(ids, weight=weight).score, atol=1e-5)
    assert engine.plans_made == len(sizes)


def test_the_least_recently_used_plan_goes(quantized):
    program = pw.lower(quantized, X)
    engine = Engine(program, threads=1, plans=3)
    plans = {n: engine.plan_for(((n, 8),)) for n in (1, 2, 3)}
    assert engine.plan_for(((1, 8),)) is plans[1]  # used again: now the latest
    engine.plan_for(((4, 8),))
    assert engine.plan_for(((1, 8),)) is plans[1]
    assert engine.plan_for(((3, 8),)) is plans[3]
    assert engine.plans_made == 4
    assert engine.plan_for(((2, 8),)) is not plans[2]
    assert engine.plans_made == 5
    y = torch.empty(2, 4)
    plans[2].call([X.data_ptr()], [y.data_ptr()])  # one thrown out still runs for whoever holds it
    assert torch.equal(y, torch.from_numpy(engine.run({"x": X[:2].numpy()})[program.outputs[0]]))


def test_sizes_that_are_fixed_are_named(tokens):
    fast = pw.compile(tokens, {"ids": IDS, "weight": WEIGHT})
    with pytest.raises(InputError, match=r"shapes \(1, 3\), wanted i64\[batch, 6\]"):
        fast(ids=IDS[:1, :3], weight=WEIGHT[:1, :3])


def test_many_threads_on_few_plans(quantized):
    fast = pw.compile(quantized, plans=2, threads=1)
    inputs = [torch.randn(n, 8) for n in range(1, 7)]
    want = [fast(x) for x in inputs]
    wrong = []

    def work(seed):
        for i in range(60):
            k = (i * seed) % 6
            if not torch.equal(fast(inputs[k]), want[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(s,)) for s in (1, 2, 3, 5)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []
    assert len(fast.session.engine._plans) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies(quantized, again):
    fast = pw.compile(quantized)
    other = again(fast)
    assert torch.equal(other(X), fast(X))
    assert other.session is not fast.session


def test_inside_another_model_saved_and_profiled(quantized, tmp_path):
    fast = pw.compile(quantized)
    outer = nn.Sequential(fast, nn.Softmax(-1))
    outer.train()
    assert torch.equal(outer(X), torch.softmax(fast(X), -1))  # without dropout, as ever
    path = pw.save(fast, tmp_path / "m.dwt")
    assert torch.equal(torch.from_numpy(pw.load(path).run(X.numpy())), fast(X))
    report = pw.profile(fast, X, against=Net().eval(), seconds=0.02)
    assert {"a", "b"} <= {layer.site for layer in report.layers}
    assert "Session(" in repr(fast)
