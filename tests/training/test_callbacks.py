"""The schedule in trainers that own the loop, where these are installed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pennyweight as pw
from pennyweight import training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x=None, labels=None):
        y = self.b(torch.relu(self.a(x)))
        return y if labels is None else {"loss": F.cross_entropy(y, labels), "logits": y}


class Seen(training.Schedule):
    steps: list[int] = []

    def apply(self, model, step):
        self.steps.append(step)
        super().apply(model, step)


@pytest.fixture
def prepared():
    torch.manual_seed(0)
    Seen.steps.clear()
    return training.prepare(Net(), {"x": torch.randn(4, 8)}, weight="clipped", input="clipped")


ROWS = [{"x": torch.randn(8), "labels": torch.tensor(i % 3)} for i in range(32)]


def test_transformers(prepared, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the Trainer of transformers is not installed")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    callback = training.transformers_callback(Seen(quantize=2, freeze_ranges=4))
    transformers.Trainer(prepared, arguments, train_dataset=ROWS, callbacks=[callback]).train()
    assert Seen.steps == list(range(6))
    assert type(pw.convert(prepared.eval()).a).__name__ == "IntegerLinear"


def test_lightning(prepared):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Wrapped(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = prepared

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    callback = training.lightning_callback(Seen(quantize=2, freeze_ranges=4))
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Wrapped(), torch.utils.data.DataLoader(ROWS, batch_size=4))
    assert Seen.steps == list(range(6))
    assert type(pw.convert(prepared.eval()).a).__name__ == "IntegerLinear"


def test_without_them_the_error_says_what_is_missing():
    for name, make in (
        ("transformers", training.transformers_callback),
        ("lightning", training.lightning_callback),
    ):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(ImportError, match=name):
                make(training.Schedule())
