"""Views per second of the batched augmentation and of torchvision's per-image pipeline.

    python tests/bench/augmentation.py                        # 32 x 32, CPU, one thread
    python tests/bench/augmentation.py --size 224 --blur 0.5

Both crop, flip, jitter, gray, blur and normalise uint8 images that are in memory. Each number is
the best of several repetitions, in turns, so that other load on the machine favours neither. On a
CUDA machine the batched version runs on the GPU as well, timed by CUDA events after a warm-up.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402


def pil_pipeline(aug):
    steps = [
        transforms.RandomResizedCrop(aug["size"], aug["crop"]),
        transforms.RandomHorizontalFlip(aug["flip"]),
        transforms.RandomApply([transforms.ColorJitter(*aug["jitter"])], aug["jitter_p"]),
        transforms.RandomGrayscale(aug["gray"]),
    ]
    if aug["blur"] > 0:
        # The kernel of the batched version: 3 sigma on each side.
        blur = transforms.GaussianBlur(2 * int(3 * aug["sigma"][1]) + 1, aug["sigma"])
        steps.append(transforms.RandomApply([blur], aug["blur"]))
    steps += [transforms.ToTensor(), transforms.Normalize(aug["mean"], aug["std"])]
    return transforms.Compose(steps)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def gpu_seconds(function, repeats):
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="side of the images and of the crops")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--blur", type=float, default=0.0, help="probability of a Gaussian blur")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--pil-images", type=int, default=0, help="0: 500 for 32 x 32, 20 for 224")
    parser.add_argument("--precropped", action="store_true", help="the images are crops already")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    aug = dict(
        size=args.size,
        crop=(0.2, 1.0),
        flip=0.5,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray=0.2,
        blur=args.blur,
        sigma=(0.1, 2.0),
        ratio=(3 / 4, 4 / 3),
        solarize=0.0,
        erase=0.0,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, 8, 8, generator=generator)
    x = torch.nn.functional.interpolate(x, size=(args.size, args.size), mode="bicubic")
    x = (x * 255).clamp(0, 255).to(torch.uint8)
    count = args.pil_images or max(20, 500 * 32 * 32 // args.size**2)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x[:count]]
    pil = [pil[i % len(pil)] for i in range(count)]
    pipeline = pil_pipeline(aug)
    if args.precropped:
        pipeline.transforms.pop(0)

    def batched(images):
        params = common.sample_params(aug, len(images), generator)
        return common.apply_params(images, params, aug, cropped=args.precropped)

    def per_image():
        return torch.stack([pipeline(image) for image in pil])

    ours, theirs = [], []
    for _ in range(args.repeats + 1):  # the first of each is the warm-up
        ours.append(seconds(lambda: batched(x)))
        theirs.append(seconds(per_image))
    ours, theirs = args.batch / min(ours[1:]), count / min(theirs[1:])
    print(
        f"{platform.processor() or platform.machine()}, {args.threads} thread(s), "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
    print(f"{args.size} x {args.size}, batch {args.batch}, blur {args.blur}")
    print(f"torchvision on PIL images  {theirs:12,.0f} views/s")
    print(f"batched, CPU               {ours:12,.0f} views/s   x {ours / theirs:.1f}")
    if torch.cuda.is_available():
        on_gpu = x.cuda()
        fast = args.batch / gpu_seconds(lambda: batched(on_gpu), max(args.repeats, 20))
        name = torch.cuda.get_device_name()
        print(f"batched, CUDA              {fast:12,.0f} views/s   x {fast / theirs:.1f}   {name}")


if __name__ == "__main__":
    main()
