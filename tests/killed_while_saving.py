"""In a process of its own: kill a process that saves over a checkpoint, and look at the file.

Arguments: the file, how often. Prints how many kills left an unfinished file beside it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import trine
from torch import nn


def constant(value: float) -> nn.Module:
    linear = nn.Linear(256, 256)
    nn.init.constant_(linear.weight, value)
    nn.init.constant_(linear.bias, value)
    return nn.Sequential(trine.nn.Int8Linear.from_linear(linear), nn.Linear(8, 8))


def main(path: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a forked child has no threads but the one that forked
    models = [constant(1.0), constant(2.0)]
    trine.save(models[0], path)
    for _ in range(kills):
        child = os.fork()
        if not child:
            while True:
                trine.save(models[1], path)
                trine.save(models[0], path)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = trine.load(path).state_dict()
        assert any(same(state, model.state_dict()) for model in models)
    print(len(list(path.parent.glob(f".{path.name}.*.part"))))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
