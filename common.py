"""What the method files share: everything but the methods.

1 Distributed   2 Data   3 Augmentation   4 Backbones and heads
5 Optimisation  6 Checkpoint and log      7 Evaluation

Two ideas run through the whole file. First, the number of processes changes nothing: --batch-size
is the global batch, each process augments and encodes its own rows, `gather` brings the embeddings
together, and every process computes the loss of the whole batch and updates the same tables.
Second, every random number is a function of (seed, step, purpose), drawn on the CPU for the whole
batch, so a resumed run, or a run with another number of processes, sees the same data.

Letters: N images of a data set, B global batch, b rows of this process, V views, D embedding width,
S image size.

    python common.py --dataset shapes --picture views.png      # images beside their augmented views
"""
import argparse
import array
import atexit
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import fcntl
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import signal
import sys
import tarfile
import textwrap
import threading
import time
import urllib.parse
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import functional as tvf
from torchvision.transforms import v2

# ---------------------------------------------------------------------------------- 1 distributed


class BadInput(Exception):
    """Input that cannot work: one line that says what to do, exit status 2."""


METHODS = ("clinfonce", "cld", "rince", "wcl", "sogclr_clip")


class RunFailed(Exception):
    """A failure during the run: one line, exit status 1. `alone`: only this rank knows of it."""

    def __init__(self, text, alone=False):
        super().__init__(text)
        self.alone = alone


_open = contextlib.ExitStack()  # of this run: progress bars, signal handlers, the folder's lock
_locks = []  # file descriptor of the run folder, if this process writes to one
SIGNALS = (signal.SIGTERM, signal.SIGINT,  # they end a run, which is saved; nohup ignores SIGHUP
           *[signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN))
_signal = dict(asked=0, agreed=False)  # one of SIGNALS: seen by this rank; known to all ranks
_saved = [True]  # whether there is a checkpoint of this run


def rank():
    """Rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank0(text):
    """Print on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def run(train, parser, argv=None):
    """Parse the flags and call train(args); an expected error is one line and an exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # file names may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _open:  # closed before a message, which would stand on the progress bar's line
            train(parser.parse_args(argv))
            if dist.is_initialized():
                # torch 2.4 waits here for gloo's threads and holds the lock that they need in order
                # to free their last tensors: the sleep lets them finish first, without a deadlock
                time.sleep(0.1)
                dist.destroy_process_group()
    except (BadInput, RunFailed, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            error = RunFailed("interrupted")
        elif not isinstance(error, (BadInput, RunFailed)):
            error = _system_error(error)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or getattr(error, "alone", False):
            text = " ".join(str(error).splitlines())  # messages of pandas have several lines
            text += origin(parser.args, text)
            print(f"{parser.prog}: error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, BadInput) else 1) from None


def _system_error(error):
    """RunFailed if the error, which torch raises anywhere in the main process, tells of a lack of
    memory, a lost DataLoader worker, a limit of the system or a file. Any other error is raised
    again."""
    text = str(error).split("\n")[0].strip()
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "CPUAllocator" in text:
        return RunFailed(f"out of memory{text and f' ({text})'}: a training needs less with "
                         "--micro-batch, everything with a smaller --batch-size", alone=True)
    limits = ("DataLoader worker (pid", "Too many open files", "shared memory", "ancillary data")
    if getattr(error, "errno", None) != errno.EMFILE and not any(word in text for word in limits):
        if getattr(error, "filename", None) is None:
            raise error
        return RunFailed(f"{error.filename}: {error.strerror}", alone=True)
    # a loader that is only half made lacks this, and would print a traceback when it is freed
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    loader._workers_status = collections.defaultdict(bool)
    return RunFailed(f"a process that reads images was lost ({text}). It was killed, or memory, "
                     "open files (ulimit -n) or /dev/shm (docker: --shm-size) are too small; fewer "
                     "--workers need less", alone=True)


def _ask(number, _):
    """Handle SIGNALS: save and stop after this step. A second Ctrl-C ends at once, but not the copy
    of the first that torchrun sends."""
    if number == signal.SIGINT and _signal["asked"] and time.time() - _signal["time"] > 1:
        raise KeyboardInterrupt
    _signal.update(asked=number, time=time.time())


def _start_worker(_):
    """In a DataLoader worker: signals and the lock of the run folder belong to the main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    while _locks:
        os.close(_locks.pop())
    # without /dev/shm the thread that sends the batches fails: the main process would wait for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


@atexit.register
def _end_workers():
    """Kill the workers that an error left, as they ignore the SIGTERM that Python sends them."""
    for child in (c for c in multiprocessing.active_children() if c.daemon):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would raise an error
        child.kill()


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus():
    """CPUs of this process, as the default of --threads and --workers: OMP_NUM_THREADS, or its
    share of the CPU set. torchrun sets OMP_NUM_THREADS to 1, which does not count."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > (1 if local_size > 1 else 0):
        return int(given)
    return max(1, CORES // local_size)


def require(module, package, what):
    """BadInput at the start of a run if a module that it needs later is not installed."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{what} needs {module}, which is not installed: pip install {package}"
                       ) from None


def setup(args):
    """Join torchrun's processes if there are any; set device, threads and seed. Returns: the
    torch.device of this rank. BadInput if the batch does not divide or GPUs are too few."""
    for name, value in vars(args).items():
        if any(isinstance(x, float) and not abs(x) <= torch.finfo(torch.float32).max
               for x in (value if isinstance(value, (list, tuple)) else [value])):
            raise BadInput(f"{flag_name(name)} must be finite in float32, got {shown(value)}")
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise BadInput("--device cuda: torch sees no CUDA device; use --device cpu")
    if cuda and local_size > (gpus := torch.cuda.device_count()):
        raise BadInput(f"{local_size} processes on a machine with {gpus} GPU(s): use "
                       f"--nproc_per_node={gpus} or --device cpu")
    if args.batch_size < 1 or args.batch_size % size:
        raise BadInput(f"--batch-size {args.batch_size} is not divisible by the {size} processes")
    torch.set_num_threads(args.threads or cpus())
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if size > 1 and not dist.is_initialized():
        # gloo beside NCCL: features of a very large data set are gathered on the CPU.
        # Four hours: K-means on rank 0 may take longer than the default of ten minutes.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(hours=4))
    if args.amp == "auto":
        args.amp = "bf16" if cuda else "none"  # a CPU emulates bf16, slowly
    torch.manual_seed(args.seed)  # the initial weights; all later draws use generator()
    _signal.update(asked=0, agreed=False)
    _saved[0] = bool(args.out) and (Path(args.out) / "checkpoint.pt").exists()
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        for number in SIGNALS:
            _open.callback(signal.signal, number, signal.signal(number, _ask))
    return device


def generator(seed, step, purpose):
    """CPU generator that is a pure function of (seed, step, purpose text)."""
    key = np.random.SeedSequence([seed, step, zlib.crc32(purpose.encode())])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.b = x.shape[-2]
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x)
        return torch.cat(parts, -2)

    @staticmethod
    def backward(ctx, grad):
        first = rank() * ctx.b
        return world() * grad[..., first:first + ctx.b, :]


def gather(x):
    """Rows of the whole batch on every process: (..., b, D) to (..., B, D), in rank order.

    Every process computes the same loss of the whole batch, so the backward pass only cuts out the
    gradient of its own rows. The factor W makes up for DDP, which averages over the W processes.
    For rows without gradient pass `x.detach()`.
    """
    return _Gather.apply(x.contiguous()) if world() > 1 else x


def all_reduce_sum(x):
    """Sum of a tensor over the processes, in place and without gradient; returns it."""
    if world() > 1:
        dist.all_reduce(x)
    return x


class MicroBatches(nn.Module):
    """Pass at most `rows` rows of every input through a network at a time, inside DDP.

    The gradient is exactly that of the whole batch. The forward pass keeps only the outputs; the
    backward pass runs each part again, so it needs the memory of one part. k parts equal k
    processes: BatchNorm normalises each by itself, the first one updates its running statistics.

    Args: model, inputs (b, ...) to a tensor or a tuple of tensors (..., b, D), None where absent.
    """

    def __init__(self, model, rows):
        super().__init__()
        self.model, self.rows = model, rows

    @contextlib.contextmanager
    def keep_statistics(self):
        """Inside, BatchNorm's running statistics do not change."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [(m.momentum, m.num_batches_tracked) for m in norms]
        for m in norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for m, (momentum, count) in zip(norms, before):
                m.momentum, m.num_batches_tracked = momentum, count

    def forward(self, *inputs, **options):
        """`options` go to the network unchanged."""
        if len(inputs[0]) <= self.rows:
            return self.model(*inputs, **options)
        outputs, first_pass = [], contextlib.nullcontext
        for part in zip(*(x.split(self.rows) for x in inputs)):
            if torch.is_grad_enabled():
                out = torch.utils.checkpoint.checkpoint(
                    self.model, *part, use_reentrant=False, **options,
                    context_fn=lambda now=first_pass: (now(), self.keep_statistics()))
            else:
                with first_pass():
                    out = self.model(*part, **options)
            outputs.append(out)
            first_pass = self.keep_statistics  # from the second part on
        if isinstance(outputs[0], torch.Tensor):
            return torch.cat(outputs, -2)
        return tuple(None if parts[0] is None else torch.cat(parts, -2) for parts in zip(*outputs))


def micro_batches(model, args):
    """The network, in `MicroBatches` if --micro-batch asks for it; BadInput if the last part would
    be a single image, which BatchNorm cannot normalise."""
    if not args.micro_batch:
        return model
    b = args.batch_size // world()
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
                   for m in model.modules())
    if has_norm and b > 1 and 1 in (args.micro_batch, b % args.micro_batch):
        raise BadInput(f"--micro-batch {args.micro_batch} leaves a part of one image of the {b} of "
                       "a process, and BatchNorm needs two")
    return MicroBatches(model, args.micro_batch)


def check_shapes(model, args):
    """BadInput if the network cannot take a batch of this process: images that are too small, or
    one value a channel for BatchNorm. It tries tensors without data, so nothing is computed."""
    b, S = args.batch_size // world(), args.image_size
    tensors = {k: torch.empty_like(v, device="meta") for k, v in model.state_dict().items()}
    x = torch.empty(min(b, args.micro_batch or b), 3, S, S, device="meta")
    problem = None
    # networks that take all views in one pass have two rows for an image, but with cross-entropy
    for views in [(x,), (x, x)][:1 + (vars(args).get("loss") != "ce")]:
        try:
            with torch.no_grad():
                torch.func.functional_call(model, tensors, views)
            return
        except Exception as error:  # only what tells of the shape counts; the rest is no test here
            problem = problem or str(error).split("\n")[0]
    if any(text in problem for text in ("more than 1 value", "too small", "Kernel size")):
        raise BadInput(f"--batch-size {args.batch_size}, {b} in each process, of --image-size {S} "
                       f"does not go through the network ({problem})")


def distribute(model, args, unused=False):
    """The network to train with: SyncBatchNorm, torch.compile, micro-batches and DDP by the flags.
    `unused`: some parameters get no gradient in some steps (their .grad stays None)."""
    device = next(model.parameters()).device
    check_shapes(model, args)
    if args.sync_bn and world() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = micro_batches(torch.compile(model) if args.compile else model, args)
    if world() == 1:
        return network
    return nn.parallel.DistributedDataParallel(
        network, device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=unused)


def check_loss(loss, step, stats=None, features=None, conditions=None):
    """Dict of the loss and `stats`, means over the processes, as floats; RunFailed on all processes
    if anything is wrong. Call it after backward(): only here a step waits for the device.

    The one message also carries the wish of any process to stop (see `should_stop`).
    Args: loss, scalar; stats, name -> scalar for the log; features, name -> (..., B, D) of the
    whole batch that must be finite; conditions, text -> bool scalar that must be true.
    """
    stats, features, conditions = stats or {}, features or {}, conditions or {}
    flags = [x.detach().isfinite().all() for x in features.values()] + [*conditions.values()]
    message = torch.stack([x.detach().double() for x in (loss, *stats.values(), *flags)])
    message = all_reduce_sum(F.pad(message, (0, 1), value=float(_signal["asked"] > 0)))
    *values, asked = message.tolist()
    _signal["agreed"] = asked > 0
    means = {name: v / world() for name, v in zip(["loss", *stats], values)}
    sound = [v == world() for v in values[1 + len(stats):]]
    if not all(sound[:len(features)]):
        check_features(step, **features)
    for text, good in zip(conditions, sound[len(features):]):
        if not good:
            raise RunFailed(f"step {step}: {text}")
    if not math.isfinite(means["loss"]):
        raise RunFailed(f"the loss is {means['loss']} at step {step}; {_advice()}")
    return means


def check_features(step, **features):
    """RunFailed that names which of the features (..., B, D) is not finite, and in which rows."""
    for name, x in features.items():
        bad = (~x.isfinite()).any(-1).view(-1, x.shape[-2]).any(0)  # (B,)
        if bad.any():
            of_rank = bad.view(world(), -1).sum(1).tolist()
            raise RunFailed(f"the output of {name} is not finite at step {step}, in {sum(of_rank)} "
                            f"of {len(bad)} rows (those of each rank: {of_rank}); {_advice()}")


def _advice():
    kept = "the last checkpoint is kept. A" if _saved[0] else "a"
    return f"{kept} smaller --lr or --amp none may help"


def should_stop():
    """Whether the processes agreed, at the last `check_loss`, to save and stop after this step."""
    return _signal["agreed"]


# ---------------------------------------------------------------------------------- 2 data


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {  # channel mean and standard deviation; other data sets use ImageNet's
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "shapes-views": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "captions": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
SKIPPED = re.compile(  # what systems and tools leave
    r"\.|[@#](eaDir|tmp|recycle|recently-snapshot|snapshot|Syno\w*)$|"
    r"\$(RECYCLE\.BIN|AV_\w+)$|__MACOSX$|lost\+found$", re.I)
warnings.filterwarnings("ignore", module="PIL")  # one for each image of a kind, in each process
SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|eval|dev)"
                   r"([-_ .]?(set|data|split|images|imgs))?[-_ .]?\d*", re.I)
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|valid|test)(ing|idation)?(?![a-z])", re.I)
LAYOUT = ("; the layout is DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg (or test/), or "
          "DIR/<class>/*.jpg without a split, and --data-dir names DIR")
IMAGE_ENDINGS = frozenset(  # of the files that Pillow reads without help
    ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN
    and name not in ("EPS", "WMF", "MPEG", "GRIB", "BUFR", "HDF5", "FITS"))
MEMBER = re.compile(r"(.+\.tar):(\d+):(\d+)", re.S)  # file in a tar archive: offset and size


@contextlib.contextmanager
def reading(name):
    """Turn whatever a reader raises inside into one BadInput that names the file, and why."""
    try:
        yield
    except (BadInput, RunFailed):
        raise
    except FileNotFoundError:
        raise BadInput(f"{name} not found") from None
    except Exception as error:  # csv, json, numpy, pandas, zipfile, tarfile raise many kinds
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:200]
        raise BadInput(f"{name} cannot be read: {reason or type(error).__name__}") from None


def encoding_of(path):
    """Encoding of a text file: UTF-16 if it begins with its byte order mark, else UTF-8."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def read_text(name, path, parse=str):
    """What `parse` makes of the text of a file without its byte order mark; BadInput names it."""
    with reading(name):
        return parse(Path(path).read_text(encoding_of(path)))


def read_names(flag, path, known):
    """Sorted names that a file lists, one a line or all on one line; `known`: the names there are.

    "n01558993<TAB>robin" is the name n01558993; blank lines and # lines are comments.
    """
    lines = read_text(f"{flag} {path}", path).splitlines()
    wanted = [s.split("\t")[0].strip() for s in lines if s.strip() and s.strip()[0] != "#"]
    if len(wanted) == 1 and wanted[0] not in known:  # ImageNet-100 of CMC: one line of 100
        wanted = wanted[0].split()
    if not wanted:
        raise BadInput(f"{flag} {path} names no class")
    return sorted(set(wanted))


