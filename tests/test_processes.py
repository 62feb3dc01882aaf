"Work shared by several processes: the same results, and nothing left over."

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmkit.core.processes import can_fork, map_in_processes
from mmkit.pretrain.shape_dataset import build_shape_dataset, open_shape_dataset

needs_fork = pytest.mark.skipif(not can_fork(), reason="only Linux forks")
SLOW = """
import os, signal, time
from mmkit.core.processes import map_in_processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

def work(item):
    time.sleep(0.05)
    return os.getpid()

with map_in_processes(work, range(100_000), 2) as pids:
    print(next(pids), next(pids), flush=True)
    list(pids)
"""


def is_alive(pid):
    "Whether a process runs; one that only waits for its status to be read does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_slow_work():
    "A program in a group of its own whose two processes are at work, and their ids."
    program = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return program, [int(pid) for pid in program.stdout.readline().split()]


@needs_fork
def test_results_come_in_order_from_several_processes():
    with map_in_processes(lambda item: (item, os.getpid()), iter(range(50)), 3) as results:
        items, pids = zip(*results)
    assert items == tuple(range(50))
    assert len(set(pids)) == 3 and os.getpid() not in pids
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_processes", (0, 1, 5))
def test_one_item_or_one_process_starts_none(num_processes):
    items = range(4) if num_processes < 2 else range(1)
    with map_in_processes(lambda item: os.getpid(), items, num_processes) as pids:
        assert set(pids) == {os.getpid()}


@pytest.mark.parametrize("platform", ("win32", "darwin"))
def test_where_fork_is_not_safe_one_process_does_it(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    with map_in_processes(lambda item: os.getpid(), range(4), 2) as pids:
        assert list(pids) == [os.getpid()] * 4


@needs_fork
def test_a_helper_starts_no_helpers():
    def count_pids(item):
        with map_in_processes(lambda item: os.getpid(), range(4), 2) as pids:
            return len(set(pids))

    with map_in_processes(count_pids, range(2), 2) as counts:
        assert list(counts) == [1, 1]


def test_an_error_in_a_process_is_seen_as_usual():
    shared = map_in_processes(lambda item: 1 // (item - 3), range(8), 2)
    with pytest.raises(ZeroDivisionError), shared as results:
        list(results)
    assert not multiprocessing.active_children()


@needs_fork
def test_the_work_of_a_killed_process_is_done_all_the_same():
    first = os.getpid()

    def work(item):
        if item == 5 and os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with map_in_processes(work, range(20), 2) as results:
        assert list(results) == list(range(20))


def test_leaving_early_ends_the_processes():
    with map_in_processes(lambda item: bytes(10**6), range(1000), 2) as results:
        next(results)
    assert not multiprocessing.active_children()


@needs_fork
def test_ctrl_c_leaves_no_process():
    program, pids = start_slow_work()
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = program.communicate(timeout=60)
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert errors.count("KeyboardInterrupt") == 1, errors


@needs_fork
def test_when_the_first_process_is_killed_the_others_end():
    program, pids = start_slow_work()
    program.kill()
    program.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_shapes_are_the_same_by_any_number_of_processes(tmp_path):
    for number in (1, 2):
        build_shape_dataset(tmp_path / str(number), 12, num_workers=number, log=None)
    one, two = (open_shape_dataset(tmp_path / str(number), 12) for number in (1, 2))
    assert all(np.array_equal(first, second) for first, second in zip(one, two))
    assert one[0].any()
