"""The same surroundings for all tests, wherever they are started."""

import os
import signal

import pytest

# before torch is imported; children inherit it. Threads that wait for each other crawl
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"COLUMNS": "80", "LINES": "25"}  # tables are as wide as the terminal
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal, also where tests run in the background, which may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
