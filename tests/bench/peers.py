"""Images per second of two-view training beside lightly and torchvision, on a CPU.

    pip install --no-deps --target /tmp/lightly lightly lightning-utilities    # only for this
    PYTHONPATH=/tmp/lightly python tests/bench/peers.py       # five minutes, into results/

memory  One step of SimCLR: 32-pixel images in memory, very small ResNet, batch 256, SGD.
files   The data alone: two augmented views, 224 pixels, of JPEGs of 500 x 375, batch 128.

ours         common.Data and common.augment, loss of clinfonce.py; 2 readers of files. `readers
             alone` leaves out what a GPU does in training: flip, jitter, grayscale, normalization
lightly      its SimCLRTransform and NTXentLoss, in torch's DataLoader
torchvision  two crops by its transforms of PIL images, in torch's DataLoader; our loss

All have the same network, the same augmentation (crop, flip, jitter, grayscale, no blur) and two
threads. In memory a peer runs with one worker and with two; from files everybody has two. The
contenders take turns, --rounds times for --seconds each, and a figure is the median of the rounds.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

import clinfonce
import common

sys.path.append(str(Path(__file__).parent))
from gpu import jpegs, table

VIEWS = dict(crop=[0.2, 1.0], jitter=[0.4, 0.4, 0.4, 0.1], gray=0.2)


class TwoViews(torch.utils.data.Dataset):
    """Two transformed views of each image: uint8 (H, W, 3) arrays, or paths."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        image = (Image.open(image).convert("RGB") if isinstance(image, str) else
                 Image.fromarray(image))
        return self.transform(image)


def torchvision_views(size):
    """torchvision's two crops: a function of a PIL image to two tensors."""
    (low, high), jitter = VIEWS["crop"], VIEWS["jitter"]
    one = transforms.Compose([
        transforms.RandomResizedCrop(size, (low, high)), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*jitter)], 0.8),
        transforms.RandomGrayscale(VIEWS["gray"]), transforms.ToTensor(),
        transforms.Normalize(*common.IMAGENET)])
    return lambda image: [one(image), one(image)]


def lightly_views(size):
    """lightly's SimCLRTransform with the same strengths."""
    from lightly.transforms import SimCLRTransform

    brightness, contrast, saturation, hue = VIEWS["jitter"]
    return SimCLRTransform(
        input_size=size, cj_bright=brightness, cj_contrast=contrast, cj_sat=saturation, cj_hue=hue,
        min_scale=VIEWS["crop"][0], random_gray_scale=VIEWS["gray"], gaussian_blur=0.0)


def peer_batches(images, transform, batch, workers):
    """Batches of two views, (b, 3, S, S) each, without end."""
    data = TwoViews(images, transform)
    order = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10 ** 9)
    return iter(torch.utils.data.DataLoader(data, batch, sampler=order, num_workers=workers))


def our_batches(images, size, batch, workers, view=common.augment):
    """Batches of two views of a `common.Table`, (2, b, 3, S, S), without end. view: function of
    what `Data.batches` yields."""
    args = common.Parser("clinfonce", "", {"demo": VIEWS}).parse_args(
        ["--batch-size", str(batch), "--image-size", str(size), "--workers", str(workers),
         "--dataset", "folder", "--channels-last"])
    data = common.Data(images, images, args, torch.device("cpu"))
    return (view(b) for b in data.batches(0, 10 ** 9, common.augmentation(args)))


def trainer(loss):
    """A function of a batch of two views: one step of the very small ResNet."""
    torch.manual_seed(0)
    backbone = common.resnet("resnet-tiny")
    model = nn.Sequential(backbone, common.head("mlp", backbone.width, 128))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)

    def step(views):
        x = torch.cat(list(views)).contiguous(memory_format=torch.channels_last)
        value = loss(model(x).unflatten(0, (2, -1)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.item()
    return step


def our_loss(z):
    return clinfonce.cl_infonce(nn.functional.normalize(z, dim=2), tau=0.1, base_tau=0.1)


def lightly_loss():
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.1)
    return lambda z: loss(z[0], z[1])


def speed(batches, step, batch, seconds, warm=8):
    """Images per second of batches that go through `step`, after a warm-up that fills the queue."""
    for _ in range(warm):
        step(next(batches))
    begin, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < begin + seconds:
        step(next(batches))
        count += 1
    return count * batch / (now - begin)


def contenders(kind, folder, toy=False):
    """name -> (function that makes batches, function that makes the step), and the batch."""
    if kind == "memory":
        size, batch, workers, ours = 32, 16 if toy else 256, (1, 2), table(64 if toy else 4096)
        theirs = list(ours.images.permute(0, 2, 3, 1).contiguous().numpy())
    else:
        size, batch, workers = 32 if toy else 224, 8 if toy else 128, (2,)
        theirs = jpegs(folder, 8 if toy else 512)
        ours = table(len(theirs), files=theirs)

    def step(loss):
        return (lambda: trainer(loss())) if kind == "memory" else lambda: lambda views: None

    def peer(transform, n):
        return lambda: peer_batches(theirs, transform(size), batch, n)

    found = {"ours": (lambda: our_batches(ours, size, batch, 2), step(lambda: our_loss))}
    if kind == "files":
        found["ours, readers alone"] = (
            lambda: our_batches(ours, size, batch, 2, view=lambda b: b.images), step(None))
    for name, transform, loss in (("lightly", lightly_views, lightly_loss),
                                  ("torchvision", torchvision_views, lambda: our_loss)):
        for n in workers:
            found[f"{name}, {n} worker{'s' * (n > 1)}"] = peer(transform, n), step(loss)
    return found, batch


def main(argv=None):
    """Measure in turns; write peers.json and peers.md."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=7)
    parser.add_argument("--toy", action="store_true", help="small sizes: does it work?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results")
    args = parser.parse_args(argv)
    try:
        version = metadata.version("lightly")
    except metadata.PackageNotFoundError:
        parser.error("lightly is not installed; the top of this file says how")
    torch.set_num_threads(1 if args.toy else 2)
    environment = common.environment(torch.device("cpu"))
    environment["versions"]["lightly"] = version
    rounds = {"memory": {}, "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind, result in rounds.items():
            found, batch = contenders(kind, folder, args.toy)
            for _ in range(args.rounds):
                for name, (batches, step) in found.items():
                    value = speed(batches(), step(), batch, args.seconds)
                    result.setdefault(name, []).append(value)
                    print(f"{kind:8s} {name:24s} {value:8.0f} images/s", flush=True)
    lines = ["| | | images/s, median | rounds | ours / this |", "|---|---|---|---|---|"]
    for kind, result in rounds.items():
        ours = statistics.median(result["ours"])
        for name, values in result.items():
            value = statistics.median(values)
            lines.append(f"| {kind} | {name} | {value:.0f} | {min(values):.0f} to "
                         f"{max(values):.0f} | {ours / value:.2f} |")
    record = dict(environment=environment, seconds=args.seconds, rounds=rounds)
    for ending, text in (("json", json.dumps(record, indent=1)), ("md", "\n".join(lines))):
        common.atomic_write(args.out / f"peers.{ending}",
                            lambda file, text=text: file.write(f"{text}\n".encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
