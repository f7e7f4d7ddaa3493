"""Measure this project on a machine with one GPU: one command, at most nine minutes, no internet.

    python tests/bench/gpu.py                      # all parts, into results/gpu/
    python tests/bench/gpu.py --part b d           # only these
    python tests/bench/gpu.py --device cpu --out DIR    # toy sizes: does the benchmark itself work?

a  Compare: five steps of every method on the CPU and on the GPU from the same weights. Relative
   differences of the losses, and of the weights, over how far the steps moved them.
b  Split: where the time of a step goes, with images/s and peak memory. ResNet-18 at 32 pixels,
   batch 512 (cifar10 recipes), and ResNet-50 at 224 pixels, batch 128, from JPEG files.
c  Epoch: the second epoch of CIFAR-10 (of random pixels if it is not in --data-dir), and the kNN.
d  Search: K-means of ImageNet's size, and the kNN of 50,000 queries in it, checked by float64.
e  Waits: how often a step waits for the device, by torch.cuda.set_sync_debug_mode and as
   tests/pretend_cuda.py counts it without a GPU.

The scripts run as they are: this file only wraps the functions of common.py that every loop calls.
No row begins after eight minutes. Each is saved at once; the same command goes on with the rest.
To measure a row again, remove it from its JSON. A row that failed holds the error, and the exit
status is then 1, as it is for a difference above the tolerance. Parts b to e keep torch's own
setting of TF32, part a turns it off.
"""
import argparse
import collections
import contextlib
import copy
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pretend_cuda
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import cld
import clinfonce
import common
import rince
import sogclr_clip
import wcl

TINY = {  # small networks for parts a and e: name -> module, flags
    "clinfonce": (clinfonce, ["--clusters", "label"]),
    "cld": (cld, ["--k", "8"]),
    "cld-mocov2": (cld, ["--base", "mocov2", "--queue", "64", "--k", "8"]),
    "rince": (rince, ["--queue", "64"]),
    "wcl": (wcl, ["--hidden", "64"]),
    "sogclr_clip": (sogclr_clip, []),
}
# Tolerances of part a. One step is compared closely. Five are not: CLD and WCL make discrete
# choices, and one that rounding changed moved the weights of WCL by 28 % (1 against 2 threads).
FLOAT32 = dict(first_loss=1e-4, first_step=0.02, losses=0.1, weights=0.5)
MIXED = dict(first_loss=0.05, losses=0.1)  # the gradients differ by 20 % and more
MODES = {  # of part a: flags of both runs, flags of the second, tolerances
    "float32": ([], [], FLOAT32),
    "micro-batch": (["--micro-batch", "8"], [], FLOAT32),
    "bf16": ([], ["--amp", "bf16"], MIXED),
    "fp16": ([], ["--amp", "fp16"], MIXED),
    "compile": ([], ["--compile"], FLOAT32),
}
TOY = ["--threads", "1", "--image-size", "32", "--arch", "resnet-tiny"]
CIFAR = {  # the cifar10 recipes, for parts b and c: module, flags, further ones of the toy size
    "clinfonce": (clinfonce, ["--recipe", "cifar10", "--kmeans-warmup", "2"], [*TOY, "--k", "4"]),
    "cld": (cld, ["--recipe", "cifar10"], TOY),
    "rince": (rince, ["--recipe", "cifar100", "--arch", "resnet18"], TOY),  # needs superclasses
    "wcl": (wcl, ["--recipe", "cifar10"], [*TOY, "--hidden", "64"]),
}
BIG = ["--dataset", "folder", "--arch", "resnet50", "--stem", "imagenet", "--image-size", "224"]
FILES = {  # ResNet-50 from files, for part b
    "clinfonce": (clinfonce, ["--recipe", "imagenet100", "--clusters", "label", *BIG], TOY),
    "cld": (cld, ["--recipe", "imagenet", *BIG], TOY),
    "rince": (rince, ["--recipe", "cifar100", *BIG], TOY),
    "wcl": (wcl, ["--recipe", "imagenet", *BIG], [*TOY, "--hidden", "64"]),
    "sogclr_clip": (sogclr_clip, ["--recipe", "cc3m", "--dataset", "folder", "--image-size", "224"],
                    [*TOY[:4], "--model", "tiny-resnet"]),
}


