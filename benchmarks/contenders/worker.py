"""A process that loads one contender and runs it in blocks when told to.

usage: worker.py FILE:FUNCTION NETWORK THREADS FOLDER BATCH

It answers with one JSON object a line: once loaded `{"output": [...]}`, the flat output of one run; then, for each
line N it reads, `{"ns": [...]}`, the times of N calls in a row after one that is not counted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    contender, name, threads, folder, batch = sys.argv[1:6]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    file, _, function = contender.partition(":")
    run = getattr(importlib.import_module(file), function)(name, int(threads), Path(folder), int(batch))
    output = run().reshape(-1).tolist()
    print(json.dumps({"output": output}), file=answers, flush=True)
    for line in sys.stdin:
        run()
        times = []
        for _ in range(int(line)):
            start = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - start)
        print(json.dumps({"ns": times}), file=answers, flush=True)


if __name__ == "__main__":
    main()
