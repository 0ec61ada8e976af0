"""A forked process has none of the threads that were at work in the one before it: what it calls of ocs runs in one."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, tempfile
import numpy as np, torch, ocs
from torch import nn

def call():
    torch.manual_seed(0)
    values = np.linspace(-1, 1, 1_000_000, dtype=np.float32)
    rounded, largest = ocs.functional.fake_quantize(values, 0.1, 4), torch.ops.ocs.abs_max(torch.from_numpy(values))
    net, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), torch.randn(256, 512)
    ocs.quantize(net, wbits=4, r=0.02, skip=None, abits=8, calibration=[x], correct_bias=True)
    with tempfile.TemporaryDirectory() as folder:
        ocs.save(net, folder + "/m")
        loaded = ocs.load(folder + "/m", nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
    ocs.compare(net, ocs.pack(loaded), [x])
    return rounded.sum(), largest.item(), int(net[1].weight_int.numpy().sum())

torch.set_num_threads(2)
expected = call()
(torch.ones(3_000_000) * 2).sum()
child = os.fork()
if child == 0:
    signal.alarm(100)  # which kills it
    os._exit(0 if call() == expected and torch.get_num_threads() == 2 else 1)
print(os.waitpid(child, 0)[1], call() == expected)
"""


def test_a_forked_process_does_not_wait_for_threads() -> None:
    command = [sys.executable, "-W", "ignore:.*fork:DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "0 True\n"