def table(n, size=32, files=()):
    """A `common.Table` of n random pictures in ten classes: pixels in memory, or the given files.
    The classes are of five superclasses, and every picture has a caption of its own."""
    label = torch.arange(n) % 10
    names = dict(label=[f"class {i}" for i in range(10)], coarse=[f"group {i}" for i in range(5)])
    images = None
    if not files:  # smooth, as noise would give all pictures nearly equal features
        x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))
        images = (255 * F.interpolate(x, size=size, mode="bilinear")).byte()
    return common.Table(dict(label=label, coarse=label // 2), names, images,
                        [files[i % len(files)] for i in range(n)] if files else None,
                        captions=[f"picture number {i}" for i in range(n)])


def jpegs(folder, n, width=500, height=375):
    """Write n JPEGs of about 90 kB; returns their paths."""
    random, paths = np.random.default_rng(0), []
    for i in range(n):
        x = random.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
        x = np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC))
        x = (x + random.normal(0, 12, x.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(Path(folder) / f"{i}.jpg"))
        Image.fromarray(x).save(paths[-1], quality=92)
    return paths


# ---------------------------------------------------------------------------------- a run of steps


class Finished(Exception):
    """Leaves a script's loop."""


class Steps:
    """Run a script for some steps, with marks in time where a part of the step begins.

    After `run`: losses of the steps; start, the initial weights. `marks`: pairs of the part that
    begins and the moment, on the device's clock; at_step may clear them to begin anew.
    """

    def __init__(self, device):
        self.device, self.marks, self.losses, self.start = device, [], [], None

    def now(self):
        """A moment: an event in the stream of the GPU, which waits for nothing, or seconds."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, part):
        """A part of the step begins here; returns the one that ends."""
        before = self.marks[-1][0] if self.marks else None
        self.marks.append((part, self.now()))
        return before

    def parts(self):
        """Milliseconds of each part, the sum over all marks but the last, which ends them."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        times = collections.Counter()
        for (part, begin), (_, end) in itertools.pairwise(self.marks):
            times[part] += (1e3 * (end - begin) if self.device == "cpu" else
                            begin.elapsed_time(end))
        return dict(times)

    def network_output(self, module, inputs, output):
        """Forward hook: the backward pass of the loss ends with the last gradient of an output."""
        def reached(grad):
            if self.marks[-1][0] == "backward":  # not the last: that one was too early
                self.marks.pop()
            self.enter("backward")

        for x in output if isinstance(output, (list, tuple)) else [output]:
            if x is not None and x.requires_grad:
                x.register_hook(reached)

    def patches(self, at_step):
        """name -> replacement of the functions of common that bound the parts of a step."""
        real = {k: getattr(common, k) for k in ("augment", "autocast", "check_loss", "distribute",
                                                "scaler")}

        def augment(batch):
            before = self.enter("augmentation")
            x = real["augment"](batch)
            self.enter("forward" if before in ("data", None) else before)
            return x

        @contextlib.contextmanager
        def autocast(args, device, **evaluation):
            with real["autocast"](args, device, **evaluation):
                yield
            if not evaluation:
                self.enter("loss")

        def distribute(model, *args, **kwargs):
            self.start = weights(model)
            network = real["distribute"](model, *args, **kwargs)
            network.register_forward_hook(self.network_output)
            return network

        def scaler(args, device):
            it = real["scaler"](args, device)
            scale, update = it.scale, it.update

            def scale_loss(loss):
                self.enter("loss backward")
                return scale(loss)

            def update_scale():
                update()
                self.enter("rest")

            it.scale, it.update = scale_loss, update_scale
            return it

        def check_loss(*args, **kwargs):
            self.enter("wait")
            values = real["check_loss"](*args, **kwargs)
            self.losses.append(values["loss"])
            self.enter("optimizer")
            return values

        def end_step(step, state, args, data, evaluate):
            self.enter("data")
            at_step(step + 1, state, evaluate)

        return dict(augment=augment, autocast=autocast, distribute=distribute, scaler=scaler,
                    check_loss=check_loss, end_step=end_step, start_run=lambda *args: None)

    def run(self, module, flags, at_step):
        """module.main(flags) until at_step(steps done, state, evaluate) raises Finished."""
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(stream(printed))
            stack.enter_context(mock.patch.multiple(common, **self.patches(at_step)))
            stack.enter_context(contextlib.suppress(Finished))
            try:
                module.main([*flags, "--out", f"{folder}/run"])
            except SystemExit:
                raise RuntimeError(printed.getvalue().splitlines()[-1]) from None
        return self


def sources(**tables):
    """Inside, common.load gives these pairs of tables in place of the data sets of these names."""
    return mock.patch.dict(common.SOURCES, {name: lambda args, pair=pair: copy.deepcopy(pair)
                                            for name, pair in tables.items()})


def weights(model):
    """All parameters of a module as one float64 vector on the CPU."""
    return torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])


