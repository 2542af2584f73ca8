"""A tuned, measured and reported model."""

import pytest
import torch
from torch import nn

import pennyweight as pw


class Small(nn.Module):
    """A few layers, and one of a name that is markup."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.add_module("<b>body</b>", nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + getattr(self, "<b>body</b>")(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """The tuned model, its page, its file, and the page that the file makes."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    model = Small().eval()
    x = torch.randn(96, 3, 8, 8)
    y = model(x).argmax(1)

    def evaluate(candidate):
        return 100 * float(
            (candidate(x) == candidate(x).amax(1, keepdim=True)).float()[torch.arange(96), y].mean()
        )

    found = pw.tune(
        model, x[:64].split(16), evaluate=evaluate, goal=pw.Goal(max_drop=10.0, minimize="size"),
        formats=("int8", "int4"), samples=16, threads=1, progress=False,
    )  # fmt: skip
    page = pw.report(
        found.model, folder / "page.html", against=model, batches=x[64:].split(16), evaluate=evaluate,
        metric="top-1, %", threads=1, seconds=0.05, progress=False,
    )  # fmt: skip
    file = pw.save(found.model, folder / "model.dwt")
    again = pw.report(file, folder / "again.html")
    return found, page, file, again
