"""Small data sets on disk for the tests. Image number i has one colour, which `number` reads."""
import functools
import io

import numpy as np
import pytest
from PIL import Image

import common

pytest_plugins = ["runs"]  # the fixtures that run a script


@pytest.fixture(autouse=True)
def close_run():
    """Give back the signals and the lock of a folder that a test opened without common.run."""
    yield
    common._open.close()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing curves.png takes longer than a training of few steps; real processes draw it."""
    monkeypatch.setattr(common, "curves", lambda *_: None)


@pytest.fixture(scope="session")
def rendered():
    """common.shapes that renders a set of images once a session; do not write into its tensors."""
    return functools.cache(common.shapes)


@pytest.fixture
def shapes_once(rendered, monkeypatch):
    """Read `--dataset shapes` without rendering it again."""
    monkeypatch.setattr(common, "shapes", rendered)


def image(i, height=32, width=32):
    """Image of one colour that tells i < 65536; uint8 (height, width, 3)."""
    return np.full((height, width, 3), (i % 256, i // 256, 255 - i % 256), np.uint8)


def number(images):
    """The i of every image of `image`: (n, 3, H, W) uint8 -> (n,) int64, checked on all pixels."""
    x = images.long()
    i = x[:, 0] + 256 * x[:, 1]  # (n, H, W)
    assert (i == i[:, :1, :1]).all() and (x[:, 2] == 255 - x[:, 0]).all()
    return i[:, 0, 0]


def write_image(path, i, height=32, width=32):
    """Save image i without loss under path, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image(i, height, width)).save(path, "PNG")


def write_folder(root, counts, height=32, width=32):
    """ImageFolder tree: counts {"train/cat": 5, ...}; images are numbered in this order."""
    i = 0
    for name, count in counts.items():
        for place in range(count):
            write_image(root / name / f"{place:04}.png", i, height, width)
            i += 1
    return root


def write_pack(path, images, **arrays):
    """npz pack of images (n, H, W, 3) uint8 and the given arrays, encoded without loss."""
    files = []
    for x in images:
        file = io.BytesIO()
        Image.fromarray(x).save(file, "PNG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0] + [len(f) for f in files])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, jpeg=np.concatenate(files), offsets=offsets, **arrays)
    return path
