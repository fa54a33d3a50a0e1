"""Scripts and modules in processes of their own, as a shell or torchrun starts them."""

import os
import socket
import subprocess
import sys


def launch(*command: str, processes: int | None = None) -> subprocess.CompletedProcess:
    """`python COMMAND`, or `torchrun --nproc-per-node=PROCESSES COMMAND`, with one thread each."""
    start = [sys.executable]
    if processes is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        start += [f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *command], capture_output=True, text=True, env=environment, timeout=300
    )
