"""The batched augmentation against torchvision's functions, image by image."""

import itertools
import math

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil_functional
from torchvision.transforms.v2 import functional as vision

import common

# float32 keeps 6e-8 of 1; factors of up to 10, sums in another order, and coordinates up to 200
# (1e-5 in float32, in torchvision as well) use up the rest. Solarize needs no exception: a pixel
# that rounding moves over its threshold is 0.5 before and after.
TOLERANCE = dict(atol=1e-5, rtol=0)
JITTER_OPS = (
    vision.adjust_brightness,
    vision.adjust_contrast,
    vision.adjust_saturation,
    vision.adjust_hue,
)


def images(n, height=32, width=32, seed=0):
    """Smooth colourful images with noise, gray, black and white areas: (n, 3, H, W) uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=g)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic") * 255
    x = x + 30 * torch.randn(n, 3, height, width, generator=g)
    x[:, :, : height // 5, : width // 5] = 0
    x[:, :, -(height // 5) :, : width // 5] = 255
    x[:, 1:, : height // 5, width // 2 :] = x[:, :1, : height // 5, width // 2 :]
    return x.clamp(0, 255).round().to(torch.uint8)


NOTHING = dict(
    crop=None, ratio=(3 / 4, 4 / 3), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, gray=0.0,
    blur=0.0, sigma=(0.1, 2.0), solarize=0.0, erase=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def make(size=32, **changes):
    return dict(NOTHING, size=size) | changes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


FULL = dict(
    crop=(0.1, 1.0),
    flip=0.5,
    jitter=(0.8, 0.8, 0.8, 0.4),
    jitter_p=0.8,
    gray=0.3,
    blur=0.5,
    solarize=0.3,
    erase=0.4,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def reference_one(x, p, aug, cropped=False):
    """torchvision's functions on one (3, H, W) uint8 image; p is one row of the params."""
    size = aug["size"]
    x = x.float() / 255
    if not cropped:
        box = [0, 0, *x.shape[1:]]
        if aug["crop"] is not None:
            box = reference_box(p["crop"].tolist(), *x.shape[1:], aug["crop"], aug["ratio"])
        x = vision.resized_crop(x, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
    if p["flip"]:
        x = vision.horizontal_flip(x)
    if p["jitter"]:
        for op in p["order"].tolist():
            x = JITTER_OPS[op](x, p["factor"][op].item())
    if p["gray"]:
        x = vision.rgb_to_grayscale(x, num_output_channels=3)
    if p["sigma"] > 0:
        kernel = min(2 * math.ceil(3 * aug["sigma"][1]) + 1, 2 * size - 1)
        x = vision.gaussian_blur(x, [kernel, kernel], [p["sigma"].item()] * 2)
    if p["solarize"]:
        x = vision.solarize(x, 0.5)
    x = vision.normalize(x, list(aug["mean"]), list(aug["std"]))
    top, left, h, w = p["erase"].tolist()
    if h > 0:
        x = vision.erase(x, top, left, h, w, torch.zeros(1))
    return x


def reference(x, params, aug, cropped=False):
    rows = [{key: value[i] for key, value in params.items()} for i in range(len(x))]
    return torch.stack([reference_one(x[i], rows[i], aug, cropped) for i in range(len(x))])


def reference_box(u, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, with its draws replaced by the uniforms u."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * attempt])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[2 * attempt + 1])
        w = int(round(math.sqrt(area * aspect)))
        h = int(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, int(round(width / min(ratio)))
    elif width / height > max(ratio):
        h, w = height, int(round(height * max(ratio)))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def unchanged(aug, n, **rows):
    """Params of n images in which nothing happens but what `rows` sets."""
    params = common.sample_params(make(aug["size"]), n, generator())
    params.update({key: torch.as_tensor(value) for key, value in rows.items()})
    return params


def check(x, params, aug, cropped=False):
    """Compare in units of [0, 1]: normalisation would scale the error."""
    std = torch.tensor(aug["std"]).view(3, 1, 1)
    got = common.apply_params(x, params, aug, cropped)
    assert got.shape == (len(x), 3, aug["size"], aug["size"])
    assert got.dtype == torch.float32 and got.is_contiguous()
    want = reference(x, params, aug, cropped)
    torch.testing.assert_close(got * std, want * std, **TOLERANCE)
    return got


# Crop boxes


@pytest.mark.parametrize("height,width", [(32, 32), (1, 1), (375, 500), (7, 300), (300, 7)])
@pytest.mark.parametrize("crop", [(0.2, 1.0), (0.08, 1.0), (1.0, 1.0), (0.01, 0.02)])
def test_crop_boxes_follow_torchvisions_loop(height, width, crop):
    u = torch.rand(400, 22, generator=generator())
    boxes = common.crop_boxes(u, height, width, crop, (3 / 4, 4 / 3))
    want = [reference_box(row.tolist(), height, width, crop, (3 / 4, 4 / 3)) for row in u]
    assert boxes.dtype == torch.int64
    assert torch.equal(boxes, torch.tensor(want))


def test_crop_boxes_fall_back_to_the_centre():
    u = torch.rand(50, 22, generator=generator())
    wide = common.crop_boxes(u, 10, 1000, (0.9, 1.0), (3 / 4, 4 / 3))
    assert torch.equal(wide, torch.tensor([0, 493, 10, 13]).expand(50, 4))
    tall = common.crop_boxes(u, 1000, 10, (0.9, 1.0), (3 / 4, 4 / 3))
    assert torch.equal(tall, torch.tensor([493, 0, 13, 10]).expand(50, 4))
    # Ten attempts above the whole area fail where the ratio fits: the whole image.
    whole = common.crop_boxes(torch.zeros(1, 22), 30, 31, (1.5, 1.6), (3 / 4, 4 / 3))
    assert whole.tolist() == [[0, 0, 30, 31]]


def test_crop_boxes_take_a_size_per_image_and_extreme_uniforms():
    g = generator()
    u = torch.rand(300, 22, generator=g)
    u[0], u[1] = 0, 1 - 2**-24
    height = torch.randint(1, 400, (300,), generator=g)
    width = torch.randint(1, 400, (300,), generator=g)
    boxes = common.crop_boxes(u, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
    for i in range(300):
        size = height[i].item(), width[i].item()
        want = reference_box(u[i].tolist(), *size, (0.08, 1.0), (3 / 4, 4 / 3))
        assert tuple(boxes[i].tolist()) == want
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


# Draws


def test_draw_is_a_function_of_the_seed_and_slices_by_rank():
    aug = make(**FULL)
    whole = common.sample_params(aug, 64, generator(3))
    again = common.sample_params(aug, 64, generator(3))
    other = common.sample_params(aug, 64, generator(4))
    for key, value in whole.items():
        assert len(value) == 64 and value.device.type == "cpu"
        assert torch.equal(value, again[key])
        assert not torch.equal(value, other[key])
    x = images(64)
    view = common.apply_params(x, whole, aug)
    for start in range(0, 64, 16):
        rows = slice(start, start + 16)
        part = common.apply_params(x[rows], {k: v[rows] for k, v in whole.items()}, aug)
        torch.testing.assert_close(part, view[rows], atol=1e-6, rtol=0)


def test_draw_leaves_global_randomness_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    common.apply_params(images(4), common.sample_params(make(**FULL), 4, generator()), make(**FULL))
    assert torch.equal(state, torch.get_rng_state())


def test_draw_does_not_move_when_another_probability_changes():
    a = common.sample_params(make(**FULL), 50, generator())
    b = common.sample_params(make(**dict(FULL, flip=0.9, blur=0.0)), 50, generator())
    for key in a.keys() - {"flip", "sigma"}:
        assert torch.equal(a[key], b[key])


def test_draw_has_the_stated_distributions():
    n = 20000
    aug = make(**dict(FULL, sigma=(0.1, 2.0), jitter=(0.4, 1.5, 0.2, 0.1)))
    p = common.sample_params(aug, n, generator())

    def near(observed, expected, spread):
        # Five standard errors of the mean of n draws with this standard deviation.
        assert abs(float(observed) - expected) < 5 * spread / math.sqrt(n)

    blurred = p["sigma"] > 0
    erased = p["erase"][:, 2] > 0
    flags = dict(p, jitter_p=p["jitter"], blur=blurred, erase=erased)
    for key in ("flip", "jitter_p", "gray", "blur", "solarize", "erase"):
        near(flags[key].float().mean(), aug[key], 0.5)
    flags = torch.stack([flags[k] for k in ("flip", "jitter", "gray", "blur", "solarize", "erase")])
    assert (torch.corrcoef(flags.float()) - torch.eye(6)).abs().max() < 5 / math.sqrt(n)
    # Contrast of strength 1.5 is cut off at 0.
    ranges = [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]
    for factor, (low, high) in zip(p["factor"].T, ranges):
        assert low <= factor.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor.max() <= high + 1e-6
        near(factor.mean(), (low + high) / 2, (high - low) / math.sqrt(12))
        near(factor.var(), (high - low) ** 2 / 12, (high - low) ** 2 / 12)
    sigma = p["sigma"][blurred]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0
    near(sigma.mean(), 1.05, 2 * 1.9 / math.sqrt(12))
    # All 24 orders, each with probability 1/24 (standard deviation below 0.2).
    orders, counts = p["order"].unique(dim=0, return_counts=True)
    assert orders.tolist() == [list(o) for o in itertools.permutations(range(4))]
    for count in counts:
        near(count / n, 1 / 24, 0.2)
    assert 0 <= p["crop"].min() and p["crop"].max() < 1
    near(p["crop"].mean(), 0.5, math.sqrt(1 / 12 / 22))
    assert p["crop"].shape == (n, 22)


def test_erase_boxes_follow_torchvision():
    from torchvision.transforms import RandomErasing

    n = 4000
    for size in (32, 96):
        p = common.sample_params(make(size, erase=1.0), n, generator())["erase"]
        top, left, h, w = p.double().T
        assert (h < size).all() and (w < size).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= size).all() and (left + w <= size).all()
        torch.manual_seed(0)
        blank = torch.zeros(3, size, size)
        want = torch.tensor(
            [RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(n)]
        ).double()
        # Two samples of n boxes: each mean within five standard errors of the difference.
        for ours, theirs in zip((top, left, h, w, h * w), (*want.T, want[:, 2] * want[:, 3])):
            error = theirs.std() * math.sqrt(2 / n)
            assert abs(ours.mean() - theirs.mean()) < 5 * error
            assert abs(ours.std() - theirs.std()) < 5 * error


def test_erase_draws_follow_torchvisions_loop():
    # A ratio of 0.3 or 3.3 often fails in a 4 x 4 image, so later attempts are reached.
    for size in (4, 32):
        u = torch.rand(300, 59, generator=generator(7))
        boxes = common.sample_params(make(size, erase=1.0), 300, generator(7))["erase"].tolist()
        for row, box in zip(u[:, 36:58].tolist(), boxes):
            want = [0, 0, 0, 0]
            for attempt in range(10):
                area = size * size * (0.02 + (0.33 - 0.02) * row[2 * attempt])
                low, high = math.log(0.3), math.log(3.3)
                aspect = math.exp(low + (high - low) * row[2 * attempt + 1])
                h = int(round(math.sqrt(area * aspect)))
                w = int(round(math.sqrt(area / aspect)))
                if h < size and w < size:
                    want = [int(row[20] * (size - h + 1)), int(row[21] * (size - w + 1)), h, w]
                    break
            assert box == want


@pytest.mark.parametrize("key", ["flip", "jitter_p", "gray", "blur", "solarize", "erase"])
def test_probabilities_of_0_and_1(key):
    for probability in (0.0, 1.0):
        p = common.sample_params(make(**{key: probability}), 2000, generator())
        name = {"jitter_p": "jitter", "blur": "sigma"}.get(key, key)
        happens = p["erase"][:, 2] > 0 if key == "erase" else p[name] > 0
        assert happens.all() if probability else not happens.any()
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=key):
            common.sample_params(make(**{key: wrong}), 2, generator())


def test_hue_strength_is_checked():
    with pytest.raises(ValueError, match="hue strength 0.6"):
        common.sample_params(make(jitter=(0.4, 0.4, 0.4, 0.6)), 2, generator())


# Each operation


@pytest.mark.parametrize(
    "height,width,size",
    [(32, 32, 32), (96, 96, 64), (20, 20, 64), (64, 64, 17), (33, 47, 24), (100, 9, 31), (1, 1, 8)],
)
@pytest.mark.parametrize("crop", [None, (0.08, 1.0), (0.9, 1.0)])
def test_crop_and_resize(height, width, size, crop):
    aug = make(size, crop=crop, flip=0.5)
    check(images(24, height, width), common.sample_params(aug, 24, generator()), aug)


def test_resize_of_a_large_image():
    aug = make(64, crop=(0.3, 1.0), flip=0.5)
    x, params = images(6, 375, 500), common.sample_params(aug, 6, generator())
    got = common.apply_params(x, params, aug)
    torch.testing.assert_close(got, reference(x, params, aug), **TOLERANCE)


def test_flip_of_one_row_is_the_mirror_image():
    x = images(3)
    params = unchanged(make(), 3, flip=[True, False, True])
    for cropped in (False, True):
        out = common.apply_params(x, params, make(), cropped) * 255
        assert torch.equal(out[0].round(), x[0].flip(-1).float())
        assert torch.equal(out[1].round(), x[1].float())
        assert torch.equal(out[2].round(), x[2].flip(-1).float())


@pytest.mark.parametrize("op", range(4))
def test_each_jitter_operation(op):
    values = [-0.5, -0.25, -1 / 6, -0.01, 0.0, 0.05, 1 / 3, 0.5]
    if op < 3:
        values = [0.0, 0.2, 0.6, 1.0, 1.3, 1.8, 3.0, 10.0]
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(values), 1)
    factor[:, op] = torch.tensor(values)
    x = images(len(values))
    params = unchanged(make(), len(values), factor=factor, jitter=[True] * len(values))
    out = check(x, params, make())
    plain = x.float() / 255
    want = torch.stack([JITTER_OPS[op](image, value) for image, value in zip(plain, values)])
    torch.testing.assert_close(out, want, **TOLERANCE)
    assert out.min() > -1e-6 and out.max() < 1 + 1e-6


def test_hue_of_every_colour():
    # All colours of a 6-level cube: every sextant, its borders, gray, black and white.
    level = torch.arange(0, 256, 51, dtype=torch.uint8)
    cube = torch.cartesian_prod(level, level, level).T.reshape(1, 3, 12, 18)
    cube = torch.nn.functional.pad(cube, (0, 0, 0, 6)).expand(41, 3, 18, 18).contiguous()
    factor = torch.ones(41, 4)
    factor[:, 3] = torch.linspace(-0.5, 0.5, 41)
    check(cube, unchanged(make(18), 41, factor=factor, jitter=[True] * 41), make(18))


def test_each_jitter_order():
    orders = list(itertools.permutations(range(4)))
    g = generator(5)
    factor = torch.rand(24, 4, generator=g) * 1.6 + 0.2
    factor[:, 3] = torch.rand(24, generator=g) - 0.5
    x = images(1).expand(24, -1, -1, -1).contiguous()
    params = unchanged(make(), 24, factor=factor, jitter=[True] * 24, order=orders)
    out = check(x, params, make())
    # The order shows: the same factors in another order give another image.
    params["factor"] = factor[:1].expand(24, 4)
    out = check(x, params, make())
    distance = torch.pdist(out.flatten(1), p=math.inf)
    assert (distance > 1e-3).float().mean() > 0.9


def test_gray_solarize_and_erase_touch_their_rows_only():
    aug = make(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    x = images(5)
    plain = common.apply_params(x, unchanged(aug, 5), aug)
    erase = torch.zeros(5, 4, dtype=torch.int64)
    erase[4] = torch.tensor([3, 5, 11, 20])
    params = unchanged(
        aug,
        5,
        gray=[False, True, False, True, False],
        solarize=[False, False, True, True, False],
        erase=erase,
    )
    out = check(x, params, aug)
    assert torch.equal(out[0], plain[0])
    assert (out[4, :, 3:14, 5:25] == 0).all()
    plain[4, :, 3:14, 5:25] = 0
    assert torch.equal(out[4], plain[4])
    mean, std = (torch.tensor(aug[key]).view(3, 1, 1) for key in ("mean", "std"))
    gray = out[1] * std + mean
    assert (gray - gray[:1]).abs().max() < 1e-6


def test_solarize_turns_the_upper_half_of_the_levels():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    out = common.apply_params(x, unchanged(make(16), 1, solarize=[True]), make(16), cropped=True)
    level = x.float() / 255
    torch.testing.assert_close(out, torch.where(x >= 128, 1 - level, level), atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 9, 32, 33])
def test_blur_has_a_sigma_per_image(size):
    # A kernel of 13 reaches beyond the small sizes: reflect padding cuts it to 2 S - 1.
    sigma = torch.tensor([0.1, 0.0, 0.5, 1.0, 0.0, 1.5, 2.0, 0.3])
    x = images(8, size, size)
    params = unchanged(make(size), 8, sigma=sigma)
    out = check(x, params, make(size))
    plain = common.apply_params(x, unchanged(make(size), 8), make(size))
    assert torch.equal(out[sigma == 0], plain[sigma == 0])


def test_blur_kernel_follows_the_largest_sigma():
    aug = make(48, sigma=(3.0, 5.0), blur=1.0)
    check(images(6, 48, 48), common.sample_params(aug, 6, generator()), aug)


# The whole chain


@pytest.mark.parametrize("seed", range(12))
def test_whole_chain_with_random_augmentations(seed):
    g = generator(100 + seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (1,), generator=g).item()]

    size = pick(16, 31, 32, 48)
    height, width = pick((32, 32), (96, 64), (29, 41), (150, 200))
    aug = make(
        size,
        crop=pick(None, (0.08, 1.0), (0.5, 0.9)),
        ratio=pick((3 / 4, 4 / 3), (1.0, 1.0), (0.5, 3.0)),
        flip=pick(0.0, 0.5, 1.0),
        jitter=pick((0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2), (0.0, 2.0, 0.3, 0.5)),
        jitter_p=pick(0.0, 0.8, 1.0),
        gray=pick(0.0, 0.2, 1.0),
        blur=pick(0.0, 0.5, 1.0),
        sigma=pick((0.1, 2.0), (0.5, 1.0)),
        erase=pick(0.0, 0.25, 1.0),
        mean=pick((0.0, 0.0, 0.0), (0.485, 0.456, 0.406)),
        std=pick((1.0, 1.0, 1.0), (0.229, 0.224, 0.225)),
        solarize=pick(0.0, 0.2, 1.0),
    )
    n = pick(1, 17, 70)
    check(images(n, height, width, seed), common.sample_params(aug, n, g), aug)


