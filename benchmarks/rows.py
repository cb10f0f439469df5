"""Starts the processes of a benchmark's row."""
import os
import socket
import subprocess


def start(command, *, processes=1, threads=1):
    """Returns `processes` running copies of a command, with pipes; several are started as torchrun does.

    Args:
        command: a list of arguments.
        processes: rank 0 is the first.
        threads: of each, where there are several.
    """
    environments = [os.environ]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = os.environ | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for environment in environments]


def stop(processes):
    for process in processes:
        process.kill()
        process.communicate()


def is_first():
    """Whether this process is rank 0, which alone is told to work."""
    return int(os.environ.get("RANK", 0)) == 0
