"""Codes of a few bits side by side in bytes, and the integers that a table gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.formats import grids
from pennyweight.formats.codebook import Codebook
from pennyweight.formats.integer import Integer
from pennyweight.qtensor import QTensor


def tabled(q: QTensor) -> tuple[Tensor, Tensor] | None:
    """Codes as places in a table of integers, uint8 [rows, n], and the table, int8 [2^bits], of at most 16 entries.

    The product of a place's integer and `scale * unit` is the weight. Where rows have zero points of their own, which
    are part of these integers, every row has a table: int8 [rows, 2^bits]. Levels that need two bytes make a table of
    int16, of up to 256 entries. None where the grid has more levels, zero points are no integers or those of groups, or
    levels are no multiples of one unit. Entries beyond the grid's levels continue by its last step; no code names them.
    """
    grid, dtype, most = grids[q.spec.grid], torch.int8, 127
    if isinstance(grid, Integer) and grid.bits <= 4:
        levels = list(range(grid.qmin, grid.qmax + 1))
        places = (q.codes.to(torch.int16) - grid.qmin).to(torch.uint8)
    elif isinstance(grid, Codebook) and grid.multiples is not None and len(grid.multiples) <= 16:
        levels, places = list(grid.multiples), q.codes
    elif isinstance(grid, Codebook) and grid.wide is not None:
        levels, places = list(grid.wide), q.codes
        dtype, most = torch.int16, 32767
    else:
        return None
    if q.zero is not None and (q.zero.shape[1] > 1 or not isinstance(grid, Integer) or q.spec.zero != "int"):
        return None
    entries = next(n for n in (2, 4, 16, 256) if n >= len(levels))
    while len(levels) < entries:
        levels.append(min(2 * levels[-1] - levels[-2], most))
    table = torch.tensor(levels, dtype=dtype, device=q.codes.device)
    if q.zero is not None:
        table = table - by_row(q.zero, len(places)).to(dtype)
        table = table if len(table) > 1 else table[0]
    return places, table


def by_row(numbers: Tensor, rows: int) -> Tensor:
    """Scales or zero points [n, blocks], each of n for as many rows, as [rows, blocks]; one for all stays one."""
    return numbers.repeat_interleave(rows // len(numbers), 0) if 1 < len(numbers) < rows else numbers


def code_bits(table: Tensor) -> int:
    """Bits of a code of a table [2^bits] or [rows, 2^bits]: 1, 2, 4 or 8."""
    return table.shape[-1].bit_length() - 1


def pack_codes(places: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] below 2^bits to uint8 [rows, ceil(n * bits / 8)], the first in the low bits."""
    per = 8 // bits
    spare = -places.shape[1] % per
    padded = torch.cat([places, places.new_zeros(places.shape[0], spare)], 1)
    shifts = torch.arange(0, 8, bits, device=places.device)
    fields = padded.reshape(padded.shape[0], -1, per).to(torch.int16) << shifts
    return fields.sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_codes`."""
    shifts = torch.arange(0, 8, bits, device=packed.device)
    fields = packed.to(torch.int16).unsqueeze(-1) >> shifts & (1 << bits) - 1
    return fields.reshape(packed.shape[0], -1)[:, :n].to(torch.uint8)


def weight_codes(codes: Tensor, table: Tensor | None, n: int) -> Tensor:
    """int8 or int16 weights [rows, n] of stored codes: themselves without a table."""
    if table is None:
        return codes
    places = unpack_codes(codes, code_bits(table), n).long()
    return table[places] if table.ndim == 1 else table.gather(1, places)