def test_cropped_images_skip_only_the_crop():
    aug = make(**FULL)
    params = common.sample_params(aug, 40, generator())
    check(images(40), params, aug, cropped=True)


def test_crop_in_a_worker_equals_crop_on_the_device():
    aug = make(**FULL)
    x, params = images(20, 40, 52), common.sample_params(aug, 20, generator())
    boxes = common.crop_boxes(params["crop"], 40, 52, aug["crop"], aug["ratio"])
    crops = []
    for image, (top, left, h, w) in zip(x, boxes.tolist()):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        pil = pil_functional.resized_crop(pil, top, left, h, w, [32, 32])
        crops.append(pil_functional.pil_to_tensor(pil))
    aug = make(**dict(FULL, jitter_p=0.0, solarize=0.0, std=(1.0, 1.0, 1.0)))
    params = common.sample_params(aug, 20, generator())
    got = common.apply_params(torch.stack(crops), params, aug, cropped=True)
    want = common.apply_params(x, params, aug)
    # PIL rounds to 8 bits after the horizontal and after the vertical pass.
    assert (got - want).abs().max() <= 1.1 / 255


@pytest.mark.parametrize("hue", [0.0, 0.1])
def test_against_the_pil_pipeline(hue):
    jitter = (0.4, 0.4, 0.4, hue)
    aug = make(crop=(0.2, 1.0), flip=0.5, jitter=jitter, jitter_p=1.0, gray=0.2)
    x, params = images(100), common.sample_params(aug, 100, generator())
    got = common.apply_params(x, params, aug) * 255
    boxes = common.crop_boxes(params["crop"], 32, 32, aug["crop"], aug["ratio"])
    ops = [getattr(pil_functional, op.__name__) for op in JITTER_OPS]
    want = []
    for i in range(100):
        y = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        y = pil_functional.resized_crop(y, *boxes[i].tolist(), [32, 32])
        y = pil_functional.hflip(y) if params["flip"][i] else y
        for op in params["order"][i].tolist():
            if op < 3 or hue > 0:
                y = ops[op](y, params["factor"][i, op].item())
        y = pil_functional.to_grayscale(y, 3) if params["gray"][i] else y
        want.append(pil_functional.pil_to_tensor(y))
    error = (got - torch.stack(want)).abs()
    # PIL cuts each of up to six results to 8 bits, an error of up to 1 that later factors of up to
    # 1.4 enlarge; its hue has 256 steps, which the next operations enlarge as well.
    assert error.mean() < 1.6
    assert error.flatten().quantile(0.99) < (8 if hue else 3)
    assert error.max() < (32 if hue else 5)


