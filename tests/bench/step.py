"""Where the time of a training step goes: data, augmentation, forward, loss, backward, optimizer.

    python tests/bench/step.py                                            # CPU, very small ResNet
    python tests/bench/step.py --arch resnet18 --stem cifar --batch-size 512 --amp bf16   # GPU

Random CIFAR-sized images; medians of --steps steps after a warm-up, in milliseconds. Each part is
closed by a device synchronisation, so the parts are honest and their sum a little above the time
of a free-running step, which is printed beside it.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import clinfonce
import common


def main():
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="resnet-tiny")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--amp", default="none")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    bench = parser.parse_args()
    flags = [x for k in ("arch", "stem", "batch_size", "amp", "threads")
             for x in (f"--{k.replace('_', '-')}", str(getattr(bench, k)))]
    args = common.Parser("clinfonce", "", {"demo": {}}).parse_args([*flags, "--channels-last"])
    args.loss, args.dual, args.dim = "cl-infonce", False, 128
    device = common.setup(args)
    images = torch.randint(0, 256, (8 * args.batch_size, 3, 32, 32), dtype=torch.uint8).to(device)
    table = common.Table(dict(label=torch.zeros(len(images), dtype=torch.long)), {}, images)
    data = common.Data(table, table, args, device)
    model = clinfonce.ClInfoNCE(args, 2).to(device, memory_format=common.memory_format(args))
    optimizer, times = common.optimizer(args, model), {}

    def done(part, since):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            times.setdefault(part, []).append(1e3 * (now - since))
        return now

    def run(measure):
        tick = done if measure else (lambda part, since: since)
        warm = 3
        batches = data.batches(0, bench.steps + warm, common.augmentation(args))
        for i in range(bench.steps + warm):
            if i == warm:
                times.clear()
                begin = done(None, 0)
            t = tick(None, 0)
            batch = next(batches)
            t = tick("data", t)
            x = common.augment(batch)
            t = tick("augmentation", t)
            with common.autocast(args, device):
                z, _ = model(*x)
            t = tick("forward", t)
            loss = clinfonce.cl_infonce(z, batch.rows // 2)
            t = tick("loss", t)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            t = tick("backward", t)
            common.check_loss(loss, i)
            t = tick("check", t)
            optimizer.step()
            tick("optimizer", t)
        return 1e3 * (done(None, 0) - begin) / bench.steps

    run(True)
    parts = {k: statistics.median(v) for k, v in times.items()}
    free = run(False)
    print(f"{common.environment(device)['device']}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} thread(s), {args.arch} ({args.stem} stem), "
          f"batch {args.batch_size} x 2 views, amp {args.amp}")
    for part, ms in parts.items():
        print(f"{part:14s} {ms:9.2f} ms  {100 * ms / sum(parts.values()):5.1f} %")
    share = (parts["data"] + parts["augmentation"]) / sum(parts.values())
    print(f"{'sum of parts':14s} {sum(parts.values()):9.2f} ms; free-running step {free:.2f} ms, "
          f"{1e3 * args.batch_size / free:.0f} images/s")
    print(f"data + augmentation: {100 * share:.1f} % of the step")


if __name__ == "__main__":
    main()
