"""Traces against their exact values."""

import pytest
import torch
from torch import nn

from pennyweight.errors import InputError
from pennyweight.tune.fisher import drawn_loss, fisher, hessian_traces, task_of


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def test_hutchinson_meets_the_exact_trace():
    model, x = mlp(), torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    weights = {"0": model[0].weight, "2": model[2].weight}

    def loss(output):
        return (output.softmax(-1)[:, 0] ** 2).mean() + 0.1 * (output**2).mean()

    exact = {}
    for name, layer in (("0", model[0]), ("2", model[2])):

        def of_weight(w, layer=layer):
            params = dict(model.named_parameters())
            key = next(n for n, p in params.items() if p is layer.weight)
            return loss(torch.func.functional_call(model, {**params, key: w}, x))

        h = torch.autograd.functional.hessian(of_weight, layer.weight.detach())
        exact[name] = float(h.reshape(layer.weight.numel(), -1).trace())
    runs = [hessian_traces(model, [x], weights, loss=loss, probes=50, seed=s) for s in range(8)]
    for name in weights:
        found = torch.tensor([r[name] for r in runs])
        assert float(found.mean()) == pytest.approx(exact[name], rel=0.1)
        assert float(found.std()) <= 0.1 * abs(exact[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task", ["logits", "values"])
def test_a_batch_gives_the_sum_of_its_rows(task):
    model, x = mlp(), torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    weight = model[0].weight
    rows = []
    for i in range(400):  # the true trace: rows one by one, targets drawn many times
        generator = torch.Generator().manual_seed(i)
        row = x[i % 8 : i % 8 + 1]
        (g,) = torch.autograd.grad(drawn_loss(model(row), task, generator), [weight])
        rows.append(float((g**2).sum()))
    runs = [fisher(model, [x], {"w": weight}, {"in": model[2]}, task=task, seed=s) for s in range(150)]
    exact = sum(rows) / len(rows)
    assert sum(r.weights["w"] for r in runs) / len(runs) == pytest.approx(exact, rel=0.15)
    assert all(r.inputs["in"] > 0 for r in runs)
    assert weight.grad is None


def test_tasks_are_told_apart():
    logits = torch.randn(16, 5) * torch.linspace(1, 2, 16)[:, None]
    assert task_of(logits) == "logits"
    assert task_of(nn.functional.normalize(logits)) == "values"
    assert task_of(torch.randn(4, 1)) == "values"
    assert task_of(logits, "values") == "values"
    with pytest.raises(InputError, match="Did you mean 'logits'"):
        task_of(logits, "logit")


def test_attention_can_be_differentiated_twice():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.lift(x)
            return self.out(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))

    torch.manual_seed(0)
    model = Attends().eval()
    traces = hessian_traces(model, [torch.randn(8, 5, 4)], {"lift": model.lift.weight}, probes=4)
    assert traces["lift"] != 0
