"""`nn.LSTM`, `nn.GRU` and their cells: twins and integer modules.

Inputs and states are ranged row by row at every step, so nothing is calibrated: static recipes treat these layers as
dynamic. With float activations (weight-only recipes) the codes are decoded at each call and torch computes in float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pennyweight.errors import InputError, UnrealisableSite
from pennyweight.nn import twins
from pennyweight.nn.integer import IntegerWeight
from pennyweight.nn.rounding import ROUNDING, rounded
from pennyweight.plan import LayerPlan
from pennyweight.qtensor import QTensor

States = tuple[Tensor, ...]  # (h, c) or (h,)


class RecurrentTwin(nn.RNNBase):
    """An LSTM or GRU with the float module's own parameters; solved weights stand in once there are some."""

    def __init__(self, module: nn.RNNBase, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        _adopt(self, module)
        self._flat_weights_names = list(cast("Any", module)._flat_weights_names)
        self._all_weights = [list(names) for names in cast("Any", module)._all_weights]
        self._init_flat_weights()
        self.layer = layer
        self.solved: dict[str, QTensor] = {}

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 (the name of the class this is a twin of)
        """As the float module."""
        if not self.solved and ROUNDING not in self._modules:
            return super().forward(input, hx)
        shared = self._flat_weights
        self._flat_weights = [rounded(self, n, getattr(self, n)) for n in self._flat_weights_names]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = shared


class LSTMTwin(RecurrentTwin, nn.LSTM):
    """See `RecurrentTwin`."""


class GRUTwin(RecurrentTwin, nn.GRU):
    """See `RecurrentTwin`."""


class CellTwin(nn.RNNCellBase):
    """One step of an LSTM or GRU with the float module's own parameters."""

    step: Callable[..., Any]

    def __init__(self, module: nn.RNNCellBase, layer: LayerPlan) -> None:
        nn.Module.__init__(self)
        _adopt(self, module)
        self.layer = layer
        self.solved: dict[str, QTensor] = {}

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        """As the float module."""
        x, states, batched = cell_operands(input, hx, self.hidden_size, isinstance(self, nn.LSTMCell))
        w_ih, w_hh = (rounded(self, n, getattr(self, n)) for n in ("weight_ih", "weight_hh"))
        return cell_step(x, states, w_ih, w_hh, self.bias_ih, self.bias_hh, batched)


class LSTMCellTwin(CellTwin, nn.LSTMCell):
    """See `CellTwin`."""


class GRUCellTwin(CellTwin, nn.GRUCell):
    """See `CellTwin`."""


def _adopt(twin: nn.Module, module: nn.Module) -> None:
    """Take over the settings of a module, and share its parameters."""
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(twin, name, value)
    for name, parameter in module._parameters.items():
        twin.register_parameter(name, parameter)


def cell_operands(x: Tensor, hx: Any, hidden: int, two: bool) -> tuple[Tensor, States, bool]:
    """Input [N, I] and states [N, H] of a cell, zeros where none are given, and whether the input came in a batch."""
    batched = x.dim() == 2
    x = x if batched else x.unsqueeze(0)
    states: States
    if hx is None:
        states = tuple(x.new_zeros(x.shape[0], hidden) for _ in range(2 if two else 1))
    else:
        given = tuple(hx) if two else (hx,)
        states = given if batched else tuple(s.unsqueeze(0) for s in given)
    return x, states, batched


def cell_step(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, batched: bool
) -> Any:
    """One float step; the result as the torch module gives it."""
    if len(states) == 2:
        out: States = torch.lstm_cell(x, states, w_ih, w_hh, b_ih, b_hh)
    else:
        out = (torch.gru_cell(x, states[0], w_ih, w_hh, b_ih, b_hh),)
    return cell_result(out, batched)


def cell_result(states: States, batched: bool) -> Any:
    """`(h, c)` or `h`, without the batch axis where the input had none."""
    out = states if batched else tuple(s.squeeze(0) for s in states)
    return out if len(out) == 2 else out[0]


class IntegerRecurrent(nn.Module):
    """What converted recurrent modules share: an `IntegerWeight` by the name of each float weight, and the biases.

    Both biases of an LSTM's gate are added to the same sum; on codes they are stored as one, `float32(b_ih + b_hh)`.
    """

    def __init__(self, twin: Any, suffixes: list[str]) -> None:
        super().__init__()
        self.layer: LayerPlan = twin.layer
        self.lstm = isinstance(twin, nn.LSTM | nn.LSTMCell)
        self.hidden_size, self.input_size = twin.hidden_size, twin.input_size
        self.suffixes = suffixes
        for suffix in suffixes:
            for name in ("weight_ih", "weight_hh"):
                q: QTensor = twin.solved[name + suffix]
                weight = IntegerWeight(self.layer, q, tuple(q.codes.shape))
                if isinstance(q.scale, Tensor):  # kept as stored: next to short rows, scales count
                    weight.scale = q.scale.reshape(weight.scale.shape).clone()
                self.add_module(name + suffix, weight)
            b_ih, b_hh = (getattr(twin, name + suffix, None) for name in ("bias_ih", "bias_hh"))
            if self.lstm and self.dynamic and b_ih is not None and b_hh is not None:
                b_ih, b_hh = b_ih.detach() + b_hh.detach(), None
            for name, bias in (("bias_ih", b_ih), ("bias_hh", b_hh)):
                self.register_buffer(name + suffix, None if bias is None else bias.detach().float())

    @property
    def dynamic(self) -> bool:
        """Whether inputs and states are rounded to codes; otherwise the weights are decoded."""
        return bool(self.layer.inputs)

    def codes(self, suffix: str) -> tuple[Any, ...]:
        """Weights, scales and biases of one layer and direction, in the order of the opaque ops."""
        w_ih, w_hh = (cast("IntegerWeight", getattr(self, n + suffix)) for n in ("weight_ih", "weight_hh"))
        biases = getattr(self, "bias_ih" + suffix), getattr(self, "bias_hh" + suffix)
        return w_ih.codes, w_ih.scale.float(), w_hh.codes, w_hh.scale.float(), *biases

    def floats(self, suffix: str) -> list[Any]:
        """Decoded weights and the biases of one layer and direction, in torch's order."""
        weights = [
            torch.ops.pennyweight.decode(w.codes, w.scale.float(), w.zero, w.bits, w.in_features)
            for w in (getattr(self, n + suffix) for n in ("weight_ih", "weight_hh"))
        ]
        return [*weights, getattr(self, "bias_ih" + suffix), getattr(self, "bias_hh" + suffix)]

    def step(self, x: Tensor, states: States, suffix: str, reverse: bool = False) -> tuple[Tensor, States]:
        """One layer, one direction, on codes: [T, N, I] -> [T, N, H] and the last states [N, H]."""
        op = torch.ops.pennyweight.lstm if self.lstm else torch.ops.pennyweight.gru
        y, *last = op(x, *states, *self.codes(suffix), reverse)
        return y, tuple(last)

    def extra_repr(self) -> str:
        """Scheme, for printing."""
        kind = "dynamic" if self.dynamic else "weight"
        return (
            f"{self.layer.kind}, {kind}, weight={self.layer.weight}, {self.input_size} -> {self.hidden_size}"
        )


class IntegerSequence(IntegerRecurrent):
    """A converted `nn.LSTM` or `nn.GRU`: the same inputs and outputs, packed sequences too."""

    def __init__(self, twin: RecurrentTwin) -> None:
        names = [n.removeprefix("weight_ih") for n in twin._flat_weights_names if n.startswith("weight_ih")]
        super().__init__(twin, names)
        self.num_layers, self.batch_first = twin.num_layers, twin.batch_first
        self.bidirectional, self.bias = twin.bidirectional, twin.bias

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002
        """[T, N, I], [N, T, I] if batch_first, [T, I] or a PackedSequence -> (same with H, (h, c) or h).

        Raises:
            InputError: if input or states have the wrong size.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        y, last = self._run(x, self._states(x, hx, batched))
        if not batched:
            return y.squeeze(1), self._result(tuple(s.squeeze(1) for s in last))
        return y.transpose(0, 1) if self.batch_first else y, self._result(last)

    def _result(self, states: States) -> Any:
        return states if self.lstm else states[0]

    def _states(self, x: Tensor, hx: Any, batched: bool) -> list[States]:
        """Initial states [N, H] of every layer and direction."""
        if x.shape[-1] != self.input_size:
            raise InputError(
                f"the input has {x.shape[-1]} features, not {self.input_size}", site=self.layer.name
            )
        shape = (len(self.suffixes), x.shape[1], self.hidden_size)
        if hx is None:
            zeros = x.new_zeros(shape[1:])
            return [(zeros,) * (2 if self.lstm else 1)] * len(self.suffixes)
        states: States = tuple(hx) if self.lstm else (hx,)
        states = states if batched else tuple(s.unsqueeze(1) for s in states)
        for s in states:
            if s.dim() != 3 or any(a != b for a, b in zip(s.shape, shape, strict=True)):
                raise InputError(
                    "an initial state has the wrong shape",
                    site=self.layer.name,
                    shapes=f"{s.shape}, wanted {shape}",
                )
        return [tuple(s[i] for s in states) for i in range(len(self.suffixes))]

    def _run(self, x: Tensor, states: list[States]) -> tuple[Tensor, States]:
        """[T, N, I] -> y [T, N, directions * H], last states [layers * directions, N, H]."""
        if not self.dynamic:
            return self._float(x, states)
        directions = 2 if self.bidirectional else 1
        last: list[States] = []
        for first in range(0, len(self.suffixes), directions):
            outputs = []
            for i in range(first, first + directions):
                y, end = self.step(x, states[i], self.suffixes[i], reverse=i > first)
                outputs.append(y)
                last.append(end)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return x, tuple(torch.stack(kind) for kind in zip(*last, strict=True))

    def _float(self, x: Tensor, initial: list[States]) -> tuple[Tensor, States]:
        states = tuple(torch.stack(kind) for kind in zip(*initial, strict=True))
        flat = [w for suffix in self.suffixes for w in self.floats(suffix) if w is not None]
        rest = (flat, bool(self.bias), self.num_layers, 0.0, False, self.bidirectional, False)
        if self.lstm:
            y, *last = torch.lstm(x, states, *rest)
        else:
            y, *last = torch.gru(x, states[0], *rest)
        return y, tuple(last)

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Sequences of equal length run together; rows do not touch each other, so each gets what it would alone."""
        x, lengths = pad_packed_sequence(packed)  # [T, N, I], in the order before sorting
        states = self._states(x, hx, batched=True)
        y = x.new_zeros(*x.shape[:2], (2 if self.bidirectional else 1) * self.hidden_size)
        last = tuple(torch.stack([torch.zeros_like(s)] * len(states)) for s in states[0])
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            part, end = self._run(x[:length, rows], [tuple(s[rows] for s in one) for one in states])
            y[:length, rows] = part
            for whole, some in zip(last, end, strict=True):
                whole[:, rows] = some
        if packed.sorted_indices is not None:
            order = packed.sorted_indices
            y, lengths = y.index_select(1, order), lengths[order.cpu()]
        data = pack_padded_sequence(y, lengths).data
        out = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return out, self._result(last)


class IntegerCell(IntegerRecurrent):
    """A converted `nn.LSTMCell` or `nn.GRUCell`."""

    def __init__(self, twin: CellTwin) -> None:
        super().__init__(twin, [""])

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002
        """[N, I] or [I], states alike -> (h, c) or h."""
        x, states, batched = cell_operands(input, hx, self.hidden_size, self.lstm)
        if not self.dynamic:
            w_ih, w_hh, b_ih, b_hh = self.floats("")
            return cell_step(x, states, w_ih, w_hh, b_ih, b_hh, batched)
        _, last = self.step(x.unsqueeze(0), states, "")
        return cell_result(last, batched)


class RecurrentFamily:
    """See `nn.Family`."""

    def __init__(self, twin: type[Any], integer: type[Any]) -> None:
        self.twin, self.integer = twin, integer

    def prepare(self, module: nn.Module, layer: LayerPlan) -> nn.Module:
        """The twin.

        Raises:
            UnrealisableSite: if the module projects its states.
        """
        if getattr(module, "proj_size", 0):
            raise UnrealisableSite(
                f"an LSTM with proj_size {module.proj_size} has no integer form",
                site=layer.name,
                hint=f"Keep it in float: recipe.keep({layer.name!r}).",
            )
        return cast("nn.Module", self.twin(module, layer))

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """Two weights per layer and direction."""
        return {n: (w.shape[0], w.shape[1]) for n, w in self.matrices(module).items()}

    def matrices(self, twin: nn.Module) -> dict[str, Tensor]:
        """The weights, [gates * H, I] and [gates * H, H]."""
        weights = {n: p for n, p in twin._parameters.items() if n.startswith("weight_")}
        return {n: p.detach() for n, p in weights.items() if p is not None}

    def convert(self, twin: nn.Module) -> nn.Module:
        """The integer module."""
        return cast("nn.Module", self.integer(twin))


twins.add("LSTM", RecurrentFamily(LSTMTwin, IntegerSequence))
twins.add("GRU", RecurrentFamily(GRUTwin, IntegerSequence))
twins.add("LSTMCell", RecurrentFamily(LSTMCellTwin, IntegerCell))
twins.add("GRUCell", RecurrentFamily(GRUCellTwin, IntegerCell))
