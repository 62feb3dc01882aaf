"""Every library notebook runs from top to bottom.

Each runs in a child of this process, which has imported the large libraries once: a kernel for each
of them would spend most of its time importing torch.
"""

import multiprocessing
import os
import time
import warnings

import pytest

USUAL_SECONDS = 10
HANG_SECONDS = 300


@pytest.fixture(scope="session")
def large_libraries():
    "Imported once; a child that is forked off has them already."
    import datasets  # noqa: F401
    import ipywidgets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import transformers  # noqa: F401


def execute(path, errors):
    "Run all cells; puts None, or what went wrong, into the queue."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    os.chdir(path.parent)
    shell = CaptureShell(path=path.parent)
    try:
        shell.run_all(read_nb(path), exc_stop=True)
    except BaseException as error:
        errors.put(f"{type(error).__name__}: {error}")
        raise
    errors.put(shell.prettytb(path.name) if shell.exc else None)


def test_library_notebook_runs(library_notebook, large_libraries):
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    child = context.Process(target=execute, args=(library_notebook, errors))
    began = time.time()
    child.start()
    child.join(HANG_SECONDS)
    if child.is_alive():
        child.kill()
        pytest.fail(f"{library_notebook.name} still ran after {HANG_SECONDS} s")
    assert not errors.empty(), f"{library_notebook.name} ended with code {child.exitcode}"
    error = errors.get()
    assert error is None, error
    seconds = time.time() - began
    if seconds > USUAL_SECONDS:
        warnings.warn(f"{library_notebook.name} took {seconds:.0f} s", stacklevel=1)
