"""`nn.EmbeddingBag`: rows of codes, decoded as they are looked up, then summed, averaged or maximised per bag."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.nn import twins
from pennyweight.nn.embedding import TableFamily, TableTwin
from pennyweight.nn.integer import IntegerWeight
from pennyweight.plan import LayerPlan


class EmbeddingBagTwin(TableTwin, nn.EmbeddingBag):
    """Sums, averages or maximises rows of the table."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None  # noqa: A002
    ) -> Tensor:  # fmt: skip
        """As `nn.EmbeddingBag`."""
        weight = self.table()
        return F.embedding_bag(
            input, weight, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=self.padding_idx,
        )  # fmt: skip


class IntegerEmbeddingBag(IntegerWeight):
    """Converted: codes [rows, width], one scale per row or group. Empty bags give zeros.

    Bags of equal size, ids [N, L], have a program form; ids with offsets run here only.
    """

    bias = None

    def __init__(self, twin: EmbeddingBagTwin) -> None:
        super().__init__(twin.layer, twin.solved["weight"], tuple(twin.weight.shape))
        self.bag_mode, self.padding_idx = twin.mode, twin.padding_idx
        self.include_last_offset = twin.include_last_offset

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """ids [N, L], or [n] with offsets [N]; weights like ids -> [N, width].

        Raises:
            InputError: if bags are given twice, or not at all.
        """
        if (ids.dim() == 1) == (offsets is None):
            raise InputError(
                "bags are either rows of ids, or offsets into a list of ids", site=self.layer.name
            )
        rows: Tensor = torch.ops.pennyweight.embedding(
            ids, self.codes, self.scale, self.zero, self.bits, self.shape[1]
        )
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        keep = None if self.padding_idx is None else (ids != self.padding_idx).unsqueeze(-1)
        if offsets is None:
            return self._rows(rows, keep)
        return self._offsets(rows, keep, offsets[:-1] if self.include_last_offset else offsets)

    def _rows(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        """[N, L, width], keep [N, L, 1] -> [N, width]."""
        if self.bag_mode == "max":
            if keep is None:
                return rows.amax(1)
            best = rows.masked_fill(~keep, float("-inf")).amax(1)
            return best.masked_fill(best == float("-inf"), 0.0)
        if keep is None:
            return rows.sum(1) if self.bag_mode == "sum" else rows.mean(1)
        total = (rows * keep.to(rows.dtype)).sum(1)
        return total if self.bag_mode == "sum" else total / keep.to(rows.dtype).sum(1).clamp(min=1.0)

    def _offsets(self, rows: Tensor, keep: Tensor | None, offsets: Tensor) -> Tensor:
        """[n, width], keep [n, 1], offsets [N] -> [N, width]."""
        place = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets, place, right=True) - 1
        if keep is not None:
            chosen = keep.squeeze(-1)
            rows, bag = rows[chosen], bag[chosen]
        out = rows.new_zeros(offsets.shape[0], rows.shape[1])
        if self.bag_mode == "max":
            places = bag.unsqueeze(-1).expand_as(rows)
            return out.scatter_reduce(0, places, rows, "amax", include_self=False)
        total = out.index_add(0, bag, rows)
        if self.bag_mode == "sum":
            return total
        counts = torch.bincount(bag, minlength=offsets.shape[0]).clamp(min=1)
        return total / counts.unsqueeze(-1).to(total.dtype)


class EmbeddingBagFamily(TableFamily):
    """See `nn.Family`."""

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """An `EmbeddingBagTwin`.

        Raises:
            UnrealisableSite: if the module renormalises its rows as it reads them.
        """
        bag = cast("nn.EmbeddingBag", module)
        if bag.max_norm is not None:
            raise UnrealisableSite(
                "an EmbeddingBag with max_norm changes its weight as it runs",
                site=layer.name,
                hint=f"Keep it in float: recipe.keep({layer.name!r}).",
            )
        return EmbeddingBagTwin(bag, layer)

    def convert(self, twin: nn.Module) -> nn.Module:
        """An `IntegerEmbeddingBag`."""
        return IntegerEmbeddingBag(cast("EmbeddingBagTwin", twin))


twins.add("EmbeddingBag", EmbeddingBagFamily())