def open_image(file):
    """RGB image of PIL from a path, a path of `Members` or a binary file.

    As in torchvision, it is the first frame, EXIF's orientation is ignored, and a transparent pixel
    has the colour that is stored under it, often black. 16 bits become 8.
    Raises: what Pillow raises; ValueError for 12 or 32 bits and fractions, of unknown range.
    """
    if isinstance(file, str) and (member := MEMBER.fullmatch(file)):
        with open(member[1], "rb") as shard:
            shard.seek(int(member[2]))
            file = io.BytesIO(shard.read(int(member[3])))
    image = Image.open(file)
    twelve = 12 in getattr(image, "tag_v2", {}).get(258, ())  # of TIFF
    if not twelve and (image.mode.startswith("I;16")
                       or image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if twelve or image.mode[0] in "IF":
        raise ValueError(f"{image.format} in mode {image.mode}; save it with 8 or 16 bits")
    return image.convert("RGB")


def image_fault(path):
    """Why an image cannot be read, with its name in a tar archive; None if it can."""
    try:
        open_image(path)
    except Exception as error:  # Pillow raises many kinds
        reason, name = str(error).replace(f" {str(path)!r}", "") or type(error).__name__, ""
        if member := MEMBER.fullmatch(path):
            with contextlib.suppress(OSError), open(member[1], "rb") as shard:
                shard.seek(int(member[2]) - 512)  # its header
                name = shard.read(100).rstrip(b"\0").decode(errors="replace") + ": "
        return name + reason
    return None


class Texts:
    """A list of N texts in two arrays: 8 bytes a text beside its letters, which reader processes
    share, as they do not count references."""

    def __init__(self, texts):
        data, ends = bytearray(), array.array("q", [0])
        for text in texts:
            data += text.encode(errors="surrogateescape")  # file names may be any bytes
            ends.append(len(data))
        self.data, self.ends = np.frombuffer(bytes(data), np.uint8), np.asarray(ends)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.data[self.ends[i]:self.ends[i + 1]].tobytes().decode(errors="surrogateescape")


class Members:
    """Paths SHARD:OFFSET:SIZE of N files in tar archives, 16 bytes each; see `open_image`."""

    def __init__(self, shards, which, offset, size):
        """which (N,) int32 of the shards, offset (N,) int64, size (N,) int32."""
        self.shards, self.where = shards, (which, offset, size)

    def __len__(self):
        return len(self.where[0])

    def __getitem__(self, i):
        which, offset, size = (x[i] for x in self.where)
        return f"{self.shards[which]}:{offset}:{size}"


@dataclass(eq=False)
class Table:
    """A data set: N images with named integer columns."""

    columns: dict  # name -> int64 (N,); `label` is the class, -1 = unlabelled
    classes: dict  # column name -> list of value names (a column of plain ids may have none)
    images: torch.Tensor = None  # uint8 (N, 3, H, W), or None when `paths` names the files
    paths: list = None  # list, Texts or Members
    captions: list = None  # N texts; list or Texts
    index: torch.Tensor = None  # int64 (N,), number of the row in its source
    notes: list = ()  # texts for the log: what was dropped
    source: str = "the data set"  # the file, for messages
    refused: dict = field(default_factory=dict)  # column -> why it cannot be used
    used: set = field(default_factory=lambda: {"image_id"})  # columns that were asked for
    fingerprint: dict = field(default_factory=dict)  # of the whole source, see `fingerprint`

    def __post_init__(self):
        if self.index is None:
            self.index = torch.arange(len(self.paths if self.images is None else self.images))
        self.notes = list(self.notes)

    def __len__(self):
        return len(self.index)

    def column(self, name):
        """int64 (N,) of a column; BadInput that lists the columns if there is none."""
        if name in self.refused:
            raise BadInput(self.refused[name])
        if name not in self.columns:
            where = "" if self.source == "the data set" else f" in {self.source}"
            raise BadInput(f"no column {name!r}{where}; the data set has: "
                           f"{', '.join(self.columns)}")
        self.used.add(name)
        return self.columns[name]

    def select(self, rows):
        """Table of the given rows (int64), in that order; it looks its texts up in this one's."""
        paths, captions = (x and torch.utils.data.Subset(x, rows)
                           for x in (self.paths, self.captions))
        return dataclasses.replace(
            self, columns={k: v[rows] for k, v in self.columns.items()}, paths=paths,
            images=None if self.images is None else self.images[rows], captions=captions,
            index=self.index[rows])


def ids_of(values, key=None):
    """Ids (N,) int64 of N texts, and the sorted names: the distinct texts. "" is -1, unlabelled."""
    names = sorted(set(values) - {""}, key=key)
    place = {name: i for i, name in enumerate(names)} | {"": -1}
    return torch.tensor([place[v] for v in values], dtype=torch.int64), names


def share_names(train, test):
    """Number the named columns of both tables by the names of the training table.

    `refused` then says which columns cannot be used: those with an id beyond the names, with names
    in one table only, or with a value that the training table does not have.
    """
    for column in train.classes.keys() | test.classes.keys():
        names, why = train.classes.get(column), None
        counts = collections.Counter(names)
        place = {name: i for i, name in enumerate(names or ()) if counts[name] == 1}
        for table in (train, test):
            ids, own = table.columns.get(column), table.classes.get(column)
            if ids is None or names == []:  # nothing to compare with: no training row has a value
                continue
            if own is None or names is None:
                why = f"column {column} has names in one of {train.source} and {test.source} only"
                break
            # -2: not in the training table; the last entry is that of -1, unlabelled
            new = torch.tensor([*(range(len(own)) if own == names else
                                  (place.get(name, -2) for name in own)), -1])
            new, beyond = new[ids.clamp(-1, len(own) - 1)], ids >= len(own)
            if len(bad := ((new == -2) | beyond).nonzero()):
                row = int(bad[0])
                value = int(ids[row]) if beyond[row] else own[ids[row]]
                why = (f"{table.source}, row {int(table.index[row])}: class {value} of column "
                       f"{column} " + ("has no name" if beyond[row] else
                                       "does not occur" if not counts[value] else "occurs twice")
                       + f" in the training file {train.source}" * (not beyond[row]))
                break
            table.columns[column], table.classes[column] = new, names
        if why:
            train.refused[column] = test.refused[column] = why


def balanced_rows(labels, n, seed):
    """n rows, as evenly over the classes as these allow, drawn by seed; int64, ascending."""
    if not 0 < n <= len(labels):
        raise BadInput(f"--limit-train {n}: the training set has {len(labels)} images; take 1 to "
                       f"{len(labels)}")
    order = torch.randperm(len(labels), generator=generator(seed, 0, "subset"))
    by_class = order[torch.sort(labels[order], stable=True).indices]
    counts = torch.unique(labels, return_counts=True)[1]
    place = torch.cat([torch.arange(c) for c in counts])  # 0 for the first of each class, ...
    return by_class[torch.sort(place, stable=True).indices[:n]].sort().values


def _shapes(args):
    """`shapes` renders one image per object, `shapes-views` eight per training object."""
    def table(n, seed, renders=1):
        images, columns, classes, captions = shapes(n, seed, renders=renders)
        return Table(columns, classes, images, captions=captions)
    return table(4096, 0, 8 if args.dataset == "shapes-views" else 1), table(1024, 1)


def _cifar(args):
    """torchvision's files, or the packs <name>_train.npz and <name>_test.npz in --data-dir.

    Columns: label and coarse; the coarse classes of CIFAR-10 are vehicle and animal.
    """
    packs = [Path(args.data_dir) / f"{args.dataset}_{split}.npz" for split in ("train", "test")]
    if all(p.exists() for p in packs) and not args.download:
        tables = _packs(*packs)
    else:
        tables = [_cifar_table(split, args) for split in ("train", "test")]
    if args.dataset == "cifar10":
        vehicle = torch.tensor([0, 1, 8, 9])  # airplane, automobile, ship, truck
        for table in tables:
            table.columns["coarse"] = (~torch.isin(table.column("label"), vehicle)).long()
            table.classes["coarse"] = ["vehicle", "animal"]
    return tables


def _cifar_table(split, args):
    data = _torchvision(getattr(torchvision.datasets, args.dataset.upper()), args,
                        train=split == "train")
    columns, classes = dict(label=torch.tensor(data.targets)), dict(label=list(data.classes))
    if args.dataset == "cifar100":  # torchvision reads only the fine labels of these files
        labels, meta = (pickle.loads((Path(data.root, data.base_folder) / name).read_bytes(),
                                     encoding="latin1") for name in (split, "meta"))
        columns["coarse"] = torch.tensor(labels["coarse_labels"])
        classes["coarse"] = meta["coarse_label_names"]
    return Table(columns, classes, torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous())


def _stl10(args):
    """`stl10`: 5,000 labelled training images; `stl10-full` adds 100,000 unlabelled ones (-1)."""
    tables = []
    for split in ("train" if args.dataset == "stl10" else "train+unlabeled", "test"):
        data = _torchvision(torchvision.datasets.STL10, args, split=split)
        tables.append(Table(dict(label=torch.from_numpy(data.labels).long()),
                            dict(label=list(data.classes)), torch.from_numpy(data.data)))
    return tuple(tables)


def _torchvision(source, args, **which):
    """A torchvision data set; with --download the first process of each machine fetches it."""
    if args.download and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            source(args.data_dir, download=True, **which)
        except (OSError, RuntimeError) as error:
            raise RunFailed(f"--download into {args.data_dir}: {error}", alone=True) from None
    if args.download and world() > 1:
        dist.barrier()
    try:
        return source(args.data_dir, download=False, **which)
    except RuntimeError:
        raise BadInput(f"--dataset {args.dataset}: its files are not in {args.data_dir}/; add "
                       "--download or point --data-dir at them") from None


def npz_table(path, test=None):
    """Read an npz pack: JPEG bytes end to end in `jpeg`, `offsets` (N + 1), integer columns.

    Columns: `labels` becomes `label`, `coarse_labels` `coarse`; `attributes` (N, A) with
    `attribute_names` becomes A columns; other integer arrays of length N keep their names.
    Value names: `classes`, `coarse_classes`, `values_<column>`.
    test: None = all rows; False / True = the rows with `is_test` 0 / 1. Errors: BadInput.
    """
    with reading(f"npz pack {path}"):
        with np.load(path, allow_pickle=False) as pack:
            arrays = {k: pack[k] for k in pack.files}  # each access inflates the array: once
        for key in ("jpeg", "offsets"):
            if key not in arrays:
                raise BadInput(f"npz pack {path} has no array {key!r}; it has {', '.join(arrays)}")
        return _unpack(path, arrays, test)


def _unpack(path, arrays, test):
    jpeg, offsets, n = arrays.pop("jpeg"), arrays["offsets"], arrays["offsets"].size - 1
    names = arrays.pop("attribute_names", np.empty(0, str)).tolist()
    shapes = dict(offsets=(n + 1,), labels=(n,), coarse_labels=(n,), is_test=(n,),
                  attributes=(n, len(names)))
    arrays.setdefault("attributes", np.empty((n, 0), int))
    for key in shapes.keys() & arrays.keys():
        x = arrays[key]
        if x.shape != shapes[key] or x.dtype.kind not in "iub" and key != "is_test":
            raise BadInput(f"npz pack {path}: {key} is {x.dtype} {x.shape}; it takes integers of "
                           f"shape {shapes[key]}, as there are {n} images")
    rename = {"labels": "label", "coarse_labels": "coarse"}
    every = [rename.get(name, name) for name in (*arrays.keys() - {"attributes"}, *names)]
    if twice := [name for name, count in collections.Counter(every).items() if count > 1]:
        raise BadInput(f"npz pack {path} has two columns named {twice[0]!r}")
    arrays |= zip(names, arrays.pop("attributes").T)
    rows, is_test = np.arange(n), arrays.pop("is_test", None)
    if is_test is not None and not np.isin(is_test, (0, 1)).all():
        raise BadInput(f"npz pack {path}: is_test holds other values than 0 and 1")
    if test is not None:
        if is_test is None:
            raise BadInput(f"npz pack {path} has no array is_test; name a --test-file")
        rows = rows[is_test.astype(bool) == test]
    columns = {rename.get(key, key): torch.from_numpy(x[rows].astype(np.int64))
               for key, x in arrays.items() if x.shape == (n,) and x.dtype.kind in "iub"}
    keys = dict({c: f"values_{c}" for c in columns}, label="classes", coarse="coarse_classes")
    classes = {c: arrays[key].astype(str).tolist() for c, key in keys.items() if key in arrays}
    images = []
    for row in rows:
        try:
            image = open_image(io.BytesIO(jpeg[offsets[row]:offsets[row + 1]].tobytes()))
        except Exception as error:  # Pillow raises many kinds
            raise BadInput(f"npz pack {path}: image {row} cannot be decoded: {error}") from None
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise BadInput(f"npz pack {path}: image {row} is {images[-1].shape[:2]}, the first "
                           f"{images[0].shape[:2]}; a pack holds images of one size")
    if not images:
        raise BadInput(f"npz pack {path} has no rows for this split")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Table(columns, classes, images, index=torch.from_numpy(rows), source=str(path))


def _packs(train, test):
    """Two packs; names that only one of them has are those of both."""
    tables = npz_table(train), npz_table(test)
    for table, other in zip(tables, tables[::-1]):
        table.classes = {**other.classes, **table.classes}
    return tables


def _npz(args):
    if args.train_file is None:
        raise BadInput("--dataset npz needs --train-file (and --test-file, or is_test in it)")
    train = Path(args.data_dir) / args.train_file
    if args.test_file is None:
        return npz_table(train, test=False), npz_table(train, test=True)
    return _packs(train, Path(args.data_dir) / args.test_file)


def _entries(folder, skipped):
    """The entries of a folder in order, without the hidden ones, which `skipped` counts."""
    with reading(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if SKIPPED.match(entry.name):
            skipped["hidden"] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise BadInput(f"{entry.path} is a link to nothing: repair or remove it")
        else:
            yield entry


def list_images(folder, skipped):
    """Paths of the images below a folder and the folders that it links to, in order; the Counter
    `skipped` counts what was passed over, hidden entries and endings, for `skipped_notes`."""
    paths, real = [], os.path.realpath(folder) + os.sep
    for entry in _entries(folder, skipped):
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            if not real.startswith(os.path.realpath(entry.path) + os.sep):  # a link to a parent
                paths += list_images(entry.path, skipped)
        elif ending in IMAGE_ENDINGS and entry.is_file():  # no pipe
            paths.append(entry.path)
        else:
            skipped[ending or "files without ending"] += 1
    return paths


def skipped_notes(folder, skipped):
    """The note on what `list_images` passed over, as a list."""
    text = ", ".join(f"{n} {name}" for name, n in sorted(skipped.items()) if n)
    return [f"{folder}: passed over {text}"] if text else []


def class_folders(folder):
    """Sorted names of the folders in a folder."""
    return [entry.name for entry in _entries(folder, collections.Counter()) if entry.is_dir()]


def folder_table(folder, names):
    """Table of the images in the class folders `names`, or in the folder itself if there are none.
    BadInput if a class folder has no image, or looks like a folder of class folders."""
    paths, labels, skipped, beside = [], [], collections.Counter(), collections.Counter()
    if names:
        beside.update(os.path.splitext(entry.name)[1].lower()
                      for entry in _entries(folder, skipped) if not entry.is_dir())
        skipped["files beside the class folders"] = beside.total()
    for label, name in enumerate(names or ["."]):
        images = list_images(folder / name, skipped)
        start = len(os.path.join(folder / name, ""))
        below = sorted({p[start:].partition(os.sep)[0] for p in images if os.sep in p[start:]})
        if inner := [b for b in below if len(names) == 1 or SPLIT.fullmatch(b)]:
            raise BadInput(f"{folder / name} holds the folder {inner[0]}/, so {name} is no class"
                           f"{LAYOUT}")
        if not images:
            raise BadInput(f"folder {folder / name} has no image")
        paths += images
        labels += [label] * len(images)
    loose = sum(n for ending, n in beside.items() if ending in IMAGE_ENDINGS)
    if loose > len(paths):
        raise BadInput(f"{folder} holds {loose} images beside its class folders, which hold "
                       f"{len(paths)}: for a flat folder move {names[0]}/ away{LAYOUT}")
    return Table(dict(label=torch.tensor(labels)), dict(label=names or ["unlabelled"]), paths=paths,
                 source=str(folder), notes=skipped_notes(folder, skipped))


def _folder(args):
    """ImageFolder layout: DIR/train/<class>/*.jpg and DIR/val (or test)/<class>/*.jpg.

    Without DIR/train, DIR itself holds the class folders (or unlabelled images), and every fifth
    image of a class is held out. --classes FILE names the class folders to use, see `read_names`.
    """
    root = Path(args.data_dir)
    if not root.is_dir():
        raise BadInput(f"--data-dir {root}: no such folder")
    parts = class_folders(root)
    base = root / "train" if "train" in parts else root
    names = class_folders(base)
    if args.classes:
        wanted = read_names("--classes", args.classes, names)
        if missing := sorted(set(wanted) - set(names)):
            raise BadInput(f"--classes {args.classes}: no folder in {base} for {missing[:3]}")
        names = wanted
    if base == root:
        bare = [SPLIT_WORD.sub("", name) for name in names]  # seg_train and seg_test are splits
        if splits := [name for name, rest in zip(names, bare)
                      if SPLIT.fullmatch(name) or name != rest and bare.count(rest) > 1]:
            raise BadInput(f"{root} holds {splits[0]}/ and no train/{LAYOUT}")
        table = folder_table(root, names)
        counts = table.columns["label"].unique(return_counts=True)[1]
        held_out = torch.cat([torch.arange(n) for n in counts]) % 5 == 4
        if not held_out.any():
            raise BadInput(f"{root}: every fifth image of a class is held out, and no class has "
                           "five; add images, or a folder train/ and a folder val/")
        return tuple(dataclasses.replace(table.select(rows.nonzero().flatten()), index=None,
                                         notes=notes)
                     for rows, notes in ((~held_out, table.notes), (held_out, ())))
    test = next((root / name for name in ("val", "test") if name in parts), None)
    if test is None:
        raise BadInput(f"{root} has train/ but neither val/ nor test/")
    train, found = folder_table(base, names), class_folders(test)
    if names and not set(names) & set(found):
        raise BadInput(f"{test} has no class folder of {base} (TinyImageNet and the validation "
                       "images of ILSVRC as they are unpacked): move each image into the folder "
                       f"of its class{LAYOUT}")
    if missing := [name for name in names if name not in found]:
        raise BadInput(f"class folder {test / missing[0]} is missing")
    return train, folder_table(test, names and (names if args.classes else found))


MEANT = "path class image filepath caption title image_id key".split()  # columns with a meaning


def read_rows(source):
    """The column names of a CSV, TSV or Parquet file, then its rows: lists of texts, one by one.

    A tab in the first line makes it TSV, in which quotes are letters. Parquet: a missing value is
    "", and columns that hold neither texts nor numbers are left out.
    Errors: BadInput with the line of a row that has more or fewer fields than there are columns.
    """
    with reading(source), open(source, newline="", encoding=encoding_of(source)) as file:
        if file.buffer.peek(4)[:4] == b"PAR1":
            import pandas

            # with these types a whole number stays one where others of its column are missing
            frame = pandas.read_parquet(source, dtype_backend="numpy_nullable")
            other = frame.select_dtypes("object").columns  # lists, bytes and the like
            if bad := [name for name in other if name in MEANT]:
                raise BadInput(f"{source}: column {bad[0]} holds neither texts nor numbers; write "
                               "one row for each value")
            frame = frame.drop(columns=other)
            frame = frame.astype(object).where(frame.notna(), "")
            yield [*frame.columns]
            for row in frame.itertuples(index=False, name=None):
                yield [*map(str, row)]
            return
        tab = "\t" in file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter="\t" if tab else ",", strict=True,
                            quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL,
                            skipinitialspace=not tab)
        try:
            rows = filter(None, reader)  # passes over empty lines
            names = [name.strip() for name in next(rows, ())]
            if not names:
                raise ValueError("it is empty")
            if twice := [n for i, n in enumerate(names) if n and n in names[:i]]:
                raise BadInput(f"{source} has two columns named {twice[0]!r}")
            yield names
            for row in rows:
                if len(row) != len(names) or any(
                        v.strip() for n, v in zip(names[1:], row[1:]) if not n):
                    raise BadInput(f"{source}, line {reader.line_num}: {len(row)} fields for the "
                                   f"columns {', '.join(names)}; a comma in a field needs quotes")
                yield row
        except csv.Error as error:
            raise BadInput(f"{source}, line {reader.line_num} cannot be read: {error}") from None


def _csv(args):
    if (args.train_file is None) != (args.test_file is None):
        raise BadInput("--dataset csv takes --train-file and --test-file, or neither: then they "
                       "are meta_data_train.csv and meta_data_val.csv")
    files = args.train_file or "meta_data_train.csv", args.test_file or "meta_data_val.csv"
    return tuple(csv_table(Path(args.data_dir), file) for file in files)


def csv_table(root, file):
    """Read one CSV into a Table of paths.

    An unnamed first column is the row's index; the summary row (index -1) is dropped. `class`
    becomes `label`, the place in its sorted values. Integer columns keep their numbers; text
    columns become ids with names; an empty field is -1, unlabelled.
    Errors: BadInput naming the file and row or column.
    """
    source = root / file
    names, *rows = read_rows(source)
    for name in ("path", "class"):
        if name not in names:
            raise BadInput(f"{source} has no column {name!r}; it has: {', '.join(names)}")
    if "label" in names:
        raise BadInput(f"{source}: a column named label would be lost; `class` becomes label")
    numbered = names[0] in ("", "index", "Unnamed: 0")
    rows = [[v.strip() for v in row] for row in rows if not numbered or row[0].strip() != "-1"]
    if not rows:
        raise BadInput(f"{source} has no row of an image")
    index = [row[0] for row in rows] if numbered else [*map(str, range(len(rows)))]
    fields = dict(zip(names[numbered:], zip(*(row[numbered:] for row in rows)))) | {"": index}
    columns, classes, paths = {}, {}, fields.pop("path")
    for name, values in fields.items():
        if name:  # "" is the index
            values = ["" if v in ("-1", "-1.0") else v for v in values]
        texts = [i for i, v in enumerate(values) if (v or not name) and not INTEGER.fullmatch(v)]
        if not texts:
            columns[name] = torch.tensor([int(v.split(".")[0]) if v else -1 for v in values])
        elif name[:10] in ("", "label_gran") or len(texts) < sum(map(bool, values)):
            raise BadInput(f"{source}, row {index[texts[0]]}, column {name or 'index'}: "
                           f"{values[texts[0]]!r} is not an integer")
        else:
            columns[name], classes[name] = ids_of(values)
    whole = {v.partition(".")[0] for v in fields["class"] if v}
    if "class" not in classes and len(whole) > len({*map(int, whole)}):
        raise BadInput(f"{source}, column class: two texts are one number, as 007 and 7 are")
    numbers = ["" if v == -1 else str(v) for v in columns["class"].tolist()]
    columns["label"], classes["label"] = (columns["class"], classes["class"]) if (
        "class" in classes) else ids_of(numbers, int)
    files = [_inside(root, path, source, i) for path, i in zip(paths, index, strict=True)]
    lost = [path for path, file in zip(paths, files) if file is None]
    table = Table(columns, classes, paths=files, source=str(source), index=columns.pop(""),
                  notes=_dropped(source, lost, len(files), "images are missing", root))
    return table.select(torch.tensor([i for i, file in enumerate(files) if file is not None]))


INTEGER = re.compile(r"-?\d{1,18}(\.0+)?")  # more digits do not fit into int64


def _dropped(source, lost, n, what, folder):
    """A list with the note on `lost` of n rows, for the log; BadInput if they are over 1 %."""
    notes = [f"{source}: {len(lost)} of {n} {what}, the first is {lost[0]}"] if lost else []
    if len(lost) > 0.01 * n:
        raise BadInput(f"{notes[0]} (looked in {folder})")
    return notes


def _captions(args):
    """Pairs of images and captions. Without --train-file the test file is both tables."""
    if args.test_file is None:
        raise BadInput("--dataset captions needs --test-file (and --train-file to train)")
    if len(args.image_root) > 2:
        raise BadInput(f"--image-root {shown(args.image_root)}: one folder, or one for the "
                       "training images and one for the test images")
    test = captions_table(args.data_dir, args.test_file, args.image_root[-1])
    if args.train_file is None:
        if args.method in METHODS and not vars(args).get("evaluate"):
            raise BadInput("--dataset captions needs --train-file to train: the test file is for "
                           "the evaluation")
        return test, test
    return captions_table(args.data_dir, args.train_file, args.image_root[0]), test


def caption_files(source):
    """The files that a --train-file names: one, a0 to a9 for a{0..9}, or all .tar of a folder."""
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.tar")) or [source / "*.tar"]
    elif braces := re.search(r"\{(\d+)\.\.(\d+)\}", str(source)):
        first, last = braces.groups()
        files = [Path(str(source).replace(braces[0], f"{i:0{len(first)}}"))
                 for i in range(int(first), int(last) + 1)]
    for file in files or [source]:
        if not file.is_file():
            raise BadInput(f"caption file {file} not found")
    return files


def captions_table(root, file, image_root=""):
    """Read image-caption pairs into a Table of paths: one row for each caption.

    JSON: a list of {"image": path, "caption": text or list of texts, "image_id": any, optional};
    CSV, TSV or Parquet: columns image (or filepath, path), caption (or title), image_id (optional),
    or what img2dataset writes beside its folders of files; .tar: see `shard_table`. Paths are below
    root/image_root. Column `image_id`: ids from 0 in order of appearance, of the path if there is
    no image_id. `label` is -1. Pairs without image or text are dropped.
    Errors: BadInput naming the file, the entry (from 0) and the key, or if it drops over 1 %.
    """
    sources, folder = caption_files(Path(root) / file), Path(root) / image_root
    if sources[0].suffix.lower() == ".tar":
        return shard_table(sources)
    of_id, of_path, rows, lost = {}, {}, [], []
    for source in sources:
        for i, (name, texts, image_id) in enumerate(_caption_entries(source)):
            if (path := _inside(folder, name, source, i)) is not None:
                key = path if image_id is None else str(image_id)
                record = of_id.setdefault(key, (len(of_id), key, path, source, i))
                for _, a, b, *where in (record, of_path.setdefault(path, record)):
                    if (a, b) != (key, path):
                        raise BadInput(f"{source}, entry {i}: image_id {key} is {path}, but "
                                       f"image_id {a} is {b} in {where[0]}, entry {where[1]}")
            for text in texts:
                reason = "no such file" if path is None else _caption_fault(text)
                if reason:
                    lost.append(f"{source.name}, entry {i} ({name}: {reason})")
                else:
                    rows.append((path, text, record[0]))
    notes = _dropped(sources[0], lost, len(lost) + len(rows), "captions dropped", folder)
    if not rows:
        raise BadInput(f"{sources[0]} has no entry")
    paths, captions, image_ids = zip(*rows, strict=True)
    columns = dict(label=torch.tensor(-1).expand(len(rows)), image_id=torch.tensor(image_ids))
    return Table(columns, {}, paths=Texts(paths), captions=Texts(captions), notes=notes,
                 source=str(sources[0]))


def _caption_fault(text):
    """Why a caption cannot be used, or None."""
    surrogate = re.search("[\ud800-\udfff]", text)
    return "no Unicode" if surrogate else None if text.strip() else "empty"


def _caption_entries(source):
    """(path, list of texts, image_id or None) of every entry of a caption file."""
    with reading(f"caption file {source}"), open(source, encoding=encoding_of(source),
                                                 errors="replace") as file:
        start = file.read(100).lstrip()[:1]
    if start not in ("[", "{"):
        yield from _caption_rows(source)
        return
    entries = read_text(f"caption file {source}", source, json.loads)
    if not isinstance(entries, list):
        raise BadInput(f"{source} is a JSON {type(entries).__name__}, not a list; COCO's own files "
                       '(images, annotations) are not read as they are: write one {"image": '
                       'file_name, "caption": text, "image_id": id} for each of the annotations')
    for i, entry in enumerate(entries):
        values = entry if isinstance(entry, dict) else {}
        image, texts, image_id = map(values.get, ("image", "caption", "image_id"))
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(image_id, (dict, list)) or not (
                isinstance(image, str) and isinstance(texts, list) and texts
                and all(isinstance(text, str) for text in texts)):
            raise BadInput(f"{source}, entry {i} needs 'image', a path, and 'caption', a text or a "
                           f"list of texts; it is a {type(entry).__name__}: {str(entry)[:150]}")
        yield image, texts, image_id


def _caption_rows(source):
    """The same of a table."""
    rows = read_rows(source)
    names = next(rows)
    image, caption = (next((name for name in aliases if name in names), None) for aliases in (
        ("image", "filepath", "path"), ("caption", "title")))
    if caption is None or image is None and "key" not in names:
        raise BadInput(f"{source} needs columns image and caption; it has: "
                       f"{', '.join(names)[:200]}")
    for row in rows:
        entry = dict(zip(names, row))
        if image:
            path = entry[image].strip()
        elif entry.get("status", "success") == "success":  # img2dataset could download it
            # 00000.parquet lies beside the folder 00000
            stem = os.path.join(os.path.abspath(source.with_suffix("")), entry["key"])
            path = next((p for p in (f"{stem}.png", f"{stem}.webp") if os.path.exists(p)),
                        f"{stem}.jpg")
        else:
            continue
        yield path, [entry[caption]], entry.get("image_id") or None


def shard_table(shards):
    """Table of the pairs in tar archives as img2dataset writes them (WebDataset): each has an
    image, a .txt or else the `caption` of a .json, under one name with several endings.

    Nothing is unpacked; see `Members`. The headers of a shard are read once, by one process, and
    kept in SHARD.tar.index.npz beside it until its size or time changes.
    """
    for shard in progress(shards[rank()::world()], desc="indexing shards", delay=5):
        with contextlib.suppress(BadInput):  # for all processes below
            shard_index(shard)
    if world() > 1:
        dist.barrier()
    parts = [shard_index(shard) for shard in shards]
    counts = [len(part["offset"]) for part in parts]
    lost = [f"{shard}: {text}" for shard, part in zip(shards, parts) for text in part["lost"]]
    notes = _dropped(shards[0].parent, lost, sum(counts) + len(lost), "pairs left out", "shards")
    if 0 in counts:
        raise BadInput(f"{shards[counts.index(0)]} holds no image with a caption: fetch it again, "
                       "or remove it")
    n = sum(counts)
    captions = Texts(())
    captions.data = np.concatenate([part["text"] for part in parts])
    captions.ends = np.cumsum(np.concatenate([[0], *(part["length"] for part in parts)]))
    which = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
    paths = Members(shards, which, *(np.concatenate([part[k] for part in parts])
                                     for k in ("offset", "size")))
    return Table(dict(label=torch.tensor(-1).expand(n), image_id=torch.arange(n)), {}, paths=paths,
                 captions=captions, notes=notes, source=str(shards[0]))


def shard_index(shard):
    """Arrays of one shard: offset and size of the images, text (UTF-8 bytes) and length of the
    captions, `lost`: texts on what was left out, stamp: size and time of the shard."""
    cache, about = Path(f"{shard}.index.npz"), os.stat(shard)
    stamp = np.array([about.st_size, about.st_mtime_ns, 2])  # 2: the version of this index
    with contextlib.suppress(Exception), np.load(cache) as known:  # absent, broken: written anew
        if np.array_equal(known["stamp"], stamp):
            return {key: known[key] for key in ("offset", "size", "text", "length", "lost")}
    members, pairs, lost = {}, [], []
    with reading(f"shard {shard}"), open(shard, "rb") as file:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, name = os.path.split(member.name)
                    name, _, ending = name.partition(".")
                    of, ending = members.setdefault(os.path.join(folder, name), {}), (
                        f".{ending.lower()}")
                    if ending in of and ending in IMAGE_ENDINGS:
                        lost.append(f"{member.name}: a second image of that name")
                    of.setdefault(ending, (member.offset_data, member.size))
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise ValueError(f"no header and no end at byte {tar.offset}; truncated?")
            if file.read(2 ** 15).strip(b"\0"):
                raise ValueError(f"another archive follows its end at byte {tar.offset}")

        def content(place):
            file.seek(place[0])
            return file.read(place[1]).decode("utf-8-sig")

        for name, of in members.items():
            place = next((of[ending] for ending in of if ending in IMAGE_ENDINGS), None)
            try:
                text = content(of[".txt"]) if ".txt" in of else json.loads(
                    content(of[".json"]))["caption"] if ".json" in of else ""
                fault = "no image" if place is None else _caption_fault(text)
            except Exception as error:  # json raises many kinds; its caption may be no text
                fault = f"its caption cannot be read ({error!r})"
            if fault:  # of each image where a name has dots: cam.0001.jpg, cam.0002.jpg
                dotted = [e for e in of if os.path.splitext(e)[1] in IMAGE_ENDINGS]
                lost += [f"{name}{e}: {fault}" for e in dotted] or [f"{name}: {fault}"]
            else:
                pairs.append((*place, text.encode()))
    offset, size, texts = zip(*pairs) if pairs else ((), (), ())
    arrays = dict(offset=np.array(offset, np.int64), size=np.array(size, np.int32), stamp=stamp,
                  text=np.frombuffer(b"".join(texts), np.uint8), lost=np.array(lost, str),
                  length=np.array([len(text) for text in texts], np.int32))
    with contextlib.suppress(RunFailed):  # a folder that nobody may write to
        atomic_write(cache, lambda file: np.savez(file, **arrays))
    return arrays


def _inside(root, path, source, row):
    """The path below root, literal or percent-decoded (UT-Zappos has %2E); None if absent."""
    for name in dict.fromkeys((path, urllib.parse.unquote(path))):
        full = os.path.normpath(os.path.join(root, name))
        if not any(os.path.join(real(full), "").startswith(os.path.join(real(root), ""))
                   for real in (os.path.abspath, os.path.realpath)):
            raise BadInput(f"{source}, row {row}: path {path!r} leaves the data folder {root}")
        if os.path.isfile(full):
            return full
    return None


SOURCES = {"shapes": _shapes, "shapes-views": _shapes, "cifar10": _cifar, "cifar100": _cifar,
           "stl10": _stl10, "stl10-full": _stl10, "folder": _folder, "csv": _csv, "npz": _npz,
           "captions": _captions}
FILES = {"train_file", "test_file", "image_root", "classes", "download"}
READS = dict(shapes=set(), cifar={"download"}, stl={"download"}, folder={"classes"},  # of FILES
             csv={"train_file", "test_file"}, npz={"train_file", "test_file"},
             captions={"train_file", "test_file", "image_root"})


def fingerprint(table):
    """Dict that tells two sources apart: the number of images, and CRCs of their file names (but
    for the folder that holds them all) or pixels, of the captions, of every column and its names.
    """
    def crc(texts, found=0):
        for text in texts:
            found = zlib.crc32(f"{text}\0".encode(errors="surrogatepass"), found)
        return found

    found = dict(images=len(table))
    if table.images is not None:
        found["pixels"] = zlib.crc32(table.images.contiguous().numpy())
    else:
        shared = len(os.path.commonprefix([min(table.paths), max(table.paths)]))
        found["file names"] = crc(path[shared:] for path in table.paths)
    if table.captions is not None:
        found["captions"] = crc(table.captions)
    return found | {f"column {name}": zlib.crc32(ids.contiguous().numpy(),
                                                 crc(table.classes.get(name) or []))
                    for name, ids in table.columns.items()}


def changed_data(old, new):
    """Texts for what differs from the fingerprints `old` (training, test) of a run."""
    return [f"{split} {name}" + f" {value} -> {new[split].get(name)}" * (name == "images")
            for split in old for name, value in old[split].items() if new[split].get(name) != value]


def data_notes(checkpoint, args, data):
    """A list with a warning if --dataset has changed since the checkpoint was trained on it."""
    old = checkpoint["data"] if checkpoint.get("data") and (
        checkpoint["args"]["dataset"] == args.dataset) else {}
    new = dict(training=data.train.fingerprint, test=data.test.fingerprint)
    changed = ", ".join(changed_data(old, new))
    return [f"warning: the checkpoint was trained with other data ({changed})"] if changed else []


def _images_once(table):
    """The table with the first row of every image that has several captions."""
    ids = table.columns.get("image_id", table.index)
    first = np.unique(ids, return_index=True)[1]
    if len(first) == len(table):
        return table
    table.notes.append(f"{table.source}: {len(first)} images for {len(table)} captions")
    return table.select(torch.from_numpy(first).sort().values)


def load(args, device):
    """Read --dataset into a `Data`."""
    train, test = SOURCES[args.dataset](args)
    share_names(train, test)
    for table in (train, test):
        table.fingerprint = fingerprint(table)
    for table in (train, test):
        table.column(args.label)  # it must be there
    if args.method in METHODS[:-1]:  # of images alone: a row for each, not for each caption
        train, test = map(_images_once, (train, test))
    if train is not test and None not in (train.paths, test.paths):
        held_out = {*test.paths}
        if n := len({path for path in train.paths if path in held_out}):
            test.notes.append(f"warning: {n} of the test images are training images too")
    if args.limit_train is not None:  # an evaluation takes the images of the training
        label, seed = vars(args).get("drawn_by") or (args.label, args.seed)
        train = train.select(balanced_rows(train.column(label), args.limit_train, seed))
    for table in (train, test):
        if table.images is not None:
            table.images = table.images.to(device)
    if args.randaugment and args.randaugment[0] and train.images is not None:
        raise BadInput("--randaugment needs image files (--dataset folder or csv): only workers do "
                       "it, and images in memory are augmented on the device; --randaugment 0 0 "
                       "turns it off")
    if args.recipe == "own":
        print_rank0(f"recipe own: a small setting of this project for {args.dataset}, not a "
                    "published one; flags change it")
    return Data(train, test, args, device)


class Data:
    """Training and test `Table`, and the batches of every step as a function of the seed."""

    def __init__(self, train, test, args, device):
        self.train, self.test, self.args, self.device = train, test, args, device
        self.steps_per_epoch = len(train) // args.batch_size  # the incomplete last batch is dropped
        if not self.steps_per_epoch:
            raise BadInput(f"--batch-size {args.batch_size} is larger than the training set of "
                           f"{len(train)} images; use a smaller --batch-size")

    def end_of_epoch(self, step, every=1):
        """True at the last step (from 0) of every `every`-th epoch and at the last of training."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        return rest == 0 and (epoch % every == 0 or epoch == self.args.epochs)

    def batches(self, first_step, steps, aug, views=2, extra=(), draw=None, own=None):
        """The batch of each step, with this process's images; workers read files ahead.

        Args: aug (dict, see `augmentation`) or a function step -> aug; views V per image; extra,
        pairs (aug, views): further views of the same images, of another size or kind; draw,
        function (step, own) -> dict of CPU tensors, further random numbers of the step, which a
        thread calls one step ahead; own, the slice of the batch to augment (default: this rank's).
        Yields: a namespace: step; rows (B,) int64 on the device, row numbers in `train` of the
        whole batch; own; images, uint8 (b, 3, H, W), or (V * b, 3, S, S) already cropped; params
        (V * b, ...) of all views, view-major; aug; drawn, what `draw` returned, on the device;
        extra, a list of such namespaces, one for each pair.
        """
        plans = _one_ahead(lambda s: self._plan(
            s, [(aug(s) if callable(aug) else aug, views), *extra], draw, own),
            range(first_step, steps))
        if self.train.images is not None:
            for batch in map(self._receive, plans):
                images = self.train.images[batch.rows[batch.own]]
                for part in (batch, *batch.extra):
                    part.images = images
                yield batch
            return
        ahead = collections.deque()

        def tasks():  # a worker gets the row and the crop's random numbers, and draws nothing
            for batch in plans:
                ahead.append(batch)
                parts = [(part.params["crop"].unflatten(0, (part.views, -1)),
                          part.params["seed"].view(part.views, -1), part.aug)
                         for part in (batch, *batch.extra)]
                yield [(row, functools.partial(_crops, groups=[
                    (u[:, i].numpy(), s[:, i].tolist(), aug) for u, s, aug in parts]))
                       for i, row in enumerate(batch.rows[batch.own].tolist())]

        for images in self._loader(self.train.paths, tasks()):
            batch = self._receive(ahead.popleft())
            for part, x in zip((batch, *batch.extra), images, strict=True):
                part.images = x.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            yield batch

    def _plan(self, step, groups, draw, own):
        """The batch of a step without its images; `sent` brings what the device needs."""
        seed, B = self.args.seed, self.args.batch_size
        epoch, i = divmod(step, self.steps_per_epoch)
        if getattr(self, "_order", (None,))[0] != epoch:  # one shuffle an epoch, kept
            self._order = (epoch, torch.randperm(
                len(self.train), generator=generator(seed, epoch, "order")))
        b, images = B // world(), self.train.images
        own = own or slice(rank() * b, (rank() + 1) * b)
        rows = self._order[1][i * B:(i + 1) * B]
        parts, number = [], 0
        for aug, views in groups:
            drawn = [sample_params(aug, B, generator(seed, step, f"view {number + v}"))
                     for v in range(views)]
            number += views
            params = {k: torch.cat([d[k][own] for d in drawn]) for k in drawn[0]}
            image_size = None if images is None else images.shape[2:]
            parts.append(SimpleNamespace(
                aug=aug, views=views, params=params, cropped=images is None,
                memory_format=memory_format(self.args),
                chunks=plan_chunks(params, aug, image_size, self.device)))
        drawn = dict(draw(step, own) if draw else {}, rows=rows)
        sent = send([drawn, *(chunk for part in parts for chunk in part.chunks)], self.device)
        return SimpleNamespace(step=step, rows=rows, own=own, sent=sent, extra=parts[1:],
                               **vars(parts[0]))

    def _receive(self, batch):
        """The batch with what was sent, on the device."""
        batch.drawn, *chunks = batch.sent()
        batch.rows = batch.drawn.pop("rows")
        for part in (batch, *batch.extra):
            part.chunks, chunks = chunks[:len(part.chunks)], chunks[len(part.chunks):]
        return batch

    def _loader(self, paths, tasks):
        workers = self.args.workers
        loader = torch.utils.data.DataLoader(
            _Files(paths), batch_sampler=tasks, num_workers=workers,
            collate_fn=torch.utils.data.default_convert,  # leaves tensors as they are
            pin_memory=self.device.type == "cuda", prefetch_factor=4 if workers else None,
            worker_init_fn=_start_worker)
        if workers and world() > 1:
            # A fork of Python below 3.11.10 hangs if a thread of gloo or NCCL is just giving up its
            # last tensor (CPython issue 112275): a moment after the collective it is done with it.
            time.sleep(0.02)
        # a worker starts with these signals blocked: none can end it before _start_worker runs
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for images in batches:
            if isinstance(images, str):
                raise RunFailed(self._broken(images), alone=True)
            yield images

    def _broken(self, first):
        """What to say when an image is broken: all that are, as far as a minute suffices."""
        until, broken, more = time.time() + 60, {}, True
        tables = {id(t.paths): t.paths for t in (self.train, self.test) if t.paths is not None}
        paths = itertools.chain([first], *tables.values())
        with concurrent.futures.ThreadPoolExecutor(max(1, self.args.workers)) as pool:
            while time.time() < until and (more := [*itertools.islice(paths, 256)]):
                broken |= {p: fault for p, fault in zip(more, pool.map(image_fault, more)) if fault}
        names = ", ".join(f"{p} ({fault})" for p, fault in [*broken.items()][:20])
        return (f"image {names}{', ...' * (len(broken) > 20)} cannot be decoded ({len(broken)} of "
                f"the {'images' if not more else 'first images'}): repair or remove it")

    def eval_batches(self, table, rows, size, resize, batch=256):
        """Images of `rows` for evaluation: float (n, 3, S, S) in 0..255, on the device.

        Resizes the short side to the next power of two of S and takes the central S x S, as the
        authors of Cl-InfoNCE do. With `resize`, resizes to S x S without a crop (their dual form).
        """
        if table.images is None:
            cut = functools.partial(_eval_of_file, size=size, resize=resize)
            tasks = [[(row, cut) for row in part.tolist()] for part in rows.split(batch)]
            for (images,) in self._loader(table.paths, tasks):
                yield images.to(self.device, non_blocking=True).float()
            return
        for part in rows.split(batch):
            yield eval_transform(table.images[part.to(self.device)].float(), size, resize)

    def pixels(self, table, rows, size, resize=False):
        """The same as one uint8 tensor (n, 3, S, S) on the CPU, for pictures."""
        return torch.cat([x.round().byte().cpu()
                          for x in self.eval_batches(table, rows, size, resize)])


# a reader process that starts while the thread below draws would inherit locks that nobody frees
_drawing = threading.Lock()
os.register_at_fork(before=_drawing.acquire, after_in_parent=_drawing.release,
                    after_in_child=_drawing.release)


def _one_ahead(function, steps):
    """function(step) of each step in turn. A thread calls it for the next step meanwhile; it ends
    with this generator, and its errors are raised here."""
    def locked(step):
        with _drawing:
            return function(step)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calls = (pool.submit(locked, step) for step in steps)
        for call, _ in itertools.pairwise(itertools.chain(calls, [None])):
            yield call.result()


def send(dicts, device):
    """Function that returns a list of dicts with their CPU tensors on the device. On CUDA these
    travel as one pinned tensor, without a wait, and share its memory there."""
    if device.type == "cpu":
        return lambda: dicts
    found = [x for d in dicts for x in d.values() if isinstance(x, torch.Tensor)]
    sizes = [x.nbytes + -x.nbytes % 16 for x in found]  # aligned for every dtype
    pinned = torch.cat([F.pad(x.flatten().view(torch.uint8), (0, size - x.nbytes))
                        for x, size in zip(found, sizes)]).pin_memory()

    def receive():
        parts = zip(found, pinned.to(device, non_blocking=True).split(sizes))
        there = (part[:x.nbytes].view(x.dtype).view(x.shape) for x, part in parts)
        return [{key: next(there) if isinstance(x, torch.Tensor) else x for key, x in d.items()}
                for d in dicts]
    return receive


class _Files:
    """The batch of a list of tasks, for a worker: stacked uint8 tensors, or the path of a broken
    image. A task is a row and a function from its PIL image to a list of uint8 arrays."""

    def __init__(self, paths):
        self.paths = paths

    def __getitems__(self, tasks):
        items = []
        for row, transform in tasks:
            try:
                image = open_image(self.paths[row])
            except Exception:  # Pillow raises many kinds for broken files
                return self.paths[row]
            items.append(transform(image))
        return [torch.from_numpy(np.stack(part)) for part in zip(*items)]


def _crops(image, groups):
    """Crops (V, 3, S, S) of an image for each group: uniforms (V, 22), seeds (V of them), aug."""
    crops, (W, H) = [], image.size
    for u, seeds, aug in groups:
        boxes = torch.tensor([[0, 0, H, W]]).expand(len(u), 4)
        if aug["crop"] is not None:
            boxes = crop_boxes(torch.from_numpy(u), H, W, aug["crop"], aug["ratio"])
        cut = [image.crop((x, y, x + w, y + h)).resize(2 * [aug["size"]],
                                                       Image.Resampling.BILINEAR)
               for y, x, h, w in boxes.tolist()]
        if aug.get("randaugment"):
            cut = [randaugment(c, seed, aug) for c, seed in zip(cut, seeds, strict=True)]
        crops.append(np.stack([np.asarray(c).transpose(2, 0, 1) for c in cut]))
    return crops


def randaugment(image, seed, aug):
    """torchvision's RandAugment of a PIL image, as a function of the seed. Magnitude 10 is the
    largest that torchvision has; the fill is the mean colour. InfoMin's own has 15 operations, each
    with probability 0.5, and magnitudes from N(10, 0.5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return v2.RandAugment(*aug["randaugment"], num_magnitude_bins=11,
                              fill=[255 * m for m in aug["mean"]])(image)


def eval_transform(image, size, resize=False):
    """Evaluation view of a PIL image or float (n, 3, H, W) tensor; see `Data.eval_batches`."""
    if resize:
        return tvf.resize(image, [size, size])
    return tvf.center_crop(tvf.resize(image, 2 ** math.ceil(math.log2(size))), [size, size])


def _eval_of_file(image, size, resize):
    return [np.asarray(eval_transform(image, size, resize)).transpose(2, 0, 1)]


# The built-in data set: rendered shapes (synthetic; say so beside every figure made with it).
# A shape is a function of coordinates x (right) and y (up): about the distance to its outline,
# positive inside. The outline lies within a radius of about 1.
SEEN = {
    "circle": lambda x, y: 0.88 - torch.hypot(x, y),
    "square": lambda x, y: 0.78 - torch.maximum(x.abs(), y.abs()),
    "triangle": lambda x, y: 0.56 - torch.maximum(-y - 0.12, 0.866 * x.abs() + 0.5 * y + 0.06),
    "cross": lambda x, y: torch.minimum(0.95 - torch.maximum(x.abs(), y.abs()),
                                        0.34 - torch.minimum(x.abs(), y.abs())),
    "ring": lambda x, y: 0.25 - (torch.hypot(x, y) - 0.7).abs(),
    "star": lambda x, y: 0.43 - torch.hypot(x, y) * torch.cos(  # five tips, folded into one
        ((torch.atan2(x, y) / (0.4 * math.pi) + 0.5) % 1 - 0.5).abs() * 0.4 * math.pi - 1.15),
}
UNSEEN = {
    "heart": lambda x, y: 0.85 - torch.hypot(x, 1.15 * y + 0.3 - 0.75 * x.abs().sqrt()),
    "crescent": lambda x, y: torch.minimum(0.95 - torch.hypot(x, y),
                                           torch.hypot(x - 0.5, y) - 0.72),
    "arrow": lambda x, y: torch.maximum(torch.minimum(y, (0.98 - x.abs() - y) * 0.7),
                                        torch.minimum(0.3 - x.abs(), 0.5 - (y + 0.4).abs())),
    "diamond": lambda x, y: (1 - 1.6 * x.abs() - y.abs()) * 0.53,
}
# A pattern is a function of coordinates in which it has period 1: positive in its second tone.
PATTERNS = {
    "plain": lambda u, v: torch.full_like(u, -1.0),
    "striped": lambda u, v: torch.cos(2 * math.pi * v),
    "dotted": lambda u, v: torch.cos(2 * math.pi * u) + torch.cos(2 * math.pi * v) - 0.5,
    "checkered": lambda u, v: 2 * torch.sin(math.pi * u) * torch.sin(math.pi * v),
}
COLOURS = {"red": (0.86, 0.22, 0.22), "orange": (0.95, 0.56, 0.16), "yellow": (0.93, 0.86, 0.25),
           "green": (0.25, 0.68, 0.34), "blue": (0.20, 0.45, 0.87), "purple": (0.62, 0.30, 0.75)}
SIZES = {"small": 0.65, "large": 0.86}  # radius; the frame is 2 wide


def _factors(n, outlines, g):
    """Columns, name -> (n,) int64, and class names of n objects, for `shapes`."""
    def balanced(k):  # ids below k, each equally often (or once more)
        return torch.randperm(k, generator=g)[torch.randperm(n, generator=g) % k]

    P = len(PATTERNS)
    label = balanced(len(outlines) * P)
    columns = {"label": label, "coarse": label // P, "pattern": label % P,
               "colour": balanced(len(COLOURS)), "size": balanced(len(SIZES)),
               "background": balanced(P), "object": torch.arange(n)}
    classes = {"label": [f"{p} {s}" for s in outlines for p in PATTERNS], "coarse": [*outlines],
               "pattern": [*PATTERNS], "colour": [*COLOURS], "size": [*SIZES],
               "background": [*PATTERNS], "object": [f"object {i}" for i in range(n)]}
    return columns, classes


def _draw(functions, ids, x, y):
    """(B, size, size): in image i, the function of its id at the coordinates x, y."""
    out = torch.empty_like(x)
    for k, f in enumerate(functions.values()):
        i = (ids == k).nonzero().squeeze(1)
        out[i] = f(x[i], y[i])
    return out


def _soft(distance):
    """0 outside .. 1 inside, over about a pixel."""
    return (0.5 + distance).clamp(0, 1)


def shapes(n, seed=0, size=32, unseen=False, renders=1):
    """Render n images of one patterned shape each.

    renders = r: images r i .. r i + r - 1 show one object, with the same factors, paints and
    background, but another position, angle, scale, light and noise.
    unseen: four other shapes, for out-of-distribution tests.

    Returns images (n, 3, size, size) uint8; columns, name -> (n,) int64: label (shape x pattern),
    coarse (shape), pattern, colour, size, background, object; classes, name -> class names of that
    column; captions, n strings. Labels and factors are balanced and in random order. Ids mean the
    same for every seed, except those of object.
    """
    if n < 1 or renders < 1:
        raise ValueError(f"shapes: n and renders must be at least 1, got {n} and {renders}")
    g = torch.Generator().manual_seed(seed)
    real = torch.float64  # float32: a few pixels differ between kinds of processor
    outlines = UNSEEN if unseen else SEEN
    N = -(-n // renders)  # objects
    columns, classes = _factors(N, outlines, g)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g, dtype=real)

    # The renders of an object also share its paint, the pale ground, and the patterns' places.
    palette = torch.tensor([*COLOURS.values()], dtype=real)
    paint = palette[columns["colour"]] + uniform(-0.06, 0.06, N, 3)
    ground = uniform(0.6, 0.75, N, 1) + uniform(-0.03, 0.03, N, 3)
    phase = uniform(0, 1, N, 4, 1, 1)
    period = uniform(0.30, 0.38, N, 2, 1, 1)  # the frame is 2 wide
    radii = torch.tensor([*SIZES.values()], dtype=real)

    keep = torch.arange(N).repeat_interleave(renders)[:n]  # (n,) the object in each image
    columns = {name: ids[keep] for name, ids in columns.items()}
    words = [[classes[name][i] for i in columns[name].tolist()]
             for name in ("size", "colour", "label", "background")]
    captions = ["a {} {} {} on a {} background".format(*w) for w in zip(*words)]

    t = (torch.arange(size, dtype=real) + 0.5) * (2 / size) - 1
    Y, X = torch.meshgrid(-t, t, indexing="ij")  # (size, size) the frame, -1..1, y up
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for rows in torch.arange(n).split(max(1, 2**19 // size**2)):  # bounds the memory
        B, o, c = len(rows), keep[rows], {name: ids[rows] for name, ids in columns.items()}

        def vary(low, high, B=B):  # a number for each image
            return uniform(low, high, B, 1, 1)

        radius = radii[c["size"]].view(B, 1, 1) * vary(0.92, 1.08)
        free = 0.8 * (1.05 - radius)  # how far the centre may leave the middle
        x, y, angle = X - free * vary(-1, 1), Y - free * vary(-1, 1), vary(-0.35, 0.35)
        x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
        inside = _soft(_draw(outlines, c["coarse"], x / radius, y / radius) * radius * size / 2)

        p, q = period[o].unbind(1)
        a, b, d, e = phase[o].unbind(1)
        tone = _soft(_draw(PATTERNS, c["pattern"], x / p + a, y / p + b) * size / 16)
        u, v = X / q + d + vary(0, 1), (Y + vary(-0.35, 0.35) * X) / q + e
        relief = _soft(_draw(PATTERNS, c["background"], u, v) * size / 16)

        # The second tone is darker. On the ground the contrast is low, so that a network learns
        # the object first.
        front = paint[o, :, None, None] * (1 - 0.6 * tone[:, None])  # (B, 3, size, size)
        behind = ground[o, :, None, None] * (1 - 0.14 * relief[:, None])
        light = vary(0.85, 1.15) + vary(-0.15, 0.15) * X + vary(-0.15, 0.15) * Y
        image = torch.lerp(behind, front, inside[:, None]) * light[:, None]
        image += 0.04 * torch.randn(image.shape, generator=g, dtype=real)
        images[rows] = (255 * image).round().clamp(0, 255).to(torch.uint8)
    return images, columns, classes, captions


# ---------------------------------------------------------------------------------- 3 augmentation

# `sample_params` draws every random number of one view of the whole batch on the CPU;
# `apply_params` applies a process's rows of them on the device. P = S * S.


def augmentation(args, **changes):
    """The `aug` of `sample_params` and `apply_params` from the flags; `changes` override entries.

    size S; crop (lo, hi) share of the area, or None for the whole image; ratio (lo, hi) of its
    sides; jitter, strengths of brightness, contrast, saturation, hue; sigma (lo, hi) of the blur
    in output pixels; mean and std; the probabilities flip, jitter_p, gray, blur, solarize (at 0.5
    of [0, 1]) and erase (one rectangle set to 0); randaugment (number, magnitude) or None: workers
    apply it after the crop, to images read from files.
    """
    mean, std = MEAN_STD.get(args.dataset, IMAGENET)
    aug = dict(
        size=args.image_size, crop=tuple(args.crop), ratio=(3 / 4, 4 / 3), flip=0.5,
        jitter=tuple(args.jitter), jitter_p=args.jitter_p, gray=args.gray, blur=args.blur,
        sigma=(0.1, 2.0), solarize=args.solarize, erase=args.erase,
        mean=tuple(args.mean or mean), std=tuple(args.std or std), randaugment=args.randaugment)
    return {**aug, **changes}


def _sides(u, area, scale, ratio):
    """sqrt(area * aspect) and sqrt(area / aspect), rounded, of ten attempts; u (n, 20)."""
    area = area * (scale[0] + (scale[1] - scale[0]) * u[:, 0::2])  # (n, 10)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[:, 1::2])
    return torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()


def _place(u, h, w, fits, height, width):
    """Boxes (n, 4) float64: the first attempt that fits, at a uniform position u (n, 2)."""
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)  # (n, 10) -> (n, 1)
    top = (u[:, :1] * (height - h + 1)).floor()
    left = (u[:, 1:] * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], 1)


def crop_boxes(u, height, width, crop, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop, (n, 4) int64 top, left, h, w: the first attempt
    that fits, else the largest central crop whose aspect ratio is within `ratio`.

    u: (n, 22) in [0, 1), ten attempts of (area, log ratio), then the position (top, left).
    height, width: of the image, int or (n,). crop: (lo, hi) share of its area.
    """
    u = u.double()
    height, width = (torch.as_tensor(x).double().reshape(-1, 1) for x in (height, width))
    w, h = _sides(u[:, :20], height * width, crop, ratio)  # (n, 10)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    boxes = _place(u[:, 20:], h, w, fits, height, width)
    h = torch.minimum(height, (width / ratio[0]).round())
    w = torch.minimum(width, (height * ratio[1]).round())
    central = torch.cat([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, central).long()


def sample_params(aug, n, generator):
    """Every random number of one view of n images (the whole batch), as CPU tensors of n rows.

    Image i uses row i of one table of uniforms: a rank slices its rows, and changing a probability
    moves no other draw. Returns crop (n, 22) uniforms for `crop_boxes`; flip, jitter, gray,
    solarize (n,) bool; factor (n, 4) float32 of brightness, contrast, saturation (around 1) and
    hue (around 0, in turns); order (n, 4) int64 of these four; sigma (n,) float32, 0 = no blur;
    erase (n, 4) int64 top, left, h, w, h = 0 = none; seed (n,) int64 of RandAugment.
    Raises ValueError for a probability outside [0, 1] or a hue strength outside [0, 0.5].
    """
    for key in ("flip", "jitter_p", "gray", "blur", "solarize", "erase"):
        if not 0 <= aug[key] <= 1:
            raise ValueError(f"{key} = {aug[key]} is not a probability in [0, 1]")
    if not 0 <= aug["jitter"][3] <= 0.5:
        raise ValueError(f"hue strength {aug['jitter'][3]} is not in [0, 0.5]")
    u = torch.rand(n, 59, generator=generator)
    middle, strength = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor(aug["jitter"])
    low = torch.maximum(middle - strength, torch.tensor([0.0, 0.0, 0.0, -0.5]))
    sigma = aug["sigma"][0] + (aug["sigma"][1] - aug["sigma"][0]) * u[:, 35]
    place, size = u[:, 36:58].double(), aug["size"]
    h, w = _sides(place[:, :20], size * size, (0.02, 0.33), (0.3, 3.3))  # (n, 10)
    fits = (h < size) & (w < size)
    erased = fits.any(1) & (u[:, 58] < aug["erase"])
    erase = _place(place[:, 20:], h, w, fits, size, size).long()
    return {
        "crop": u[:, :22].clone(),  # a copy, so that the table is not kept alive
        "flip": u[:, 22] < aug["flip"],
        "factor": low + (middle + strength - low) * u[:, 23:27],
        "order": u[:, 27:31].argsort(1),
        "jitter": u[:, 31] < aug["jitter_p"],
        "gray": u[:, 32] < aug["gray"],
        "solarize": u[:, 33] < aug["solarize"],
        "sigma": sigma * (u[:, 34] < aug["blur"]),
        "erase": erase * erased[:, None],
        "seed": torch.randint(2 ** 62, (n,), generator=generator),
    }


def plan_chunks(params, aug, image_size, device):
    """What the device needs to apply the params of n views: a dict for each chunk of them.
    Views are sorted by when their hue is shifted. `row` is their number, `end` how many have
    shifted it after each step. image_size: (H, W), or None if workers cropped the images."""
    hue_at = (params["order"] == 3).int().argmax(1).masked_fill(~params["jitter"], 4)
    hue_at, row = hue_at.sort(stable=True)  # the order of rows that _jitter wants
    p = {key: value[row] for key, value in params.items()}
    order, f = p["order"], p["factor"].gather(1, p["order"])  # (n, 4), in the order of application
    f = torch.stack([f, (1 - f) * (order == 1), (1 - f) * (order == 2), p["factor"]], 1)
    every = dict(row=row, flip=p["flip"], factor=f[..., None])  # (n, 4, 4, 1)
    if image_size is not None:
        every["box"] = torch.tensor([[0, 0, *image_size]]).expand(len(row), 4) if (
            aug["crop"] is None) else crop_boxes(p["crop"], *image_size, aug["crop"], aug["ratio"])
    few = dict(gray=p["gray"], blur=p["sigma"] > 0, solarize=p["solarize"],
               erase=p["erase"][:, 2] > 0)
    # on a CPU small enough for its cache
    size, chunks = len(row) if device.type == "cuda" else max(1, 2**16 // aug["size"]**2), []
    for start in range(0, len(row), size):
        part = slice(start, start + size)
        chunk = {key: x[part] for key, x in every.items()}
        chunk |= {key: flag[part].nonzero()[:, 0] for key, flag in few.items()}
        chunk["end"] = torch.searchsorted(hue_at[part], torch.arange(1, 5)).tolist()
        chunk["sigma"] = p["sigma"][part][chunk["blur"]]
        chunk["erased"] = p["erase"][part][chunk["erase"]]
        chunks.append(chunk)
    return chunks


def _resize_weights(box, flip, size, extent):
    """Weights (n, 2, S, extent) of the output rows and columns over the pixels of the image:
    torch's bilinear filter with antialias=True, a triangle, cut off at the crop."""
    start, length = box.view(-1, 2, 2)[..., None].unbind(1)  # (n, 2, 1): vertical, horizontal
    scale = length.double() / size
    i = (torch.arange(size, device=box.device) + 0.5).expand(len(flip), 2, size)
    flip = torch.stack([torch.zeros_like(flip), flip], 1)[..., None]
    i = torch.where(flip, size - i, i)  # (n, 2, S)
    pixel = torch.arange(extent, device=box.device)
    inside = (pixel >= start) & (pixel < start + length)  # (n, 2, extent)
    centre = (start - 0.5 + i * scale).float()[..., None]
    slope = (-1 / scale.clamp_min(1)).float()[..., None]
    weight = (pixel - centre).abs_().mul_(slope).add_(1).clamp_(min=0).mul_(inside[:, :, None])
    return weight.div_(weight.sum(-1, keepdim=True))


def _luma(planes):
    """(3, n, P) -> (n, P)."""
    return (planes[0] * 0.2989).add_(planes[1], alpha=0.587).add_(planes[2], alpha=0.114)


def _shift_hue(planes, turns):
    """Rotate the HSV hue of (3, n, P) planes in place by (n, 1) turns, without branches."""
    r, g, b = planes
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    value, least = torch.maximum(r, high), torch.minimum(r, low)
    chroma = value - least
    # One formula for the six sextants of HSV: while g > b, 6 hue chroma is the sum of value - r,
    # g - least and b - least. The other half of the circle mirrors it.
    hue = (value - r).add_(high).add_(low).add_(least, alpha=-2).copysign_(g - b)
    hue.div_((6 * chroma).clamp_(min=1e-8)).add_(turns)
    # A channel is `value` within 1/6 turn of its own primary, and falls to `least` at 1/3.
    primary = torch.arange(3, device=planes.device).view(3, 1, 1) / 3
    away = torch.sub(hue, primary, out=planes)
    away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(value.add_(chroma), chroma, away, value=-6, out=planes)


def _jitter(planes, f, end):
    """Colour jitter of (3, n, P) planes in place; rows :end[k] shift their hue in steps 0 .. k, the
    rows from end[3] on have no jitter.

    Brightness, contrast and saturation are f x + (1 - f) base, with base 0, mean gray or gray.
    f (n, 4, 4, 1): f of each step, 1 - f for contrast, for saturation, and the four factors.
    """
    def blend(k, rows):
        scale, contrast, saturation, _ = f[rows, :, k].unbind(1)  # (m, 1) each
        x = planes[:, rows]
        base = _luma(x)  # (m, P)
        mean = base.mean(1, keepdim=True)
        base.mul_(saturation).add_(mean.mul_(contrast))
        torch.addcmul(base, x, scale, out=x).clamp_(0, 1)

    for k in range(3):
        if end[k] < end[3]:
            blend(k, slice(end[k], end[3]))
    if end[3] > 0:
        _shift_hue(planes[:, : end[3]], f[: end[3], 3, 3])
    for k in range(1, 4):
        if end[k - 1] > 0:
            blend(k, slice(0, end[k - 1]))


def _blur(planes, sigma, radius):
    """Gaussian blur of (3, m, S, S) planes by (m,) sigmas, with reflect padding: B x B^T."""
    i = torch.arange(planes.shape[-1], device=planes.device)
    last = len(i) - 1
    # Row i of B weights pixel j and its mirror images beyond the first and the last pixel.
    offset = torch.stack([i - i[:, None], i + i[:, None], 2 * last - i - i[:, None]])  # (3, S, S)
    unseen = offset.abs() > radius
    unseen[1, :, 0] = True  # the border itself is not repeated
    unseen[2, :, last] = True
    square = offset.float().square_().masked_fill_(unseen, math.inf)
    b = torch.exp(square / (-2 * sigma * sigma).view(-1, 1, 1, 1)).sum(1)  # (m, S, S)
    b.div_(b.sum(-1, keepdim=True))
    return torch.stack([b @ x @ b.mT for x in planes])


def _erase(planes, box):
    """Set the (m, 4) boxes of (3, m, S, S) planes to 0."""
    top, left, h, w = box.T[..., None]  # (m, 1) each
    i = torch.arange(planes.shape[-1], device=box.device)
    rows, columns = (i >= top) & (i < top + h), (i >= left) & (i < left + w)  # (m, S)
    return planes.masked_fill(rows[:, :, None] & columns[:, None], 0)


def _on_rows(op, rows, planes, *params):
    """planes[:, rows] = op(planes[:, rows], *params of these rows)."""
    if len(rows):
        planes.index_copy_(1, rows, op(planes.index_select(1, rows), *params))


def _transform(x, chunk, aug, cropped):
    """Views (3, n, S, S) of the images x of one chunk of `plan_chunks`."""
    size = aug["size"]
    planes = torch.empty(3, len(x), size, size, device=x.device)
    if cropped:
        x = torch.where(chunk["flip"].view(-1, 1, 1, 1), x.flip(-1), x)
        torch.div(x.transpose(0, 1), 255, out=planes)
    else:
        height, width = x.shape[2:]
        weights = _resize_weights(chunk["box"], chunk["flip"], size, max(height, width))
        down, across = weights[:, 0, :, :height].div_(255), weights[:, 1, :, :width].mT
        for c in range(3):
            torch.bmm(torch.bmm(down, x[:, c].float()), across, out=planes[c])
    _jitter(planes.flatten(2), chunk["factor"], chunk["end"])
    _on_rows(lambda some: _luma(some).expand_as(some), chunk["gray"], planes)
    # The kernel reaches 3 sigma on each side, at most as far as reflect padding allows.
    radius = min(math.ceil(3 * aug["sigma"][1]), size - 1)
    _on_rows(lambda some, s: _blur(some, s, radius), chunk["blur"], planes, chunk["sigma"])
    _on_rows(lambda some: torch.where(some >= 0.5, 1 - some, some), chunk["solarize"], planes)
    for plane, mean, std in zip(planes, aug["mean"], aug["std"]):
        plane.sub_(mean).div_(std)
    _on_rows(_erase, chunk["erase"], planes, chunk["erased"])
    return planes


def apply_params(x, params, aug, cropped=False):
    """One view of a rank's images, computed on the device of x.

    x: (n, 3, H, W) uint8; cropped: (n, 3, S, S), from `crop_boxes`, not flipped. params: n rows
    of `sample_params(aug, ...)`, on the CPU. Raises ValueError for other shapes.
    Order: crop and resize, flip, colour jitter, grayscale, blur, solarize, normalise, erase.
    Returns (n, 3, S, S) float32. Equal to torchvision's functions on float images to 1e-5 before
    normalisation; the other images of the batch change an image by less than 1e-6.
    """
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"images must be (n, 3, H, W) uint8, got {tuple(x.shape)} {x.dtype}")
    (n, _, height, width), size = x.shape, aug["size"]
    if cropped and (height, width) != (size, size):
        raise ValueError(f"cropped images must be {size} x {size}, got {height} x {width}")
    if any(len(value) != n for value in params.values()):
        raise ValueError(f"params must have one row for each of the {n} images")
    chunks = plan_chunks(params, aug, None if cropped else (height, width), x.device)
    return apply_chunks(x, send(chunks, x.device)(), aug, cropped)


def apply_chunks(x, chunks, aug, cropped=False):
    """`apply_params` of what `plan_chunks` gave; with more rows than images x these repeat."""
    n, size = sum(len(chunk["row"]) for chunk in chunks), aug["size"]
    out = torch.empty(n, 3, size, size, device=x.device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32's 10 bits would show in the images
    try:
        with torch.autocast(x.device.type, enabled=False):
            for chunk in chunks:
                planes = _transform(x[chunk["row"] % len(x)], chunk, aug, cropped)
                out.index_copy_(0, chunk["row"], planes.transpose(0, 1))
    finally:
        torch.set_float32_matmul_precision(precision)
    return out


def augment(batch):
    """Augmented views of a batch of `Data.batches`, or of one of its `extra`: (V, b, 3, S, S)
    float32, normalised, of this process's rows."""
    x = apply_chunks(batch.images, batch.chunks, batch.aug, batch.cropped)  # (V * b, 3, S, S)
    return x.contiguous(memory_format=batch.memory_format).unflatten(0, (batch.views, -1))


# ---------------------------------------------------------------------------------- 4 backbones


class TinyResNet(nn.Module):
    """Four stages of one BasicBlock, widths 16 to 128: for CPU runs. Names as in torchvision."""

    def __init__(self, stride=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        for i, width in enumerate((32, 64, 128), 2):
            down = nn.Sequential(nn.Conv2d(width // 2, width, 1, 2, bias=False),
                                 nn.BatchNorm2d(width))
            setattr(self, f"layer{i}", nn.Sequential(BasicBlock(width // 2, width, 2, down)))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


ARCHS = {"resnet-tiny": 128, "resnet18": 512, "resnet34": 512, "resnet50": 2048}


def resnet(arch, stem="imagenet"):
    """Backbone: (n, 3, S, S) images to (n, width) pooled features, not normalised.

    stem "imagenet": torchvision's (7x7 stride 2, max-pool); "cifar": 3x3 stride 1, no max-pool.
    Initial values and parameter names are torchvision's, without `fc`.
    """
    if arch == "resnet-tiny":
        backbone = TinyResNet()
    else:
        backbone = getattr(torchvision.models, arch)(weights=None)
        backbone.fc = nn.Identity()
        if stem == "cifar":
            backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
            backbone.maxpool = nn.Identity()
    backbone.width = ARCHS[arch]
    return backbone


class NormLinear(nn.Linear):
    """Cosine between the input and every weight row; no bias (CLD, E9)."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight.uniform_(-1, 1), dim=1))

    def forward(self, x):
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class MLP3(nn.Sequential):
    """Linear-BN-ReLU-Linear-BN-ReLU-Linear, all with biases, no BN at the end."""

    def __init__(self, d_in, d_hidden, d_out):
        super().__init__(collections.OrderedDict(  # `lars_groups` finds BatchNorm by "bn"
            linear1=nn.Linear(d_in, d_hidden), bn1=nn.BatchNorm1d(d_hidden), relu1=nn.ReLU(),
            linear2=nn.Linear(d_hidden, d_hidden), bn2=nn.BatchNorm1d(d_hidden), relu2=nn.ReLU(),
            linear3=nn.Linear(d_hidden, d_out)))


def head(kind, d_in, d_out):
    """Projection head: linear | mlp | normlinear | normmlp (one hidden layer of d_in) | mlp3."""
    if kind == "mlp3":
        return MLP3(d_in, d_in, d_out)
    last = (NormLinear if kind.startswith("norm") else nn.Linear)(d_in, d_out)
    if kind.endswith("mlp"):
        return nn.Sequential(nn.Linear(d_in, d_in), nn.ReLU(), last)
    return last


@torch.no_grad()
def momentum_update(key, query, m):
    """theta_k <- m theta_k + (1 - m) theta_q, m in [0, 1], for the parameters of two modules in the
    same order. The key keeps its own BatchNorm buffers."""
    theta_k, theta_q = list(key.parameters()), list(query.parameters())
    torch._foreach_mul_(theta_k, m)
    torch._foreach_add_(theta_k, theta_q, alpha=1 - m)


@torch.no_grad()
def shuffled_keys(encoder, x, args, step):
    """Keys of the whole batch with shuffled BatchNorm (MoCo): where the batch is normalised in
    several parts, by processes or by --micro-batch, a key is not in the part of its query.

    Args: encoder, (n, ...) to (n, D); x (b, ...) this process's rows; step: of the shuffle.
    Returns: (B, D) on every process, in the order of the batch. One part is not shuffled.
    """
    b = len(x)
    if world() == 1 and (args.micro_batch or b) >= b:
        return encoder(x)
    order = torch.randperm(b * world(), generator=generator(args.seed, step, "shuffle"))
    order = order.to(x.device, non_blocking=True)
    x = gather(x.flatten(1))[order[rank() * b:(rank() + 1) * b]].unflatten(1, x.shape[1:])
    return gather(encoder(x))[order.argsort()]


class Queue(nn.Module):
    """Ring of the newest K keys, in the checkpoint: buffers keys (K, D), labels (K,) int64, -1 for
    initial rows, and ptr. All processes enqueue the same rows."""

    def __init__(self, keys):
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.full((len(keys),), -1, device=keys.device))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64, device=keys.device))

    @torch.no_grad()
    def enqueue(self, keys, labels=None):
        """Overwrite the oldest rows by keys (B, D) and labels (B,) int64, or 0 without labels. K
        need not be a multiple of B. Raises: ValueError if B > K."""
        if len(keys) > len(self.keys):
            raise ValueError(f"{len(keys)} keys do not fit into a queue of {len(self.keys)}")
        at = (self.ptr + torch.arange(len(keys), device=self.ptr.device)) % len(self.keys)
        self.keys[at] = keys.to(self.keys.dtype)
        self.labels[at] = torch.zeros_like(at) if labels is None else labels
        self.ptr.copy_((self.ptr + len(keys)) % len(self.keys))


# ---------------------------------------------------------------------------------- 5 optimisation


class LARS(torch.optim.Optimizer):
    """SGD with momentum that scales each gradient to the norm of its weight (You et al. 2017).

    g <- g + wd p. Groups with `adapt`: g <- g * trust_coef ||p|| / (||g|| + eps), factor 1 where a
    norm is 0. Then v <- momentum v + g, p <- p - lr v. Skips parameters without gradient.
    """

    def __init__(self, groups, lr, momentum=0.9, trust_coef=0.001, eps=0.0):
        super().__init__(groups, dict(lr=lr, momentum=momentum, trust_coef=trust_coef, eps=eps,
                                      weight_decay=0.0, adapt=True))

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = torch._foreach_add([p.grad for p in params], params,
                                       alpha=group["weight_decay"])
            if group["adapt"]:
                p_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (params, grads))
                ratio = group["trust_coef"] * p_norm / (g_norm + group["eps"])  # (params,)
                # torch.where chooses on the device, without waiting for it
                ratio = torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                torch._foreach_mul_(grads, ratio.unbind())
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def lars_groups(named_parameters, weight_decay, by="name"):
    """Two groups: one with adaptation and weight decay, one with neither.

    by "name" excludes names with "bn" or "bias", as the authors' code does (which keeps the
    BatchNorm of a ResNet's shortcut, `downsample.1.weight`). by "kind" excludes all vectors.
    """
    adapted, excluded = [], []
    for name, p in named_parameters:
        skip = p.ndim < 2 if by == "kind" else "bn" in name or "bias" in name
        (excluded if skip else adapted).append(p)
    return [dict(params=adapted, weight_decay=weight_decay, adapt=True),
            dict(params=excluded, weight_decay=0.0, adapt=False)]


def optimizer(args, model, by="name"):
    """SGD (all parameters decayed), LARS (groups `by`, see `lars_groups`) or AdamW by the flags."""
    if args.optimizer == "lars":
        return LARS(lars_groups(model.named_parameters(), args.weight_decay, by), args.lr,
                    args.momentum)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, nesterov=args.nesterov,
                           weight_decay=args.weight_decay)


def warmup_cosine(step, steps, lr, warmup=0, start=0.0, floor=0.0):
    """Rate of step (from 0): linear from `start` to lr in `warmup` steps, cosine to `floor`."""
    if step < warmup:
        return start + (lr - start) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * progress))


def cosine_by_epoch(epoch, epochs, lr, floor=0.0):
    """Rate of epoch (from 1): floor + (lr - floor) (1 + cos(pi epoch / epochs)) / 2."""
    return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * epoch / epochs))


def warmup_by_epoch(step, steps_per_epoch, epochs, lr, warmup, start=0.01, rate=0.1):
    """Rate of step (from 0): a cosine by epoch to lr rate^3. In the `warmup` epochs it rises by
    step from `start` to the cosine of the last one (authors' rule in InfoMin + CLD and RINCE)."""
    floor = lr * rate ** 3
    if step < warmup * steps_per_epoch:
        end = cosine_by_epoch(warmup, epochs, lr, floor)
        start = min(start, end)  # differs from the released code where lr is very small
        return start + (end - start) * step / (warmup * steps_per_epoch)
    return cosine_by_epoch(step // steps_per_epoch + 1, epochs, lr, floor)


def steps_by_epoch(epoch, milestones, lr, rate=0.1):
    """Rate of epoch (from 1): times `rate` for every milestone smaller than epoch."""
    return lr * rate ** sum(m < epoch for m in milestones)


def set_lr(optimizer, lr):
    """Give every parameter group the learning rate; returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def memory_format(args):
    """Memory format of images and convolutions, from --channels-last."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def autocast(args, device, evaluation=False):
    """Mixed precision of --amp for the network; losses and grouping stay in float32. Evaluation has
    it on CUDA only, where it saves time."""
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    enabled = args.amp != "none" and not (evaluation and device.type == "cpu")
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def scaler(args, device):
    """Loss scaler; does nothing unless --amp is fp16."""
    return torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")


# ---------------------------------------------------------------------------------- 6 checkpoint


def progress(steps=None, **options):
    """tqdm on rank 0, with rare updates when the output is not a terminal."""
    from tqdm import tqdm

    bar = tqdm(steps, disable=rank() > 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 20, **options)
    _open.callback(bar.close)
    return bar


class Log:
    """JSON lines (rank 0): the command and versions, then one line for each interval. A resumed run
    cuts lines that its checkpoint does not know: its log is equal except for times and memory."""

    def __init__(self, args, data):
        self.args, self.path = args, Path(args.out) / "log.jsonl"
        self.steps_per_epoch = data.steps_per_epoch
        self.lines, self.crc, self.count, self.sums = 0, 0, 0, {}
        self.total, self.bar = args.epochs * data.steps_per_epoch, None
        self.began = self.clock = time.time()
        self.header = dict(
            command=shlex.join([args.method + ".py", *args.argv]), args=flags_dict(args),
            data=dict(train=len(data.train), test=len(data.test),
                      notes=data.train.notes + data.test.notes),
            fingerprint={split: {k: v for k, v in table.fingerprint.items() if not k.startswith(
                "column ") or k.removeprefix("column ") in data.train.used}
                for split, table in (("training", data.train), ("test", data.test))},
            **environment(data.device))
        if "knn_queries" in args and len(rows := knn_queries(args, data.test)) < len(data.test):
            self.header["data"]["notes"].append(f"kNN: {len(rows)} of {len(data.test)} test images")

    def state_dict(self):
        """What the checkpoint holds of the log."""
        return dict(lines=self.lines, count=self.count, sums=self.sums)

    def load_state_dict(self, state):
        """Take over the state and cut the file to its number of lines, whose CRC, if it is not 0,
        must be `self.crc`."""
        self.lines, self.count, self.sums = state["lines"], state["count"], dict(state["sums"])
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        text, expected = b"".join(lines[:self.lines]), self.crc
        self.crc = zlib.crc32(text)
        if len(lines) < self.lines or expected not in (0, self.crc):
            raise BadInput(f"{self.path} is missing, cut or changed: it does not begin with the "
                           f"{self.lines} lines that the checkpoint knows; put it back, or use "
                           "another --out")
        if rank() == 0:
            atomic_write(self.path, lambda file: file.write(text))

    def begin(self):
        """A new file with the header: no log is ever without it."""
        text = f"{json.dumps(self.header)}\n".encode()
        self.lines, self.crc = 1, zlib.crc32(text)
        if rank() == 0:
            atomic_write(self.path, lambda file: file.write(text))

    def write(self, **values):
        """Append one line; it is on the disk before a checkpoint that counts it."""
        text = f"{json.dumps(values)}\n".encode()
        self.lines, self.crc = self.lines + 1, zlib.crc32(text, self.crc)
        if rank() == 0:
            try:
                with open(self.path, "ab") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunFailed(f"cannot write {self.path}: {error.strerror}") from None

    def __call__(self, step, **values):
        """Take the values of a step; every --log-every steps and epoch, write their means."""
        if self.bar is None:
            self.bar = progress(total=self.total, initial=step, unit="step")
            self.since = step
        self.sums |= {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.count += 1
        self.bar.update()
        done, now = step + 1, time.time()
        speed = (done - self.since) * self.args.batch_size / max(now - self.clock, 1e-9)
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()} | {
            "images/s": f"{speed:.{int(speed < 10)}f}"}, refresh=False)  # the bar says when
        if done % self.args.log_every == 0 or done % self.steps_per_epoch == 0:
            means = {name: total / self.count for name, total in self.sums.items()}
            self.write(step=done, epoch=done / self.steps_per_epoch, **means,
                       images_per_s=round(speed, 1), memory_mb=memory_mb(),
                       seconds=round(now - self.began, 1), cpu_seconds=round(time.process_time()))
            self.sums, self.count, self.since, self.clock = {}, 0, done, now

    @contextlib.contextmanager
    def pause(self):
        """Leave what happens inside (evaluation, clustering) out of images/s. Gives the time."""
        begin = time.time()
        yield begin
        self.clock += time.time() - begin

    def records(self):
        """All lines but the first, as dicts."""
        with open(self.path) as file:
            return [json.loads(line) for line in file][1:]


def flags_dict(args):
    """The flags as a dict of JSON values, without those that only identify this invocation."""
    flags = {k: v for k, v in vars(args).items() if k not in (
        "method", "argv", "set_by", "drawn_by")}
    return json.loads(json.dumps(flags))


def environment(device):
    """Dict of what figures depend on besides flags: processes, threads, device and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = "CPU"
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            name = next((s.split(":")[1].strip() for s in file if s.startswith("model name")), name)
        name += f", {CORES} cores"
    return dict(processes=world(), threads=torch.get_num_threads(), device=name, versions=dict(
        python=sys.version.split()[0], torch=torch.__version__,
        torchvision=torchvision.__version__))


def memory_mb():
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU; MB."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() >> 20
    shift = 20 if sys.platform == "darwin" else 10  # bytes on a Mac, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> shift


def atomic_write(path, write, previous=None):
    """Write a temporary file, then rename it to path, which never names half a file. previous:
    the name that an older file of this path gets."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError after the OSError of a write
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise RunFailed(f"cannot write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def save_checkpoint(state, step, args, name=None):
    """Atomic checkpoint after `step` steps (rank 0). Without a name it is checkpoint.pt, and the
    one before it becomes checkpoint.prev.pt."""
    if rank() == 0:
        checkpoint = dict(format=1, method=args.method, step=step, args=flags_dict(args),
                          state={name: part.state_dict() for name, part in state.items()})
        if log := state.get("log"):
            checkpoint.update(data=log.header["fingerprint"], log_crc=log.crc)
        folder = Path(args.out)
        atomic_write(folder / (name or "checkpoint.pt"), lambda file: torch.save(checkpoint, file),
                     previous=None if name else folder / "checkpoint.prev.pt")
    _saved[0] = True


@functools.cache
def _allow_harmless():
    """Let torch.load read what files of others hold beside weights and what runs no code: flags,
    paths (as text), dates, numbers and arrays of numpy."""
    def under_name(name, call):  # pickle looks a function up by its name, which versions change
        def function(*values):
            return call(*values)
        function.__module__, _, function.__name__ = name.rpartition(".")
        function.__qualname__ = function.__name__
        return function

    names = {f"{module}.{kind}": lambda *parts: os.path.join("", *parts)
             for module in ("pathlib", "pathlib._local")
             for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[f"{module}.scalar"] = np.float64().__reduce__()[0]
        names[f"{module}._reconstruct"] = np.zeros(0).__reduce__()[0]
    names |= {f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__")
              for kind in (set, frozenset, list, dict, slice, complex)}
    torch.serialization.add_safe_globals([
        argparse.Namespace, date, datetime, timedelta, collections.defaultdict,
        codecs.encode, np.ndarray, np.dtype, *{type(np.dtype(c)) for c in "?bhilqBHILQefdgFDOSU"},
        *(under_name(*pair) for pair in names.items())])


def load_checkpoint(path):
    """The dict of a file, by torch.load with weights_only=True, which does not compare the CRCs of
    the records; BadInput that names the file if it cannot be read or holds anything else."""
    _allow_harmless()
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4" and (record := zipfile.ZipFile(file).testzip()):
                raise zipfile.BadZipFile(f"the CRC of {record} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"checkpoint {path} not found") from None
    except Exception as error:  # torch.load raises many kinds for a truncated or foreign file
        if kind := re.search(r"(?:GLOBAL|class|function) ([\w.]+) ", str(error)):
            raise BadInput(f"checkpoint {path} cannot be read: it holds a {kind[1]}, which could "
                           "run code; save a file with the state_dict alone") from None
        reason = str(error).strip().split("\n")[0][:120]
        older = Path(path).with_name("checkpoint.prev.pt")
        if Path(path).name == "checkpoint.pt" and older.exists():
            reason += f"; {older} is the checkpoint before it: remove {path} to go on from there"
        raise BadInput(f"checkpoint {path} cannot be read (truncated, damaged, or no checkpoint?): "
                       f"{reason}") from None
    if not isinstance(checkpoint, dict):
        raise BadInput(f"checkpoint {path} holds a {type(checkpoint).__name__}, no weights: it is "
                       "not a checkpoint of this project or a state dict")
    return checkpoint


def is_ours(checkpoint):
    """Whether the dict of a file is a checkpoint of this project."""
    return (checkpoint.keys() >= {"format", "method", "step", "args", "state"}
            and checkpoint["format"] == 1)


def _tensors(tree, path=""):
    """(name, tensor) for each tensor in nested dicts and lists; the key of a dict ends with /."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, torch.Tensor):
            yield f"{path}{key}", value
        elif isinstance(value, (dict, list, tuple)):
            yield from _tensors(value, f"{path}{key}/")


def _find_resnet(weights, arch, stem):
    """The ResNet that the tensors `weights` fit best: prefix of its names, arch, stem, names of the
    weights that fit, are absent and are left over, its state dict on meta, name -> name in file,
    prefixes of others that fit equally well. None if no weight fits."""
    first = (re.fullmatch(r"(|.*[./])(conv1|\d+)\.weight", k) for k, x in weights.items()
             if x.ndim == 4 and x.shape[1] < 16)  # the convolution that reads images
    layouts, best = {}, None  # prefix -> name in torchvision's ResNet -> name in the file
    prefixes = [m[1] for m in first if m]
    # what both names share says nothing: mean_model.teacher. and mean_model.student.
    shared = re.match(r"(.*[./_])?", os.path.commonprefix(prefixes), re.S).end()
    for prefix in prefixes:
        own = {k: k[len(prefix):].partition(".") for k in weights if k.startswith(prefix)}
        # the children of a ResNet as the numbered layers of an nn.Sequential: those with weights
        numbers = sorted({name for name, _, _ in own.values() if name.isdigit()}, key=int)
        names = dict(zip(numbers, "conv1 bn1 layer1 layer2 layer3 layer4 fc".split()))
        # ResNets derived from SupContrast call the branch of a block `shortcut`
        layouts[prefix] = {
            (names.get(name, name) + dot + rest).replace(".shortcut.", ".downsample."): k
            for k, (name, dot, rest) in own.items()}
    for a in [arch] if arch else ARCHS:
        for s in [stem] if stem else ("imagenet", "cifar"):
            with torch.device("meta"):  # without memory
                ours = resnet(a, s).state_dict()
            for p, own in layouts.items():
                fits = [k for k in ours if k in own and weights[own[k]].shape == ours[k].shape]
                absent = [k for k in ours if k not in fits and "num_batches" not in k]
                extra = [k for k in own if k.startswith("layer") and k not in ours]
                copy = re.search(  # ties: not the slow one of two networks
                    "(?<![a-z])(k|m|ema|avg|swa|slow)(?![a-z])|"
                    "key|momentum|target|teacher|averag|mean",
                    re.sub("(?<=[a-z])(?=[A-Z])", "_", p[shared:]).lower())
                score = -len(absent) - len(extra), not copy
                if fits and (best is None or score > best[0]):
                    best = score, (p, a, s, fits, absent, extra, ours, own), []
                elif fits and score == best[0] and (a, s) == best[1][1:3]:
                    best[2].append(p)
    return best and (*best[1], best[2])


def load_backbone(path, checkpoint, arch=None, stem=None, model=None):
    """Backbone with the weights of a checkpoint, under whatever dicts and prefix they stand;
    BadInput with the file and names if weights are missing, left over or of other shapes.

    Args: path, for messages; checkpoint, from `load_checkpoint`; arch, stem: None = by the weights;
    model: fill its backbone instead, and each of its heads of which all weights fit.
    Returns: the backbone; dict of arch, stem, prefix, loaded (number of tensors), heads (names),
    left_out (first name -> number), missing (BatchNorm's counters of steps, which nothing reads),
    rivals (prefixes of other networks that fit equally well; the first in the file is taken).
    """
    if checkpoint.get("method") == "sogclr_clip":
        raise BadInput(f"{path} is of sogclr_clip.py, which evaluates it itself: "
                       f"python sogclr_clip.py --evaluate {path}")
    weights = dict(_tensors(checkpoint))
    if (found := _find_resnet(weights, arch, stem)) is None:
        names = [*weights] or [f"no tensor under its keys {', '.join(map(str, checkpoint))}"]
        raise BadInput(f"checkpoint {path}: no weight fits a ResNet; it holds "
                       f"{', '.join(names[:8])}{', ..' * (len(names) > 8)}")
    prefix, arch, stem, fits, absent, extra, ours, own, rivals = found
    for what, keys in (("of another shape", [k for k in absent if k in own]),
                       ("missing", absent), ("left over", extra)):
        if keys:
            raise BadInput(f"checkpoint {path} is no {arch} with {stem} stem: {len(keys)} weights "
                           f"{what}, {', '.join(own.get(k, prefix + k) for k in keys[:3])}")
    backbone = resnet(arch, stem) if model is None else model.backbone
    backbone.load_state_dict({k: weights[own[k]] for k in fits}, strict=False)
    used, heads, root = {own[k] for k in fits}, [], prefix.removesuffix("backbone.")
    for name, head in [] if model is None else model.named_children():
        shapes = {k: x.shape for k, x in head.state_dict().items()}
        part = {k: weights[key] for k in shapes if (key := f"{root}{name}.{k}") in weights}
        if name != "backbone" and shapes and shapes == {k: x.shape for k, x in part.items()}:
            head.load_state_dict(part)
            used, heads = used | {f"{root}{name}.{k}" for k in part}, [*heads, name]
    folder, left_out = prefix[:prefix.rfind("/") + 1], collections.Counter()
    for key in sorted(k for k in weights if k.startswith(folder) and k not in used):
        start = len(prefix if key.startswith(prefix) else folder)
        start += 7 * key.startswith("module.", start)
        left_out[key[len(folder):start] + key[start:].split(".")[0]] += 1
    return backbone, dict(
        arch=arch, stem=stem, prefix=re.sub("^((state|state_dict|model)/)+", "", prefix),
        loaded=len(fits), heads=heads, left_out=dict(left_out), rivals=rivals,
        missing=[k for k in ours if k not in fits])


def describe_weights(path, loaded):
    """Line about the dict that `load_backbone` gave."""
    left_out = ", ".join(f"{k} ({n})" for k, n in loaded["left_out"].items()) or "nothing"
    heads = f"; heads: {', '.join(loaded['heads'])}" if loaded["heads"] else ""
    return (f"{path}: {loaded['loaded']} tensors of {loaded['arch']}, {loaded['stem']} stem, "
            f"loaded from '{loaded['prefix']}*'{heads}; left out: {left_out}; missing: "
            f"{', '.join(loaded['missing'][:3]) or 'nothing'}" + "".join(
                f"; '{rival}*' fits equally well: save it alone to evaluate it"
                for rival in loaded["rivals"]))


def initial_weights(state, args):
    """Fill the new networks with the weights of --init. Returns: what `load_backbone` tells."""
    model = state["model"]
    if args.init == "torchvision":
        if args.arch not in torchvision.models.list_models():
            raise BadInput(f"--init torchvision: torchvision has no weights for --arch {args.arch}")
        weights = torchvision.models.get_model_weights(args.arch).DEFAULT
        others = world() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
        if others:  # the first process of a machine fetches the file
            dist.barrier()
        try:
            checkpoint = weights.get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise RunFailed(f"--init torchvision: the download of {weights.url} failed ({error}); "
                            "fetch it elsewhere and name it, --init FILE", alone=True) from None
        if world() > 1 and not others:
            dist.barrier()
    else:
        checkpoint = load_checkpoint(args.init)
    loaded = load_backbone(args.init, checkpoint, args.arch, args.stem, model)[1]
    if "key" in state:
        state["key"].load_state_dict(model.state_dict())
    print_rank0(describe_weights(f"--init {args.init}", loaded))
    return dict(loaded, file=args.init)


# resuming may change these
FREE_FLAGS = ("out", "data_dir", "download", "workers", "threads", "picture", "keep_every")


def resume(state, args):
    """Open the run folder as its one writer: continue from its checkpoint, or begin with an empty
    log, whose `lines` is then 1. Returns: the number of steps done.
    BadInput on all processes if the folder holds a run with other flags or data or a broken
    checkpoint, if another process writes to it, or if the processes differ."""
    log = state["log"]
    try:
        if rank() == 0:
            _lock(log.path)
        step = _load_run(state, args)
    except (BadInput, RunFailed) as error:
        step = error
    mine = step, flags_dict(args) | {"out": os.path.abspath(args.out)}, log.header["fingerprint"]
    found = [mine] * world()
    if world() > 1:  # all have looked before rank 0 writes
        dist.all_gather_object(found, mine)
    for number, (step, flags, data) in enumerate(found):
        if isinstance(step, Exception):
            raise step
        changed = changed_flags(found[0][1], flags, {*FREE_FLAGS} - {"out"})
        changed += changed_data(found[0][2], data) + ["checkpoint"] * (step != found[0][0])
        if changed:
            raise BadInput(f"process {number} differs from process 0 ({', '.join(changed)}): --out "
                           "must be a folder that all nodes share, with the same flags and data")
    if log.lines == 0:
        if vars(args).get("init"):  # the image methods
            log.header["init"] = initial_weights(state, args)
        log.begin()
    return step


def _lock(path):
    """Make this process the one writer of the folder of `path`, until its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _locks.append(os.open(path.parent, os.O_RDONLY))
        _open.callback(_unlock, path.parent)
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another process trains in {path.parent}: wait for it, end it, or use "
                       "another --out") from None
    except OSError as error:
        if not _locks:  # else it is a file system without locks
            raise RunFailed(f"cannot write {path}: {error.strerror}") from None
    for left in path.parent.glob("checkpoint*.pt.*.tmp"):  # of a process that was killed
        left.unlink()


def _unlock(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()  # empty: the run could not begin
    while _locks:
        os.close(_locks.pop())


def _load_run(state, args):
    """Load the checkpoint of the run folder, if there is one. Returns: the number of steps done."""
    path, log = Path(args.out) / "checkpoint.pt", state["log"]
    path = path if path.exists() else path.with_name("checkpoint.prev.pt")
    if path.exists():
        old = load_checkpoint(path)
        if not is_ours(old):
            raise BadInput(f"{path} is not a checkpoint of this project; use another --out")
    elif log.path.exists():  # stopped before its first checkpoint
        try:
            header = json.loads(log.path.read_text().split("\n")[0])
            old = dict(method=header["command"].split(".py")[0], args={**header["args"]})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{log.path} is not a log of this project; use another --out") from None
    else:
        return 0
    if old["method"] != args.method:
        raise BadInput(f"{args.out} holds a run of {old['method']}.py; use another --out")
    if changed := changed_flags(old["args"], flags_dict(args), FREE_FLAGS):
        longer = "init" in args and any(text.startswith("--epochs ") for text in changed)
        raise BadInput(f"{args.out} holds a run with other flags ({', '.join(changed)}); use "
                       "another --out, or the same flags to go on" + longer * (
                           f"; to train for longer: --init {args.out}/checkpoint.pt --out NEW"))
    if "state" not in old:
        if re.search('^{"step": [1-9]', log.path.read_text(), re.M):
            raise BadInput(f"{log.path} tells of steps, but {path.parent} has no checkpoint.pt: "
                           "copy a checkpoint there to go on, or use another --out")
        return 0
    if changed := changed_data(old.get("data") or {}, log.header["fingerprint"]):
        raise BadInput(f"{args.out} holds a run with other data ({', '.join(changed)}); put them "
                       "back to go on, or use another --out")
    log.crc = old.get("log_crc", 0)
    try:
        for name, part in state.items():
            part.load_state_dict(old["state"][name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{path} does not fit this network: {reason}") from None
    return old["step"]


def start_run(state, args, data, aug, evaluate):
    """Before the first step: print how many images there are and what was dropped, log the dict
    that evaluate() returns, save views.png and a checkpoint."""
    rows = "image-caption pairs" if "image_id" in data.train.columns else "images"
    unlabelled = [f"{n} {name} images without a {args.label}" for name, table in (
        ("training", data.train), ("test", data.test)) if 0 < (n := int(
            (table.columns[args.label] < 0).sum())) < len(table)]
    print_rank0("\n".join([f"{len(data.train)} training and {len(data.test)} test {rows}",
                           *unlabelled, *state["log"].header["data"]["notes"]]))
    with state["log"].pause() as begin:
        state["log"].write(step=0, **evaluate(), seconds=round(time.time() - begin, 1))
        views_picture(data, aug, f"{args.out}/views.png")
        save_checkpoint(state, 0, args)


def end_step(step, state, args, data, evaluate):
    """After a step (from 0): log evaluate() every --knn-every epochs, save every --save-every
    epochs and before a stop, a copy every --keep-every epochs. Returns: whether to stop."""
    if data.end_of_epoch(step, every=args.knn_every):
        with state["log"].pause() as begin:
            state["log"].write(step=step + 1, **evaluate(), seconds=round(time.time() - begin, 1))
    epoch, rest = divmod(step + 1, data.steps_per_epoch)
    if rest == 0 or should_stop():  # before a save; the loss of the next step would tell too late
        for name, x in state["model"].named_parameters():
            if not x.isfinite().all():
                raise RunFailed(f"the update of step {step} left {name} not finite; {_advice()}")
    if args.keep_every and rest == 0 and epoch % args.keep_every == 0:  # first: else a resumed run
        save_checkpoint(state, step + 1, args, f"checkpoint-{epoch:04}.pt")  # would not write it
    if should_stop() or data.end_of_epoch(step, every=args.save_every):
        save_checkpoint(state, step + 1, args)
    return should_stop()


def changed_flags(old, new, free):
    """Texts "--name old -> new" of the flags, except `free`, that differ in two `flags_dict`."""
    return [f"{flag_name(k)} {old.get(k)} -> {new.get(k)}" for k in sorted({**old, **new})
            if k not in free and old.get(k) != new.get(k)]


def summary(log, args, title, first_step, extra_lines=(), panels=()):
    """Save the curves and print the result of a run, its files and the next command, on rank 0.
    extra_lines: lines of the method; panels: see `curves`."""
    if log.bar is not None:
        log.bar.close()
    if rank() > 0:
        return
    folder, checkpoint = Path(args.out), Path(args.out) / "checkpoint.pt"
    pictures = [str(p) for p in (curves(log, args, panels), folder / "views.png")
                if p and p.exists()]
    files = [*extra_lines, f"  checkpoint   {checkpoint}", f"  log          {log.path}",
             f"  pictures     {', '.join(pictures) or 'none'}"]
    lines, first = [title, *files], "initial" if vars(args).get("init") else "untrained"
    if knn := [r["knn_top1"] for r in log.records() if r.get("knn_top1") is not None]:
        lines = [title, f"  kNN top-1    {first} {knn[0]:.2f} %   trained {knn[-1]:.2f} %   "
                 f"(column {args.label}, K = {min(args.knn_k, log.header['data']['train'])}, "
                 f"T = {args.knn_t})", *files, "  next         python linear_eval.py --checkpoint "
                 f"{shlex.quote(str(checkpoint))}"]
    if first_step == log.total:
        lines += [f"  this run was finished before; to train anew: remove {folder}, or --out NEW"]
    if should_stop():
        cause = signal.Signals(_signal["asked"] or signal.SIGTERM).name.replace("SIGINT", "Ctrl-C")
        lines = [f"stopped by {cause} and saved to {folder}; run the same command to continue"]
    print_rank0("\n".join(lines))


def source(args):
    """Name of the data set for titles; marks synthetic images."""
    return args.dataset + (" (synthetic)" if args.dataset.startswith("shapes") else "")


def pyplot():
    """matplotlib.pyplot without a screen, or None if matplotlib is not installed."""
    try:
        import matplotlib.pyplot
    except ImportError:
        return None
    matplotlib.use("Agg")
    return matplotlib.pyplot


def curves(log, args, panels=()):
    """Save loss, learning rate, kNN accuracy and `panels` (name or names, title) as curves.png.
    Returns: its path, or None without matplotlib or values."""
    plt, records = pyplot(), log.records()
    drawn = []  # (title, [(name, points)])
    for names, title in (("loss", "loss"), ("lr", "learning rate"),
                         ("knn_top1", f"kNN top-1 on {args.label} (%)"), *panels):
        lines = [(k, [(r["step"] / log.steps_per_epoch, r[k]) for r in records
                      if r.get(k) is not None])
                 for k in ([names] if isinstance(names, str) else names)]
        if any(points for _, points in lines):
            drawn.append((title, lines))
    if plt is None or not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(4 * len(drawn), 3), squeeze=False)
    for axis, (title, lines) in zip(axes[0], drawn, strict=True):
        for name, points in lines:
            axis.plot(*zip(*points), marker="o" if len(points) < 30 else None, ms=3, label=name)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(f"{args.method}, {source(args)}", fontsize=10)
    figure.tight_layout()
    path = Path(args.out) / "curves.png"
    atomic_write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)
    return path


def views_picture(data, aug, path, rows=8, views=7):
    """Save a PNG with one row for each image: the image itself, then its augmented views."""
    if rank() > 0:
        return
    first = next(data.batches(0, 1, aug, views, own=slice(min(rows, data.args.batch_size))))
    x = augment(first).cpu()  # (V, rows, 3, S, S)
    plain = next(data.eval_batches(data.train, first.rows[:x.shape[1]].cpu(), aug["size"], False))
    mean, std = (torch.tensor(aug[k]).view(3, 1, 1) for k in ("mean", "std"))
    sheet = torch.cat([plain.cpu()[None] / 255, x * std + mean]).transpose(0, 1)
    grid = torchvision.utils.make_grid(sheet.flatten(0, 1), nrow=1 + views, pad_value=1)
    grid = F.interpolate(grid[None], scale_factor=max(1, 64 // aug["size"]))[0].clamp(0, 1)
    image = Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy())
    atomic_write(Path(path), lambda file: image.save(file, "PNG"))


FRAMES = {None: (90, 90, 90), True: (40, 160, 60), False: (205, 50, 45)}  # gray, green, red


def image_rows(path, title, rows, left=8, side=96):
    """Save a PNG of rows of framed images: pairs of a text in the `left` pixels and of images,
    (uint8 (3, S, S), True, False or None for a green, red or gray frame, text below)."""
    frame = side // 24
    step = side + 2 * frame + 4
    below = 16 if any(text for _, images in rows for *_, text in images) else 0
    width = max(left + step * max(len(images) for _, images in rows),
                16 + int(ImageFont.load_default().getlength(title)))
    sheet = Image.new("RGB", (width, 26 + (step + below) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 7), title, "black")
    for i, (text, images) in enumerate(rows):
        y = 26 + i * (step + below)
        pen.multiline_text((8, y + frame), text, "black")
        for j, (image, right, name) in enumerate(images):
            x, edge = left + j * step, side + 2 * frame
            pen.rectangle((x, y, x + edge - 1, y + edge - 1), fill=FRAMES[right])
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile.resize((side, side), Image.Resampling.BOX), (x + frame, y + frame))
            while pen.textlength(name) > edge:
                name = name[:-3] + ".."
            pen.text((x, y + edge + 2), name, "black")
    atomic_write(Path(path), lambda file: sheet.save(file, "PNG"))


# ---------------------------------------------------------------------------------- 7 evaluation


@torch.no_grad()
def extract_features(module, data, table, resize=False, select=None, normalize=False,
                     limit=2 ** 30, what="features"):
    """Output of a network for every image of a table, in evaluation mode, computed by all ranks.

    Args: module, images (n, 3, S, S) to (n, D), or to what `select` takes (n, D) from; table of
    `data`; resize, see `Data.eval_batches`; normalize: L2-normalise the rows; what: for messages.
    Returns: (N, D) on every rank, float32 on the device, or float16 on the CPU if it holds more
    than `limit` numbers (ImageNet in 2048-d has 2.6e9).
    Errors: RunFailed if a feature, weight or statistic is not finite (ReLU makes 0 of -inf).
    """
    args, N, W = data.args, len(table), world()
    for buffer in module.buffers() if W > 1 else ():
        dist.broadcast(buffer, 0)  # BatchNorm statistics: those of rank 0, as in the checkpoint
    own = torch.arange(rank(), N + -N % W, W).clamp(max=N - 1)  # equally many rows on every rank
    mean, std = (torch.tensor(augmentation(args)[k], device=data.device).view(3, 1, 1) * 255
                 for k in ("mean", "std"))
    was_training = module.training
    module.eval()
    parts, large = [], False
    batches = progress(data.eval_batches(table, own, args.image_size, resize), desc=what, delay=30,
                       total=-(-len(own) // 256), unit="batch", leave=False)  # none if it is quick
    for x in batches:
        with autocast(args, data.device, evaluation=True):
            y = module((x - mean) / std)
        y = (y if select is None else select(y)).float()
        y = F.normalize(y, dim=1) if normalize else y
        large = N * y.shape[1] > limit
        parts.append(y.half().cpu() if large else y)
    module.train(was_training)
    features = gather(torch.cat(parts)).unflatten(0, (W, -1))  # row i is on rank i % W
    features = features.transpose(0, 1).flatten(0, 1)[:N]
    file = vars(args).get("checkpoint") or vars(args).get("evaluate")
    check_finite(f"checkpoint {file}: its {what}" if file else what, features, module.state_dict(),
                 table, "" if file else f"; {_advice()}")
    return features


def check_finite(what, features, weights=(), table=None, hint=""):
    """RunFailed that says how many of the features (N, D), and which weight, are not finite."""
    good = [part.isfinite().all(1) for part in features.split(2 ** 16)]
    bad = (~torch.cat(good)).nonzero().flatten().tolist()
    names = [name for name, x in dict(weights).items() if not x.isfinite().all()]
    texts = [f"{len(bad)} of {len(features)} rows"] * bool(bad) + names[:1]
    if bad and table:
        name = table.paths[bad[0]] if table.paths else f"row {table.index[bad[0]]}"
        texts[0] += f" (the first: {name})"
    if texts:
        raise RunFailed(f"{what} are not finite: {', '.join(texts)}{hint}")


@torch.no_grad()
def top_k(query, bank, k, own=None, chunk=2 ** 25):
    """The k most similar bank rows of every query (dot product), by blocks of bounded memory:
    similarities (Q, k) in descending order and rows (Q, k) int64.

    Args: query (Q, D); bank (N, D), any device or dtype, moved block by block; own (Q,) int64, the
    bank row of the query itself, which is left out, or None; chunk: similarities at a time.
    """
    Q, N = len(query), len(bank)
    if not 0 < k <= N - (own is not None):
        raise BadInput(f"{k} neighbours asked for, the bank has {N - (own is not None)} rows")
    columns = min(N, max(k, 2 ** 14))
    rows = max(1, chunk // columns)
    nearest = [[] for _ in range(0, Q, rows)]
    for start in range(0, N, columns):  # the bank outermost: a block is moved once
        block = bank[start:start + columns].to(query.device, query.dtype)
        for i, q in enumerate(range(0, Q, rows)):
            sims = query[q:q + rows] @ block.T
            if own is not None:
                at = own[q:q + rows] - start
                inside = ((at >= 0) & (at < len(block))).nonzero().flatten()
                sims[inside, at[inside]] = -math.inf
            best, at = sims.topk(min(k, len(block)), dim=1)
            at = at + start
            if nearest[i]:
                best, at = (torch.cat(pair, 1) for pair in zip(nearest[i], (best, at)))
                best, order = best.topk(k, dim=1)
                at = at.gather(1, order)
            nearest[i] = (best, at)
    return torch.cat([s for s, _ in nearest]), torch.cat([r for _, r in nearest])


def knn_scores(query, bank, bank_labels, classes, k=200, t=0.07):
    """Class scores of the weighted kNN: score_c = sum over the k nearest of class c exp(sim / t).

    Args: query (Q, D), bank (N, D), unit-norm rows; bank_labels (N,) int64 in 0..classes-1.
    Returns: (Q, classes), dtype of query, divided by the weight of the nearest row.
    """
    sims, rows = top_k(query, bank, min(k, len(bank)))
    weights = ((sims - sims[:, :1]) / t).exp()
    scores = sims.new_zeros(len(query), classes)
    return scores.scatter_add_(1, bank_labels.to(rows.device)[rows], weights)


def _from_0(*labels):
    """The label tensors with their values numbered from 0, in order, and the number of values."""
    values, ids = torch.cat(labels).unique(return_inverse=True)
    return ids.split([len(y) for y in labels]), len(values)


def knn_top1(query, y_query, bank, y_bank, args):
    """Percent of the queries (Q, D) that the weighted kNN in bank (N, D), both unit-norm, gets
    right; labels (Q,), (N,) are int64. The ranks share the queries."""
    own, (y_bank, y_query), classes = slice(rank(), None, world()), *_from_0(y_bank, y_query)
    scores = knn_scores(query[own], bank, y_bank, classes, args.knn_k, args.knn_t)
    right = (scores.argmax(1) == y_query[own].to(scores.device)).sum()
    return 100 * all_reduce_sum(right).item() / len(query)


def knn_queries(args, test):
    """Rows of the test table that the kNN of a training classifies: those with a label, or, of more
    than --knn-queries, that many, class-balanced, by seed."""
    labels = test.column(args.label)
    rows, most = (labels >= 0).nonzero().flatten(), args.knn_queries
    return rows if len(rows) <= most else rows[balanced_rows(labels[rows], most, args.seed)]


def knn_accuracy(module, data, select=None):
    """Top-1 accuracy in percent of the weighted kNN, labelled test rows in labelled training rows;
    None if only one class occurs. select: see `extract_features`."""
    args = data.args
    rows = knn_queries(args, data.test)
    test = data.test.select(rows) if len(rows) < len(data.test) else data.test
    y_bank, y_query = (t.column(args.label).to(data.device) for t in (data.train, test))
    if y_bank[y_bank >= 0].unique().numel() < 2 or not len(rows):
        return None
    bank, query = (extract_features(module, data, t, select=select, normalize=True)
                   for t in (data.train, test))
    return knn_top1(query.float().to(data.device), y_query, *labelled_rows(bank, y_bank), args)


def labelled_rows(x, ids):
    """Rows of x with an id, and the ids; no copy of a large x where all have one."""
    keep = ids >= 0
    return (x, ids) if keep.all() else (x[keep.to(x.device)], ids[keep])


def retrieval(query, query_labels, bank=None, bank_labels=None, ks=(1, 5, 10, 20)):
    """R@k: share of queries with a row of their class among the k nearest; and mAP@R; percent.

    mAP@R: mean over queries of 1/R sum_{i <= R} (precision at i, where row i is right), R the
    number of right rows in the bank. A query whose class is not in the bank counts 0 in R@k and is
    left out of mAP@R. The ranks share the queries. Without a bank, the other queries are the bank.
    Args: query (Q, D) and bank (N, D), unit-norm rows; labels (Q,), (N,) int64.
    """
    alone = bank is None
    bank, bank_labels = (query, query_labels) if alone else (bank, bank_labels)
    (bank_labels, query_labels), classes = _from_0(*(y.to(query.device) for y in (
        bank_labels, query_labels)))
    R = torch.bincount(bank_labels, minlength=classes)[query_labels] - int(alone)  # (Q,)
    if max(ks) > len(bank) - alone:
        raise BadInput(f"R@{max(ks)} asks for more rows than the bank has ({len(bank) - alone})")
    depth = int(max(max(ks), R.max()))
    place = torch.arange(1, depth + 1, device=query.device)
    sums = torch.zeros(len(ks) + 2, dtype=torch.float64, device=query.device)
    mine = torch.arange(rank(), len(query), world(), device=query.device)
    for q in mine.split(max(1, 2 ** 25 // depth)):  # depth is large where a class is
        _, rows = top_k(query[q], bank, depth, q if alone else None)
        right = bank_labels[rows] == query_labels[q, None]  # (q, depth)
        for i, k in enumerate(ks):
            sums[i] += right[:, :k].any(1).sum()
        precision = right.cumsum(1) / place * (right & (place <= R[q, None]))
        has = R[q] > 0
        sums[-2] += (precision.double().sum(1)[has] / R[q][has]).sum()
        sums[-1] += has.sum()
    *hits, average, counted = all_reduce_sum(sums).tolist()
    result = {f"R@{k}": 100 * n / len(query) for k, n in zip(ks, hits, strict=True)}
    return {**result, "mAP@R": 100 * average / max(1, counted)}


def accuracy(logits, target, topk=(1,)):
    """Percent of rows whose target is among the k highest logits, for each k (at most C)."""
    best = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices
    right = best == target[:, None]
    return [100 * right[:, :k].any(1).double().mean().item() for k in topk]


def check_writable(path, hint):
    """BadInput with the hint unless a file can be written to the path."""
    above = next(p for p in Path(path).absolute().parents if p.exists())
    if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"{path} cannot be written; {hint}")


def check_results(path, args, free=()):
    """BadInput if the JSON file of results cannot be written, or holds those of other flags than
    these; `free` flags may differ."""
    check_writable(path, "use another --out")
    if path.exists():
        try:
            old = json.loads(path.read_text())
            if old["script"] != f"{args.method}.py":
                raise ValueError("a file of another script")
            changed = changed_flags(old["args"], flags_dict(args), (
                *free, "device", *{*FREE_FLAGS} - {"data_dir"}))  # another folder: other data
        except (OSError, ValueError, KeyError, TypeError):
            raise BadInput(f"{path} is no file of this script; use another --out") from None
        if changed:
            raise BadInput(f"{path} holds results with other flags ({', '.join(changed)}); use "
                           "another --out")


def start_evaluation(args, checkpoint):
    """What every evaluation begins with. Returns: record, a dict of what is known about the run;
    path of the results; device; the backbone there; lines that describe it. BadInput if the path
    cannot be written or holds the results of another run."""
    folder = Path(args.checkpoint).parent
    if args.checkpoint == "none":
        folder = Path(f"runs/untrained-{args.arch}-{args.dataset}-seed{args.seed}")
    recipe = "features" if vars(args).get("mode") == "features" else args.recipe
    names = args.method, recipe, args.label, *Path(args.checkpoint).stem.split("-")[1:]
    path = Path(args.out or folder / f"{'-'.join(names)}.json")  # -0050 of checkpoint-0050.pt
    check_results(path, args, ["save", "features", "features_type", "embedding"])
    ours, script = checkpoint if is_ours(checkpoint) else {}, f"{args.method}.py"
    record = dict(script=script, command=shlex.join([script, *args.argv]), seconds=time.time(),
                  checkpoint=args.checkpoint, method=ours.get("method"), step=ours.get("step"),
                  label=args.label, seed=args.seed, args=flags_dict(args))
    device = setup(args)
    _open.close()  # nothing to save: a signal ends the program at once
    if args.checkpoint == "none":
        backbone, loaded = resnet(args.arch, args.stem), dict(arch=args.arch, stem=args.stem)
        description = f"untrained {args.arch}, {args.stem} stem, seed {args.seed}"
    else:
        backbone, loaded = load_backbone(args.checkpoint, checkpoint, args.arch, args.stem)
        description = describe_weights(args.checkpoint, loaded)
    if taken := [f"{flag_name(k)} {shown(getattr(args, k))}" for k, by in args.set_by.items()
                 if by == "the checkpoint" and getattr(args, k) is not None]:
        description += f"\nfrom the checkpoint, as not typed: {', '.join(taken)}"
    record["backbone"] = loaded
    backbone = backbone.to(device, memory_format=memory_format(args)).eval()
    return record, path, device, backbone, description


def write_results(path, record, device, **results):
    """Save the record of `start_evaluation` with the results as JSON."""
    record.update(results, **environment(device),
                  seconds=round(time.time() - record["seconds"], 1))
    atomic_write(path, lambda file: file.write(f"{json.dumps(record, indent=1)}\n".encode()))


# ---------------------------------------------------------------------------------- flags


def check_ranges(args, above=(), least=(), share=()):
    """BadInput unless the named flags are None, or finite and above 0, at least 0, in [0, 1]."""
    for names, good, text in ((above, lambda x: 0 < x < math.inf, "above 0"),
                              (least, lambda x: 0 <= x < math.inf, "at least 0"),
                              (share, lambda x: 0 <= x <= 1, "in [0, 1]")):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not good(value):  # `not good` also refuses NaN
                raise BadInput(f"{flag_name(name)} must be {text}, got {value}")


def check_views(args, crop="crop", jitter="jitter"):
    """BadInput unless these flags are two shares of the area and four strengths of jitter."""
    (low, high), strength = getattr(args, crop), getattr(args, jitter)
    if not 0 < low <= high <= 1:
        raise BadInput(f"{flag_name(crop)} {low} {high}: two shares, 0 < low <= high <= 1")
    if not (min(strength) >= 0 and strength[3] <= 0.5):
        raise BadInput(f"{flag_name(jitter)} {strength}: none below 0, the hue at most 0.5")


def check_schedule(args, learning_rate, steps_per_epoch, warmup):
    """BadInput if `warmup` steps are more than all, or if the rate does not rise in them."""
    steps = args.epochs * steps_per_epoch
    if warmup > steps:
        raise BadInput(f"--warmup {args.warmup} is longer than the training (--epochs "
                       f"{args.epochs}{f', {steps} steps' * (warmup == args.warmup)}), so that the "
                       "learning rate never gets to its peak: take less, or 0")
    peak = max(learning_rate(step, steps_per_epoch, args)
               for step in range(0, steps, max(1, steps // 1000)))
    if warmup and peak < args.lr / 20:
        raise BadInput(f"--warmup {args.warmup} of --schedule {args.schedule} in {steps} steps: "
                       f"the rate never gets above {peak:.3g}; take more epochs, or another "
                       "schedule")


def reject_unused(args, names, why):
    """BadInput if one of these flags is written on the command line, where it would do nothing."""
    written = {word.split("=")[0] for word in args.argv}
    for name in names:
        if flag_name(name) in written:
            raise BadInput(f"{flag_name(name)} is not used {why}")


def check_files(args):
    """BadInput for a written flag that names files which --dataset does not read."""
    kind = re.match("[a-z]*", args.dataset)[0]
    unread, where = sorted(FILES - READS[kind]), f"by --dataset {args.dataset}"
    if kind == "shapes":
        where += ", which is built in: name another --dataset"
        unread = ["data_dir", *unread]
    if args.method == "ood_eval":  # whose outliers may need these
        unread = [name for name in unread if name not in ("data_dir", "download")]
    reject_unused(args, unread, where)


def flag_name(name):
    """--batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def origin(args, text):
    """Who set the flags that a message names but nobody typed, as text to append to it."""
    found = []
    for name, by in args.set_by.items() if args else ():
        flag = f"{flag_name(name)} {shown(getattr(args, name))}"
        if re.search(rf"{re.escape(flag_name(name) if by else flag)}(?![\w.-])", text):
            found.append(f"{flag} comes from {by}" if by else f"{flag} is the default")
    return f" ({'; '.join(found)})" if found else ""


def shown(value):
    """The value of a flag as it is typed; "-" for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


class Parser(argparse.ArgumentParser):
    """argparse with the flags that all methods share; --recipe sets defaults, a flag overrides.
    Without --recipe it is `demo`, or `own` for another data set than the demo's, if there is one.
    """

    trains = True  # --out is the folder of a run
    args = None  # the flags, once they are parsed
    inherited = {}  # flag -> who set its default, other than the recipe

    def __init__(self, method, doc, recipes):
        super().__init__(prog=f"{method}.py", description=doc, allow_abbrev=False, add_help=False)
        self.method, self.recipes = method, recipes
        add = self.add_argument_group("run").add_argument
        add("-h", "--help", action="store_true", help="this text, for any --recipe")
        add("--recipe", help="a set of values; flags override it")
        add("--out", help="run folder; an unfinished run goes on")
        add("--seed", type=int, default=0, help="of the weights and of every random draw")
        add("--device", default="auto", choices=["auto", "cpu", "cuda"])
        add("--threads", type=int, default=0, help="CPU threads; 0: OMP_NUM_THREADS, or all")
        add("--log-every", type=int, default=50, help="steps; a line at every epoch's end too")
        add("--knn-every", type=int, default=5, help="epochs between kNN evaluations")
        add("--save-every", type=int, default=1, help="epochs between checkpoints")
        add("--keep-every", type=int, help="epochs between checkpoints that are kept")
        add("--knn-k", type=int, default=200, help="K of the weighted kNN")
        add("--knn-t", type=float, default=0.07, help="T of the weighted kNN")
        on_off = dict(action=argparse.BooleanOptionalAction, default=False)
        add = self.add_argument_group("data").add_argument
        add("--dataset", default="shapes", choices=list(SOURCES))
        add("--data-dir", default="data", help="folder of the data set")
        add("--download", action="store_true", help="let torchvision fetch CIFAR or STL-10")
        add("--train-file", help="csv, npz, captions: training file below --data-dir")
        add("--test-file", help="csv, npz, captions: test file below --data-dir")
        add("--image-root", nargs="+", default=[""], help="captions: image folder, or one a split")
        add("--classes", help="folder: file of the class folders to use, one a line")
        add("--label", default="label", help="column that evaluation uses")
        add("--limit-train", type=int, help="use N training images, class-balanced, by seed")
        add("--workers", type=int, default=min(8, cpus()), help="readers a process")
        add("--image-size", type=int, default=32, help="S, pixels")
        add("--mean", type=float, nargs=3, help="of the channels (default: the data set's)")
        add("--std", type=float, nargs=3, help="of the channels (default: the data set's)")
        add = self.add_argument_group("augmentation").add_argument
        add("--crop", type=float, nargs=2, default=[0.2, 1.0], help="share of the image's area")
        add("--jitter", type=float, nargs=4, default=[0.4, 0.4, 0.4, 0.1],
            help="brightness, contrast, saturation, hue")
        add("--jitter-p", type=float, default=0.8, help="probability of colour jitter")
        add("--gray", type=float, default=0.2, help="probability")
        add("--blur", type=float, default=0.0, help="probability; sigma uniform in 0.1 to 2")
        add("--solarize", type=float, default=0.0, help="probability")
        add("--erase", type=float, default=0.0, help="probability of an erased rectangle")
        add("--randaugment", type=int, nargs=2, metavar=("N", "M"),
            help="N operations of magnitude M <= 10 (folder, csv)")
        add = self.add_argument_group("network and optimisation").add_argument
        add("--arch", default="resnet-tiny", choices=list(ARCHS))
        add("--stem", default="imagenet", choices=["cifar", "imagenet"], help="3x3; 7x7, max-pool")
        if self.trains and method not in ("common", "sogclr_clip"):
            add("--init", metavar="FILE", help="begin with these weights; torchvision: its own")
            add("--knn-queries", type=int, default=10000, help="test images of the kNN, at most")
        add("--epochs", type=int, default=20, help="passes over the training images")
        add("--batch-size", type=int, default=256, help="B, over all processes")
        add("--micro-batch", type=int, metavar="N", help="images through the network at a time")
        add("--optimizer", default="sgd", choices=["sgd", "lars", "adamw"])
        add("--lr", type=float, default=0.5, help="peak learning rate")
        add("--momentum", type=float, default=0.9, help="of sgd and lars")
        add("--nesterov", **on_off, help="Nesterov momentum (sgd)")
        add("--weight-decay", type=float, default=1e-4, help="L2 penalty; AdamW: decoupled")
        add("--amp", default="none", choices=["none", "bf16", "fp16", "auto"],
            help="mixed precision; auto: bf16 on CUDA")
        add("--sync-bn", **on_off, help="SyncBatchNorm on CUDA")
        add("--channels-last", **on_off, help="memory format of the convolutions")
        add("--compile", action="store_true", help="torch.compile")

    def error(self, message):
        """One line instead of argparse's usage page."""
        raise BadInput(message)

    def complete(self, args):
        """Fill in defaults that depend on other flags (methods replace it)."""

    def format_help(self, width=100):
        """The docstring, the recipes, and one line for each flag: its value in force, and help."""
        wrap = functools.partial(textwrap.wrap, width=width, break_on_hyphens=False,
                                 subsequent_indent="    ")
        lines = [f"usage: {self.prog} [--recipe NAME] [--FLAG VALUE ..]", "",
                 self.description.strip(), "", *wrap(f"recipes: {', '.join(self.recipes)}"), "",
                 f"Each flag with its value under --recipe {self.args.recipe} (no: --no-FLAG):"]
        for group in filter(lambda g: g._group_actions, self._action_groups):
            rows, too_long = [], []
            for a in group._group_actions:
                flag = next(name for name in a.option_strings if name.startswith("--"))
                choices = " | ".join(a.choices or ())
                start = f"  {flag:20} {shown(vars(self.args)[a.dest]):15}  "
                line = start + "; ".join(filter(None, [choices, a.help]))
                if len(line) > width and choices:
                    line = start + (a.help or "see below")
                    too_long += wrap(f"  values of {flag}: {choices}")
                rows.append(line if len(line) <= width else f"{line[:width - 3]}...")
            lines += ["", f"{group.title}:", *rows, *too_long]
        return "\n".join([*lines, ""])

    def parse_args(self, argv=None):
        """Flags over recipe over defaults; checks the shared ones."""
        argv = sys.argv[1:] if argv is None else list(argv)
        given = self.parse_known_args(argv)[0]
        if empty := [k for k, v in vars(given).items() if v == "" and k != "picture"]:
            raise BadInput(f"{flag_name(empty[0])} is empty: name a value, or leave the flag out")
        own = "own" in self.recipes and not given.dataset.startswith("shapes")
        name = given.recipe or ("own" if own and not vars(given).get("evaluate") else "demo")
        if name not in self.recipes:
            raise BadInput(f"--recipe {name}: there are {', '.join(self.recipes)}")
        typed = collections.Counter(word.split("=")[0] for word in argv)
        for a in self._actions:
            if a.nargs == "+" and sum(typed[flag] for flag in a.option_strings) > 1:
                raise BadInput(f"{a.option_strings[0]} is written twice: write all its values "
                               "after one")
        self.set_defaults(**self.recipes[name], recipe=name)
        self.args = args = super().parse_args(argv)
        words = {word.split("=")[0] for word in argv}
        args.set_by = {a.dest: self.inherited.get(a.dest) for a in self._actions
                       if not words.intersection(a.option_strings)}
        args.set_by |= {k: f"--recipe {name}" for k in self.recipes[name] if k in args.set_by}
        args.method, args.argv = self.method, argv
        if name == "own":
            there = args.dataset in MEAN_STD and args.dataset != "captions"
            name += f"-{args.dataset if there else Path(args.data_dir).resolve().name}"
        if self.trains:
            args.out = args.out or f"runs/{args.method}-{name}-seed{args.seed}"
        self.complete(args)
        if args.help:
            print(self.format_help(), end="")
            raise SystemExit(0)
        del args.help, args.set_by["help"]
        check_ranges(args, above=["epochs", "batch_size", "micro_batch", "image_size", "log_every",
                                  "knn_every", "save_every", "keep_every", "knn_k", "knn_t",
                                  "knn_queries"],
                     least=["seed", "threads", "workers", "lr", "weight_decay"],
                     share=["momentum", "jitter_p", "gray", "blur", "solarize", "erase"])
        if args.seed >= 2 ** 63 or args.momentum == 1:
            raise BadInput("--seed must be below 2^63, and --momentum below 1")
        check_views(args)
        if args.randaugment and not (args.randaugment[0] >= 0 and 0 <= args.randaugment[1] <= 10):
            raise BadInput(f"--randaugment {args.randaugment}: N at least 0, M in 0 to 10")
        if not all(0 <= value <= 1 for value in args.mean or []) or not all(
                0 < value <= 1 for value in args.std or []):
            raise BadInput(f"--mean {args.mean} --std {args.std}: of images in [0, 1], std above 0")
        if args.micro_batch and args.sync_bn:
            raise BadInput("--micro-batch does not go with --sync-bn, which normalises the whole "
                           "batch at once: add --no-sync-bn")
        if args.optimizer == "sgd" and args.nesterov and args.momentum == 0:
            raise BadInput("--nesterov needs --momentum above 0")
        unused = dict(sgd=[], lars=["nesterov"], adamw=["nesterov", "momentum"])[args.optimizer]
        reject_unused(args, unused, f"by --optimizer {args.optimizer}")
        if args.arch == "resnet-tiny" and args.stem == "cifar":
            reject_unused(args, ["stem"], "by --arch resnet-tiny")
        if not vars(args).get("evaluate"):  # which may take the data set of its checkpoint
            check_files(args)
        if self.trains and Path(args.out).is_file():
            raise BadInput(f"--out {args.out} is a file; name a folder")
        return args


# flags that mean nothing where no network is trained
TRAINING = ("lr", "weight_decay", "nesterov", "micro_batch", "sync_bn", "compile", "crop", "jitter",
            "jitter_p", "gray", "blur", "solarize", "erase", "randaugment")


class EvaluationParser(Parser):
    """The shared flags; a checkpoint of this project gives their defaults."""

    trains = False

    def __init__(self, method, doc, recipes):
        super().__init__(method, doc, recipes)
        self.conflict_handler = "resolve"  # --out is one file here, not the folder of a run
        add = self.add_argument_group("checkpoint and results").add_argument
        add("--checkpoint", help="file to evaluate; none: an untrained network")
        add("--out", help=f"JSON file ({method}-RECIPE-LABEL.json)")
        self.set_defaults(lr=1.0, **dict.fromkeys(  # None where the command line is silent
            ["recipe", "dataset", "arch", "stem", "lr_256", "fraction", "subset"]))

    def parse_args(self, argv=None):
        """Flag over recipe over checkpoint; self.checkpoint is the file's dict, {} for `none`."""
        given = self.parse_known_args(argv)[0]
        if given.checkpoint is None and not given.help:
            raise BadInput("name a --checkpoint FILE, or --checkpoint none")
        self.checkpoint = ({} if given.checkpoint in (None, "none") else
                           load_checkpoint(given.checkpoint))
        if given.recipe is None:
            if given.subset and given.fraction is None:
                raise BadInput("--subset needs a --recipe: semi-1, semi-10, or a probe")
            self.set_defaults(recipe="fast" if given.fraction is None else
                              "semi-1" if given.fraction < 0.05 else "semi-10")
        if is_ours(self.checkpoint):
            old = self.checkpoint["args"]
            keep = ["image_size", "seed", "knn_k", "knn_t", "channels_last", "mean", "std"]
            if given.dataset in (None, old["dataset"]):  # these mean nothing to another data set
                keep += ["dataset", "data_dir", "train_file", "test_file", "classes", "label",
                         "limit_train"]
            else:  # of the images that the network knows
                mean, std = MEAN_STD.get(old["dataset"], IMAGENET)
                old = old | dict(mean=old["mean"] or [*mean], std=old["std"] or [*std])
            self.set_defaults(**{k: old[k] for k in keep})
            self.inherited = dict.fromkeys(keep, "the checkpoint")
        if given.checkpoint == "none":  # else the weights tell
            self.set_defaults(arch="resnet-tiny", stem="imagenet")
        args = super().parse_args(argv)
        if args.set_by.get("limit_train") == "the checkpoint":
            args.drawn_by = old["label"], old["seed"]
        return args

    def complete(self, args):
        """The rate by --lr-256, and the data set."""
        if "lr" in args.set_by and args.lr_256:
            check_ranges(args, above=["lr_256"])
            args.lr = args.lr_256 * args.batch_size / 256
        reject_unused(args, ["log_every", "knn_every", "save_every", "keep_every"],
                      "by an evaluation")
        args.dataset = args.dataset or "shapes"
        if args.dataset not in SOURCES:
            raise BadInput(f"the checkpoint was trained on {args.dataset}: name a --dataset")


def main(argv=None):
    """`python common.py --picture FILE`: look at a data set and the views that a run trains with.
    --method NAME takes the recipes of that method; the other flags are those of its run."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--method", default="clinfonce")
    method = given.parse_known_args(argv)[0].method
    parser = Parser("common", "Save a sheet of images beside their augmented views.", {})
    add = parser.add_argument_group("picture").add_argument
    add("--picture", default="views.png", help="PNG file to write")
    add("--method", default="clinfonce", choices=METHODS, help="whose recipes")
    if method in METHODS:
        known = {a.dest for a in parser._actions}
        module = importlib.import_module(method)
        parser.recipes = {name: {k: v for k, v in flags.items() if k in known}
                          for name, flags in module.RECIPES.items()}

    def picture(args):
        data = load(args, setup(args))
        if method == "sogclr_clip":
            module.in_memory(data, data.train)
        views_picture(data, augmentation(args), args.picture)
        print(f"{len(data.train)} training and {len(data.test)} test images; columns "
              f"{', '.join(data.train.columns)}; {args.picture}")

    run(picture, parser, argv)


if __name__ == "__main__":
    main()