def reset_peak(device):
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def seconds(device):
    """The time when all work so far is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device):
    """Peak MB: allocated on the GPU since `reset_peak`, or resident on the CPU."""
    return common.memory_mb() if device == "cpu" else torch.cuda.max_memory_allocated() >> 20


@contextlib.contextmanager
def tf32_off():
    """Inside, float32 is float32 on a GPU, also in convolutions."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.allow_tf32 = value


# ---------------------------------------------------------------------------------- the parts

# Each part yields pairs: the name of a row, and the function that measures it.


def part_a(bench):
    """Compare."""
    small = sources(cifar10=(table(320), table(64)))
    base = ["--dataset", "cifar10", "--batch-size", "32", "--warmup", "0", "--threads", "1"]

    def five_steps(name, device, flags):
        (module, own), steps, found = TINY[name], Steps(device), []
        lr = ["--lr", "0.0001" if module is sogclr_clip else "0.005"]

        def at_step(done, state, evaluate):
            found.append(weights(state["model"]))
            if done == 5:
                # fp16 begins with a scale of 2^16 and halves it for every step that it skips
                scale = state["scaler"].state_dict().get("scale", 2 ** 16)
                found.append(16 - round(math.log2(scale)))
                raise Finished

        with small:
            steps.run(module, [*base, *own, *lr, *flags, "--device", device], at_step)
        *after, skipped = found
        return torch.tensor(steps.losses).double(), [steps.start, *after], skipped

    references = {}

    def compare(name, mode):
        both, more, tolerances = MODES[mode]
        if (key := (name, *both)) not in references:
            references[key] = five_steps(name, "cpu", both)
        losses, w, _ = references[key]
        losses_2, w_2, skipped = five_steps(name, bench.device, both + more)
        assert torch.equal(w[0], w_2[0]), "the initial weights differ"
        loss = (losses - losses_2).abs() / losses.abs()
        first_step, last_step = ((w[i] - w_2[i]).norm() / (w[i] - w[0]).norm() for i in (1, -1))
        row = dict(first_loss=loss[0].item(), first_step=first_step.item(),
                   losses=loss.max().item(), weights=last_step.item(), skipped_steps=skipped)
        judged = ["first_loss"] if skipped else tolerances  # what follows a skipped step differs
        return dict(row, tolerances=tolerances, within=all(row[k] <= tolerances[k] for k in judged))

    modes = [m for m in MODES if bench.device != "cpu" or m not in ("fp16", "compile")]
    with tf32_off():
        for mode, name in itertools.product(modes, TINY):
            yield f"{name} {mode}", lambda name=name, mode=mode: compare(name, mode)


def part_b(bench):
    """Split."""
    toy, device = bench.device == "cpu", bench.device
    warm, count = (1, 2) if toy else (8, 20)

    def split(module, flags, batch, tables):
        steps, found = Steps(device), {}

        def at_step(done, state, evaluate):
            if done == warm:
                reset_peak(device)
                steps.marks = [("data", steps.now())]
            elif done == warm + count:
                found.update(steps.parts(), memory_mb=memory(device))
                raise Finished

        with sources(**tables):
            steps.run(module, [*flags, "--batch-size", str(batch), "--device", device], at_step)
        peak, ms = found.pop("memory_mb"), sum(found.values())
        return dict(images_per_s=1e3 * count * batch / ms, step_ms=ms / count, memory_mb=peak,
                    loss_share=100 * (found["loss"] + found["loss backward"]) / ms,
                    **{f"{part} %": 100 * v / ms for part, v in found.items()})

    flags = ["--amp", "auto", "--channels-last", "--workers", "0" if toy else str(bench.workers)]
    B = 16 if toy else 512
    pixels = (table(B * (warm + count + 2)), table(64))
    for name, (module, own, small) in CIFAR.items():
        yield f"{name} 32 px", lambda module=module, own=own + small * toy: split(
            module, own + flags, B, dict(cifar10=pixels, cifar100=pixels))
    b = 8 if toy else 128
    with tempfile.TemporaryDirectory() as folder:
        files = jpegs(folder, 8 if toy else 400)
        photos = (table(b * (warm + count + 10), files=files), table(64, files=files))
        for name, (module, own, small) in FILES.items():
            yield f"{name} 224 px", lambda module=module, own=own + small * toy: split(
                module, own + flags, b, dict(folder=photos))


