"""One thread per process: tests share their machine, and threads that wait for each other crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; children inherit it
