import time

import pytest
import torch

import common
from common import shapes


@pytest.fixture(scope="module")
def train():
    return shapes(2000, seed=3)


def contents(column, count):  # (count,) how many of each id
    return torch.bincount(column, minlength=count)


def test_same_seed_same_images_other_seed_other_images():
    a, b, c = shapes(150, seed=5), shapes(150, seed=5), shapes(150, seed=6)
    assert torch.equal(a[0], b[0]) and a[2:] == b[2:]
    assert all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[1]["label"], c[1]["label"])
    torch.manual_seed(0)  # the global generator is neither read nor moved
    state = torch.get_rng_state()
    assert torch.equal(shapes(150, seed=5)[0], a[0]) and torch.equal(torch.get_rng_state(), state)


def test_forms_and_ids():
    for n, size, renders in ((1, 32, 1), (7, 32, 3), (50, 48, 2), (1100, 32, 1)):
        images, columns, classes, captions = shapes(n, 0, size=size, renders=renders)
        assert images.shape == (n, 3, size, size) and images.dtype == torch.uint8
        assert columns.keys() == classes.keys() and len(captions) == n
        for name, ids in columns.items():
            assert ids.shape == (n,) and ids.dtype == torch.int64
            assert 0 <= ids.min() and ids.max() < len(classes[name])
            assert len(set(classes[name])) == len(classes[name])


@pytest.mark.parametrize("n, renders", [(0, 1), (5, 0), (-1, 1)])
def test_bad_counts(n, renders):
    with pytest.raises(ValueError, match=f"got {n} and {renders}"):
        shapes(n, renders=renders)


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("n", [24 * 16, 1000])
def test_balanced_and_shuffled(n, unseen):
    _, columns, classes, _ = shapes(n, seed=1, unseen=unseen)
    for name in ("label", "colour", "size", "background"):
        count = contents(columns[name], len(classes[name]))
        assert count.max() - count.min() <= (n % len(count) > 0), name
    for name in ("coarse", "pattern"):  # sums of label's classes
        count = contents(columns[name], len(classes[name]))
        assert count.max() - count.min() <= 6, name
    assert (contents(columns["label"][:200], len(classes["label"])) > 0).all()
    for name in set(columns) - {"object", "label"}:  # a prefix holds every class
        assert (contents(columns[name][:64], len(classes[name])) > 0).all(), name
    names = [k for k in columns if k not in ("object", "label")]
    for i, a in enumerate(names):  # the factors are independent: no colour tells a shape
        for b in names[:i]:
            A, B = len(classes[a]), len(classes[b])
            joint = contents(columns[a] * B + columns[b], A * B).float()
            assert joint.min() > 0.4 * n / (A * B) and joint.max() < 1.7 * n / (A * B), (a, b)


@pytest.mark.parametrize("unseen", [False, True])
def test_label_and_caption_name_the_factors(unseen):
    _, columns, classes, captions = shapes(300, seed=2, unseen=unseen, renders=2)
    assert len(classes["label"]) == len(classes["coarse"]) * len(classes["pattern"])
    for i, caption in enumerate(captions):
        word = {k: classes[k][columns[k][i]] for k in columns}
        assert word["label"] == f"{word['pattern']} {word['coarse']}"
        assert caption == (f"a {word['size']} {word['colour']} {word['pattern']} {word['coarse']}"
                           f" on a {word['background']} background")


def test_ids_mean_the_same_in_both_splits():
    a, b = shapes(100, seed=0)[2], shapes(77, seed=1)[2]
    assert all(a[k] == b[k] for k in a if k != "object")


def test_unseen_shapes_are_other_shapes():
    seen, other = shapes(40)[2], shapes(40, unseen=True)[2]
    assert not set(seen["coarse"]) & set(other["coarse"])
    assert not set(seen["label"]) & set(other["label"])
    assert len(seen["coarse"]) == 6 and len(other["coarse"]) == 4
    assert all(seen[k] == other[k] for k in seen if k not in ("label", "coarse"))


def masks(images):
    """(n, size, size) bool: pixels whose chroma is far above any background's."""
    x = images.float() / 255
    return x.amax(1) - x.amin(1) > 0.3


