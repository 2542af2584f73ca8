"""Weights of a block's errors: where the result moves the likelihood, and never nothing."""

import torch
from torch import nn

from pennyweight.reconstruction.samples import fisher


def test_weights_by_fisher_information():
    """Softmax regression: F of the logits is (p - onehot)^2, large where the model is unsure of the class it drew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[1].weight.copy_(20 * torch.eye(4, 6))
        model[1].bias.zero_()
        model[0].weight.copy_(torch.eye(6))
        model[0].bias.zero_()
    sure, unsure = torch.tensor([[1.0, 0, 0, 0, 0, 0]]), torch.zeros(1, 6)
    batches = [torch.cat([sure, unsure]), unsure.repeat(3, 1)]
    found = fisher(model, batches, model[1], seed=3)
    assert [tuple(f.shape) for f in found] == [(2, 4), (3, 4)]
    every = torch.cat(found)
    torch.testing.assert_close(every.mean(), torch.tensor(1.0))
    assert float(every.min()) >= 0.5
    assert float(every[0].max()) < 0.51  # the sure one: half of the plain error
    assert float(every[1:].max()) > 1.5
    logits = model(torch.cat(batches)).detach()
    parts = (every - 0.5) * 2  # F / mean F
    squares = (logits.softmax(1) - nn.functional.one_hot(parts.argmax(1), 4)) ** 2
    torch.testing.assert_close(parts[1:], (squares / squares.mean())[1:], rtol=1e-4, atol=1e-4)
