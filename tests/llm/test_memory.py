"""What a run over the blocks of a model gives back to the system."""

import subprocess
import sys

import pytest

from pennyweight.llm.memory import glibc

SCRIPT = """
import ctypes, sys
from contextlib import nullcontext
from pathlib import Path
from pennyweight.llm.memory import returning

def held():  # MB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000

MB = 1 << 20
large = ctypes.create_string_buffer(31 * MB)  # freed: from here on glibc takes what is smaller from its heap
del large
before = held()
with returning() if sys.argv[1] == "yes" else nullcontext():
    kept, freed = [], []
    for _ in range(20):
        freed.append(ctypes.create_string_buffer(bytes(10 * MB), 10 * MB))
        kept.append(ctypes.create_string_buffer(bytes(1 * MB), 1 * MB))
    del freed
    print(held() - before)
"""


@pytest.mark.skipif(glibc("mallopt") is None, reason="only glibc has such a threshold")
def test_what_is_freed_between_what_lives_is_given_back():
    def left(how):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert left("no") > 150
    assert left("yes") < 40