def test_colour_is_visible(train):
    images, columns, classes, _ = train
    m = masks(images)[:, None].float()
    assert (m.sum((1, 2, 3)) >= 20).float().mean() > 0.99  # an object in every image

    def hue(rgb):  # (n, 2) direction in the colour plane; light and dark tones do not move it
        r, g, b = rgb.unbind(1)
        return torch.nn.functional.normalize(torch.stack([r - (g + b) / 2, 0.866 * (g - b)], 1))

    palette = hue(torch.tensor([*common.COLOURS.values()]))
    mean = (images / 255 * m).sum((2, 3)) / m.sum((2, 3)).clamp(min=1)
    nearest = (hue(mean) @ palette.T).argmax(1)
    for k, name in enumerate(classes["colour"]):
        hit = (nearest == k)[columns["colour"] == k].float().mean()
        assert hit > 0.9, f"{name}: {hit:.2f}"


def test_size_is_visible(train):
    images, columns, _, _ = train
    area = masks(images).float().sum((1, 2))
    for s in range(6):
        small, large = (area[(columns["coarse"] == s) & (columns["size"] == k)] for k in (0, 1))
        assert large.mean() > 1.4 * small.mean()
        assert (large > small.mean()).float().mean() > 0.9


def test_object_stays_in_the_frame(train):
    border = masks(train[0]).float()
    edge = (border[:, 0].mean() + border[:, -1].mean() + border[..., 0].mean()
            + border[..., -1].mean()) / 4
    assert edge < 0.2 * border[:, 8:24, 8:24].mean()


def test_pattern_is_visible(train):
    """Two tones in all patterns but plain; those of stripes lie above each other."""
    images, columns, classes, _ = train
    m = masks(images)
    gray = images.float().mean(1)
    spread = torch.tensor([gray[i][m[i]].std().item() for i in range(len(images))])
    plain = columns["pattern"] == classes["pattern"].index("plain")
    assert spread[~plain].median() > 2 * spread[plain].median()
    across = (gray[:, 1:] - gray[:, :-1])[:, :, 1:].abs()  # steps down a column, along a row
    along = (gray[:, :, 1:] - gray[:, :, :-1])[:, 1:].abs()
    inner = m[:, 1:, 1:] & m[:, :-1, 1:] & m[:, 1:, :-1]
    ratio = (across * inner).sum((1, 2)) / (along * inner).sum((1, 2)).clamp(min=1)
    striped = columns["pattern"] == classes["pattern"].index("striped")
    large = columns["size"] == 1
    assert ratio[striped & large].median() > 1.3 * ratio[~striped & large].median()


def test_renders_share_the_object_not_the_pixels():
    n, r = 240, 8
    images, columns, _, captions = shapes(n, seed=4, renders=r)
    for name, ids in columns.items():
        assert (ids.view(-1, r) == ids[::r, None]).all(), name
    assert torch.equal(columns["object"], torch.arange(n) // r)
    assert all(captions[i] == captions[i - i % r] for i in range(n))
    x = torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1)  # coarse: not the noise
    d = torch.cdist(x, x)
    same = columns["object"][:, None] == columns["object"][None]
    own = d[same & ~torch.eye(n, dtype=torch.bool)]
    assert own.min() > 0 and own.median() < 0.75 * d[~same].median()
    nearest = d.fill_diagonal_(float("inf")).argmin(1)
    assert (columns["object"][nearest] == columns["object"]).float().mean() > 0.5
    alone = shapes(n, seed=4)[1]["object"]
    assert torch.equal(alone, torch.arange(n))


def test_images_fill_the_range(train):
    x = train[0].float()
    assert x.quantile(0.01) < 60 and x.quantile(0.99) > 200
    assert 90 < x.mean() < 185 and x.std() > 40
    assert (x == 0).float().mean() < 0.05 and (x == 255).float().mean() < 0.1
    assert (x.mean((0, 2, 3)) - x.mean()).abs().max() < 30  # no colour cast


def test_five_thousand_images_are_quick():
    start = time.perf_counter()
    shapes(5000)
    assert time.perf_counter() - start < 60  # about a second on an idle core
