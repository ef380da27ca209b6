"""The worker's side of the conversation: one JSON object per line in, one out, until the input ends."""

import json
import os
import sys
import time
from collections.abc import Callable

from experiments.bench.contenders.workload import Workload


def serve(prepare: Callable[[Workload, dict], Callable[[], float]]) -> None:
    """Answer the first request {"work", "options"} with {"loss"}, each further {"steps"} with {"wall", "cpu", "loss"}.

    "wall" and "cpu" are seconds per step, "cpu" summed over the process's threads: others' work hardly counts.

    `prepare(work, options)` returns a function that takes one step and returns a number, which is reported as "loss";
    its first call, with all compilation, is not timed.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not enter the conversation

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    request = json.loads(sys.stdin.readline())
    step = prepare(Workload(**request["work"]), request["options"])
    reply(loss=step())
    for line in sys.stdin:
        wall, cpu = [], []
        for _ in range(json.loads(line)["steps"]):
            start = time.perf_counter(), time.process_time()
            loss = step()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        reply(wall=wall, cpu=cpu, loss=loss)
