"""`nn.Embedding`: rows of codes, decoded as they are looked up."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pennyweight.nn import twins
from pennyweight.nn.integer import IntegerWeight
from pennyweight.nn.rounding import rounded, trained
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor


class TableTwin(nn.Module):
    """What twins of tables share: the float module's parameter and settings, and the table that is read."""

    weight: Tensor

    def __init__(self, module: nn.Embedding | nn.EmbeddingBag, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.weight = module.weight
        self.layer = layer
        self.solved: dict[str, QTensor] = {}

    def table(self) -> Tensor:
        """The weight as `rounding.rounded` gives it, [rows, width]."""
        return rounded(self, "weight", self.weight)


class EmbeddingTwin(TableTwin, nn.Embedding):
    """Looks up rows of the table."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """ids [...] -> [..., width]; of a solved table the rows that are looked up alone are decoded."""
        if "weight" in self.solved and not trained(self):
            found = self.solved["weight"].take(input.flatten())
            if found is not None:
                return found.dequantize().reshape(*input.shape, self.embedding_dim)
        return nn.functional.embedding(input, self.table(), self.padding_idx)


class IntegerEmbedding(IntegerWeight):
    """Converted: codes [rows, width], one scale per row or group.

    `weight` decodes the whole table, for code that reads it directly (tied or sliced tables).
    """

    bias = None

    @property
    def weight(self) -> Tensor:
        """The decoded table, [rows, width] float32."""
        ids = torch.arange(self.out_features, device=self.codes.device)
        return self.forward(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., width]."""
        out: Tensor = torch.ops.pennyweight.embedding(
            ids, self.codes, self.scale, self.zero, self.bits, self.shape[1]
        )
        return out


class TableFamily:
    """The weights of a family of tables, see `nn.Family`."""

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """One table."""
        table = cast("nn.Embedding | nn.EmbeddingBag", module)
        return {"weight": (table.num_embeddings, table.embedding_dim)}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """The table, [rows, width]."""
        return {"weight": cast("TableTwin", twin).weight.detach()}


class EmbeddingFamily(TableFamily):
    """See `nn.Family`."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """An `EmbeddingTwin`."""
        return EmbeddingTwin(cast("nn.Embedding", module), layer)

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerEmbedding`."""
        twin = cast("EmbeddingTwin", twin)
        return IntegerEmbedding(twin.layer, twin.solved["weight"], tuple(twin.weight.shape))


twins.add("Embedding", EmbeddingFamily())
