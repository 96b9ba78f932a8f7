"""One thread per process: tests share their machine, and threads that wait for each other crawl."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; children inherit it

import pytest


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal, also where tests run in the background, which may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