@pytest.mark.parametrize("op", range(4))
def test_each_jitter_operation_against_pil(op):
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(50, 1)
    spread = 0.1 if op == 3 else 0.4
    factor[:, op] += torch.linspace(-spread, spread, 50)
    x = images(50)
    got = common.apply_params(x, unchanged(make(), 50, factor=factor, jitter=[True] * 50), make())
    function = getattr(pil_functional, JITTER_OPS[op].__name__)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
    pil = [function(image, value.item()) for image, value in zip(pil, factor[:, op])]
    want = torch.stack([pil_functional.pil_to_tensor(image) for image in pil])
    error = (got * 255 - want).abs()
    # One result cut to 8 bits; the mean gray of PIL's contrast and its gray are whole numbers.
    assert error.mean() < 0.6
    assert error.max() < (20 if op == 3 else 1.5)  # a step of PIL's hue is 6 / 256 of the chroma


def test_images_do_not_depend_on_their_batch():
    aug = make(**FULL)
    x, params = images(90), common.sample_params(aug, 90, generator())
    whole = common.apply_params(x, params, aug)
    assert torch.equal(whole, common.apply_params(x, params, aug))
    for i in (0, 41, 89):
        one = common.apply_params(x[i : i + 1], {k: v[i : i + 1] for k, v in params.items()}, aug)
        torch.testing.assert_close(one[0], whole[i], atol=1e-6, rtol=0)
    turn = torch.randperm(90, generator=generator())
    turned = common.apply_params(x[turn], {k: v[turn] for k, v in params.items()}, aug)
    torch.testing.assert_close(turned, whole[turn], atol=1e-6, rtol=0)


