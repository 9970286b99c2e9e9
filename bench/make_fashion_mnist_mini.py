"""Make the Fashion-MNIST subset that ships with the package: data/fashion_mnist_mini.npz.

The first images of each class, in the order of the original files; training images come from the
training split and test images from the test split. The same source and zlib give the same bytes:
numpy writes every member of an archive with the same fixed time.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib

import numpy as np

# The most that keeps the archive under 3 MB (deflated, an image takes about 440 bytes).
TRAIN_PER_CLASS = 500
TEST_PER_CLASS = 150


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file: 0, 0, 8 (unsigned byte), rank, sizes, data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is no IDX file of unsigned bytes; give the original files")
    rank = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=rank, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(
    source: pathlib.Path, split: str, per_class: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, N = 10 * per_class."""
    images = read_idx(source / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{split}-labels-idx1-ubyte.gz")
    chosen = [np.flatnonzero(labels == label)[:per_class] for label in range(10)]
    order = np.sort(np.concatenate(chosen))
    return images[order], labels[order]


def main() -> None:
    """Read the four original files, write the archive, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument("out", type=pathlib.Path, help="the .npz file to write")
    arguments = parser.parse_args()
    x_train, y_train = first_of_each_class(arguments.source, "train", TRAIN_PER_CLASS)
    x_test, y_test = first_of_each_class(arguments.source, "t10k", TEST_PER_CLASS)
    np.savez_compressed(
        arguments.out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
    )
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(y_train)} training and {len(y_test)} test images, {size} bytes")


if __name__ == "__main__":
    main()
