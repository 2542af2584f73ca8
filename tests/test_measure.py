"""Measuring: the right call is called the faster one, blocks pair up, children report their own memory."""

import subprocess
import sys
import time
from itertools import pairwise

import pytest

from pennyweight.errors import PennyweightError
from pennyweight.measure import cpu_name, in_child, interleaved, seconds_of


def test_interleaved():
    calls = {"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}
    times = interleaved(calls, seconds=0.05, rounds=3)
    assert times["slow"].ms > times["fast"].ms
    assert times["fast"].speedup_over(times["slow"]) > 1.5
    assert times["slow"].speedup_over(times["fast"]) < 1
    assert times["slow"].p95 >= times["slow"].p50
    assert len(times["slow"].blocks) == len(times["fast"].blocks) >= 3
    assert times["slow"].calls >= 3


def test_calls_take_turns():
    order = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.001, rounds=4)
    switches = sum(x != y for x, y in pairwise(order))
    assert switches >= 4


def test_seconds_of():
    assert 0.002 < seconds_of(lambda: time.sleep(0.003), 3) < 1


def test_peak_memory_sees_what_was_held():
    """In a process of its own: a suite that once held more than this does not set a new peak."""
    code = (
        "from pennyweight.measure import peak_bytes\n"
        "before = peak_bytes()\n"
        "held = bytearray(64_000_000)\n"
        "held[::4096] = b'x' * len(held[::4096])\n"
        "print(before, peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before > 30_000_000
    assert before > 1_000_000


def test_failing_children():
    with pytest.raises(PennyweightError, match="a measuring process failed"):
        in_child("pennyweight.cli.memory", ["file", "nowhere.dwt", "1", "1", "auto"])


def test_cpu_name():
    assert cpu_name()