def part_c(bench):
    """Epoch."""
    toy, device = bench.device == "cpu", bench.device
    fake = (table(64), table(32)) if toy else (table(50000), table(10000))

    def epoch(module, flags):
        steps, found, real = Steps(device), {}, []
        name = "cifar100" if module is rince else "cifar10"

        def load(args):
            with contextlib.suppress(common.BadInput):
                real.append(read[name](args))
            return real[0] if real and not toy else copy.deepcopy(fake)

        def at_step(done, state, evaluate):
            per_epoch = state["log"].steps_per_epoch
            if done == per_epoch:
                reset_peak(device)
                found["epoch_s"] = -seconds(device)
            elif done == 2 * per_epoch:
                end = seconds(device)
                found.update(epoch_s=found["epoch_s"] + end, images=per_epoch * batch,
                             memory_mb=memory(device))
                found.update(evaluate(), knn_s=seconds(device) - end)
                raise Finished

        read, batch = dict(common.SOURCES), 16 if toy else 512
        with mock.patch.dict(common.SOURCES, {name: load}):
            steps.run(module, [*flags, "--batch-size", str(batch), "--device", device, "--data-dir",
                               bench.data_dir], at_step)
        return dict(found, images_per_s=found["images"] / found["epoch_s"],
                    pixels=name if real and not toy else "random")

    for name, (module, own, small) in CIFAR.items():
        yield name, lambda module=module, own=own + small * toy: epoch(module, own)