def test_input_is_not_changed_and_an_empty_batch_is_empty():
    aug = make(**FULL)
    x, params = images(8), common.sample_params(aug, 8, generator())
    before, numbers = x.clone(), {k: v.clone() for k, v in params.items()}
    common.apply_params(x, params, aug)
    common.apply_params(x, params, aug, cropped=True)
    assert torch.equal(x, before)
    assert all(torch.equal(params[k], numbers[k]) for k in params)
    empty = common.apply_params(x[:0], {k: v[:0] for k, v in params.items()}, aug)
    assert empty.shape == (0, 3, 32, 32)


def test_strided_images_and_reduced_precision_change_nothing(monkeypatch):
    aug = make(**FULL)
    x, params = images(8), common.sample_params(aug, 8, generator())
    want = common.apply_params(x, params, aug)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(common.apply_params(last, params, aug), want, atol=1e-6, rtol=0)
    # Many CPUs ignore the setting, so look at it where it matters.
    seen, bmm = [], torch.bmm

    def watched(a, b, **out):
        seen.append(torch.get_float32_matmul_precision())
        return bmm(a, b, **out)

    monkeypatch.setattr(torch, "bmm", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = common.apply_params(x, params, aug)
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    aug = make(**FULL)
    x, params = images(300, 40, 52), common.sample_params(aug, 300, generator())
    want = common.apply_params(x, params, aug)
    common.apply_params(x.cuda(), params, aug)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        on_device = x.cuda(non_blocking=True)
        got = common.apply_params(on_device, params, aug)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = False
    std = torch.tensor(aug["std"]).view(3, 1, 1)
    torch.testing.assert_close(got.cpu() * std, want * std, **TOLERANCE)


def test_bad_input_is_refused():
    aug = make(**FULL)
    x, params = images(4), common.sample_params(aug, 4, generator())
    for wrong in (x.float(), x[0], x[:, :1], x.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="must be .n, 3, H, W. uint8"):
            common.apply_params(wrong, params, aug)
    with pytest.raises(ValueError, match="32 x 32, got 40 x 32"):
        common.apply_params(images(4, 40, 32), params, aug, cropped=True)
    with pytest.raises(ValueError, match="one row for each of the 3"):
        common.apply_params(x[:3], params, aug)