def part_d(bench):
    """Search."""
    toy, device = bench.device == "cpu", bench.device
    N = 2000 if toy else 1281167

    def rows(n, D, seed):  # unit vectors
        random = torch.Generator(device).manual_seed(seed)
        return F.normalize(torch.randn(n, D, generator=random, device=device), dim=1)

    def kmeans(k):
        centres = rows(4 * k, 128, 0)  # features of a trained network have clusters
        near = torch.randint(4 * k, (N,), generator=torch.Generator().manual_seed(1))
        x = F.normalize(centres[near.to(device)] + 0.05 * rows(N, 128, 2) * 128 ** 0.5, dim=1)
        reset_peak(device)
        begin = seconds(device)
        ids, c = clinfonce.kmeans_torch(x, k)
        end = seconds(device)
        sample = slice(None, None, max(1, N // 2000))
        d = torch.cdist(x[sample].double(), c.double()).square()  # (s, k)
        own = d.gather(1, ids[sample, None])[:, 0]
        return dict(N=N, D=128, k=k, seconds=end - begin, memory_mb=memory(device),
                    objective=own.mean().item(), largest_error=(own - d.min(1).values).max().item())

    def knn(D, Q, k=200):
        bank = torch.empty(N, D, dtype=torch.float16)  # where extract_features keeps a large one
        for i, block in enumerate(bank.split(2 ** 16)):
            block.copy_(rows(len(block), D, i))
        query, labels = rows(Q, D, 10 ** 6), torch.arange(N) % 1000
        reset_peak(device)
        begin = seconds(device)
        scores = common.knn_scores(query, bank, labels, 1000, k)
        end, peak = seconds(device), memory(device)
        some = slice(None, None, max(1, Q // 100))
        sims = torch.cat([query[some].double() @ block.to(device).double().T
                          for block in bank.split(2 ** 16)], 1)  # (s, N)
        best, at = sims.topk(k)
        votes = torch.zeros(len(best), 1000, dtype=torch.float64, device=device).scatter_add_(
            1, labels.to(device)[at], (best / 0.07).exp())
        same = (votes.argmax(1) == scores[some].argmax(1)).double().mean().item()
        error = (common.top_k(query[some], bank, k)[0] - best).abs().max().item()
        return dict(N=N, D=D, queries=Q, k=k, seconds=end - begin, memory_mb=peak,
                    largest_error=error, same_class=same)

    yield "K-means", lambda: kmeans(20 if toy else 2500)
    yield "kNN", lambda: knn(*((32, 200) if toy else (2048, 50000)))


def part_e(bench):
    """Waits."""
    import pretend_cuda

    warm, count = 4, 4
    base = ["--dataset", "cifar10", "--batch-size", "32", "--device", "cuda", "--threads", "1"]
    small = sources(cifar10=(table(320), table(64)))

    def waits(name, begin, read):
        """Waits of a step, and how often each line waits."""
        module, flags = TINY[name]
        found = []

        def at_step(done, state, evaluate):
            if done == warm:
                begin()
            elif done == warm + count:
                found.extend(read())
                raise Finished

        with small:
            Steps("cpu").run(module, [*base, *flags], at_step)
        sites = collections.Counter(found)
        return dict(waits_per_step=len(found) / count,
                    lines={line: n / count for line, n in sorted(sites.items())})

    def pretended(name):
        with pretend_cuda.one_gpu() as gpu:
            return waits(name, gpu.events.clear, lambda: [
                e.site.split("  ")[0] for e in gpu.events if e.kind == "wait"])

    def measured(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def begin():
                caught.clear()
                torch.cuda.set_sync_debug_mode("warn")

            def read():
                torch.cuda.set_sync_debug_mode("default")
                return [f"{Path(w.filename).name}:{w.lineno}" for w in caught
                        if "synchronizing CUDA operation" in str(w.message)]

            try:
                return waits(name, begin, read)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for name in TINY:
        if bench.device == "cuda":
            yield f"{name} measured", lambda name=name: measured(name)
        yield f"{name} pretended", lambda name=name: pretended(name)


PARTS = dict(a=part_a, b=part_b, c=part_c, d=part_d, e=part_e)


# ---------------------------------------------------------------------------------- the command


def run_part(part, bench, environment):
    """Measure the missing rows of a part; returns its rows, or None when the time is up."""
    path = bench.out / f"{part}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("environment") != environment:
        record = dict(environment=environment, rows={})
    with contextlib.closing(PARTS[part](bench)) as rows:
        for name, measure in rows:
            if name in record["rows"]:
                continue
            if time.monotonic() > bench.deadline:
                return None
            begin = time.perf_counter()
            try:
                row = measure()
            except Exception as error:  # the other rows are still worth measuring
                row = dict(error=f"{type(error).__name__}: {error}"[:500])
            record["rows"][name] = dict(row, wall_s=time.perf_counter() - begin)
            text = json.dumps(record, indent=1)
            common.atomic_write(path, lambda file, text=text: file.write(text.encode()))
            print(f"{part}  {name}: {shorten(row)}", flush=True)
            if bench.device == "cuda" and "error" in row:
                torch.cuda.synchronize()  # raises if the device is lost; the same command goes on
    return record["rows"]


def cell(value):
    if isinstance(value, dict):
        return ", ".join(f"{k} ({v:.3g})" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten(row):
    return ", ".join(f"{k} {cell(v)}" for k, v in row.items() if not isinstance(v, dict))


def write_tables(out, environment):
    """table.md: one table for each part that is there."""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    lines = [f"{environment['device']}; {versions}; made by tests/bench/gpu.py", ""]
    for part, function in PARTS.items():
        path = out / f"{part}.json"
        if path.exists():
            rows = json.loads(path.read_text())["rows"]
            names = list(dict.fromkeys(k for row in rows.values() for k in row))
            lines += [f"## {part}: {function.__doc__.strip('.').lower()}", "",
                      f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            lines += [f"| {name} | {' | '.join(cell(row.get(k, '')) for k in names)} |"
                      for name, row in rows.items()] + [""]
    common.atomic_write(out / "table.md", lambda file: file.write("\n".join(lines).encode()))


def main(argv=None):
    """Measure, save and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="default results/gpu; needed with --device cpu")
    parser.add_argument("--data-dir", default="data", help="of CIFAR-10 and CIFAR-100, for part c")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1),
                        help="readers of files, for part b")
    parser.add_argument("--minutes", type=float, default=8, help="no row begins after these")
    bench = parser.parse_args(argv)
    if bench.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --out DIR runs toy sizes")
    if bench.device == "cpu" and bench.out is None:
        parser.error("--device cpu needs --out: results/gpu is for figures of a GPU")
    bench.out = bench.out or Path(__file__).parents[2] / "results" / "gpu"
    bench.deadline = time.monotonic() + 60 * bench.minutes
    environment = common.environment(torch.device(bench.device))
    if bench.device == "cuda":
        environment["versions"].update(cuda=torch.version.cuda,
                                       cudnn=torch.backends.cudnn.version())
    good = True
    for part in bench.part:
        rows = run_part(part, bench, environment)
        write_tables(bench.out, environment)
        if rows is None:
            print("the time is up; the same command goes on")
            return 1
        good &= all("error" not in row and row.get("within", True) for row in rows.values())
    print(f"{bench.out}/table.md" + (": done" if good else ": some rows failed or differ too much"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
