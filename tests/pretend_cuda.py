"""A pretended GPU: the scripts run on a CPU, with real values, as if on one CUDA device.

    with pretend_cuda.one_gpu() as gpu:
        clinfonce.main([..., "--device", "cuda"])
    gpu.events  # every wait for the device and every copy, with its line

All tensors stay plain CPU tensors, so autograd, optimizers and torch.save work as they are. A
tensor is "on the GPU" if its storage carries a mark, which views, parameters and .data share. A
TorchFunctionMode sees every call of Python on tensors. It answers .device, turns device="cuda" into
the CPU, marks what comes out of a call with marked inputs, and raises what a GPU would raise.

It does not see C++ that looks at devices, the inside of a backward pass, kernels that a GPU lacks
for a dtype, several processes, memory or time.
"""
import collections
import contextlib
import linecache
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import common

CODE = Path(common.__file__).parent
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
Event = collections.namedtuple("Event", "kind what function site")
# kind: wait, or a copy that does not wait: from pageable or pinned memory, or fetched to the host

# Calls that make the host wait for the device in eager CUDA. A copy without non_blocking waits too.
WAITS = set("""item tolist __bool__ __int__ __float__ __index__ __complex__ is_nonzero nonzero
    argwhere masked_select bincount unique unique_consecutive _unique2 unique_dim equal allclose
    histc __repr__ linalg_eigh linalg_cholesky linalg_inv linalg_svd linalg_solve linalg_eigvalsh
    linalg_qr isin""".split())
# Kernels that take one number on the CPU (a tensor without dimensions) beside CUDA tensors.
TAKES_A_NUMBER = set("""add radd iadd sub rsub isub subtract mul rmul imul multiply div truediv
    rtruediv itruediv true_divide divide floordiv rfloordiv floor_divide remainder mod rmod fmod pow
    rpow ipow eq ne lt le gt ge maximum minimum fmax fmin where and rand iand or ror ior xor rxor
    ixor bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor masked_fill copysign
    xlogy""".split())
# Calls in which CPU and CUDA tensors may meet: none of them launches a kernel.
MEETING = set("""__set__ backward grad _has_compatible_shallow_copy_type swap_tensors set_ set_data
    is_same_size __hash__ result_type promote_types can_cast isinstance _make_subclass""".split())
# Calls that read no values, which a copy that is still under way may therefore see.
READS_NOTHING = MEETING | set("""size dim stride is_contiguous __len__ numel nelement data_ptr view
    detach expand unflatten transpose permute unbind split chunk unsqueeze squeeze is_pinned
    untyped_storage element_size is_floating_point __get__ storage_offset ndimension t""".split())
MATMUL = {"matmul", "__matmul__", "mm", "bmm", "mv", "linear", "__rmatmul__", "addmm", "baddbmm"}
OTHER_DEVICE = "Expected all tensors to be on the same device, but found at least two devices"


class DeviceError(RuntimeError):
    """What a GPU would raise."""


def mark(t, name):
    """A mark of the tensor's storage, False without one."""
    try:
        return getattr(t.untyped_storage(), name, False)
    except (RuntimeError, NotImplementedError):  # it has no storage
        return False


def on_gpu(t):
    """Whether a tensor is on the pretended GPU."""
    return mark(t, "on_gpu")


def tensors(x):
    """All tensors in nested lists, tuples, dicts and slices."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict, slice)):
        parts = x.values() if isinstance(x, dict) else x
        for y in (x.start, x.stop, x.step) if isinstance(x, slice) else parts:
            yield from tensors(y)


def put(x):
    """Mark all tensors in x as on the GPU; returns x."""
    for t in tensors(x):
        t.untyped_storage().on_gpu = True
    return x


def is_cuda(device):
    """Whether an argument names a CUDA device."""
    if isinstance(device, int):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class PretendedGPU(TorchFunctionMode):
    """The mode; `events` holds the waits and the copies between host and device."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.flying = []  # storages on the host whose copy from the device may be under way

    def site(self):
        """The innermost line of the project: its function; its file, number and text."""
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.parent == CODE:
                line = linecache.getline(str(path), frame.f_lineno).strip()
                return frame.f_code.co_name, f"{path.name}:{frame.f_lineno}  {line}"
            frame = frame.f_back
        return "", "outside the project"

    def note(self, kind, what):
        if kind == "wait":
            while self.flying:
                self.flying.pop().flying = False
        self.events.append(Event(kind, what, *self.site()))

    def note_copy(self, t, to_gpu, non_blocking, what):
        """One copy between host and device."""
        if not non_blocking:  # memcpy and synchronize
            self.note("wait", f"{what} to the {'device' if to_gpu else 'host'}")
        elif not to_gpu:  # torch pins the destination of .to("cpu", non_blocking=True)
            self.note("fetch", what)
        else:
            self.note("pinned" if mark(t, "pinned") else "pageable", what)

    def fail(self, text, kind=DeviceError):
        raise kind(f"{text} at {self.site()[1]}")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__":
            return self.attribute(func, *args)
        if name in ("to", "cuda", "cpu", "type_as"):
            return self.convert(func, name, args, kwargs)
        found = list(tensors((args, kwargs)))
        there, here = ([t for t in found if on_gpu(t) == side] for side in (True, False))
        if name == "get_device" and there:
            return 0
        if name not in READS_NOTHING and any(mark(t, "flying") for t in here):
            self.fail(f"{name} reads a copy to the host that is still under way")
        gpu = bool(there)
        if kwargs.get("device") is not None and (gpu := is_cuda(kwargs["device"])):
            kwargs["device"] = CPU
        if gpu and name in ("tensor", "as_tensor", "asarray", "new_tensor"):
            if name == "new_tensor" or not there:
                self.note("wait", f"{name} to the device")
        elif name == "tensor" and there and not isinstance(args[0], torch.Tensor):
            self.note("wait", "tensor of numbers on the device")
        if gpu and kwargs.get("generator") is not None:
            self.fail(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        if there:
            self.check(name, args, kwargs, there, here)
            self.note_waits(name, args, kwargs)
        out = func(*args, **kwargs)
        if gpu:
            host = {t.untyped_storage()._cdata for t in here}
            put([t for t in tensors(out) if t.untyped_storage()._cdata not in host])
        return out

    def attribute(self, func, t, *more):
        """t.device and the like."""
        if not isinstance(t, torch.Tensor) or not on_gpu(t):
            return func(t, *more)
        answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        name = getattr(func.__self__, "__name__", "")
        return answers[name] if name in answers else put(func(t, *more))

    def convert(self, func, name, args, kwargs):
        """.to, .cuda, .cpu, .type_as: a copy if the side changes."""
        t, source, rest = args[0], on_gpu(args[0]), list(args[1:])
        if mark(t, "flying"):
            self.fail(f"{name} reads a copy to the host that is still under way")
        device = {"cuda": CUDA, "cpu": CPU}.get(name, kwargs.get("device"))
        non_blocking = kwargs.get("non_blocking", False)
        for i, a in enumerate(rest):
            if isinstance(a, torch.Tensor):
                device = CUDA if on_gpu(a) else CPU
            elif isinstance(a, bool):
                non_blocking = a
            elif isinstance(a, (str, torch.device)) or isinstance(a, int) and name == "to":
                device, rest[i] = a, CPU if is_cuda(a) else a
        target = source if device is None else is_cuda(device)
        if target and "device" in kwargs:
            kwargs["device"] = CPU
        out = t if name == "cuda" else func(t, *rest, **kwargs)
        if out.device.type == "meta" or target == source:
            return put(out) if target and out.device.type != "meta" else out
        if out.untyped_storage()._cdata == t.untyped_storage()._cdata:
            out = out.clone()  # keeps strides and gradient
        self.note_copy(t, target, non_blocking, name)
        if source and non_blocking:
            out.untyped_storage().flying = True
            self.flying.append(out.untyped_storage())
        return put(out) if target else out

    def check(self, name, args, kwargs, there, here):
        """Raise what a GPU would raise."""
        if name in ("numpy", "__array__"):
            self.fail("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first",
                      TypeError)
        if name in MATMUL and not there[0].is_floating_point():
            self.fail(f'"addmm_cuda" not implemented for {there[0].dtype}', NotImplementedError)
        if name == "copy_":
            source = args[1] if len(args) > 1 else kwargs["src"]
            if on_gpu(args[0]) != on_gpu(source):
                later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
                self.note_copy(source, on_gpu(args[0]), later, name)
            return
        if not here or name in MEETING:
            return
        if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            index, value = list(tensors(args[1])), list(tensors(args[2:]))
            if not on_gpu(args[0]) and any(on_gpu(t) for t in index if t.dim()):
                self.fail("indices should be either on cpu or on the same device as the indexed "
                          "tensor (cpu)")
            if any(on_gpu(t) != on_gpu(args[0]) and t.dim() for t in value):
                if index or isinstance(args[1], list):
                    self.fail(f"{OTHER_DEVICE}: {name}")
                self.note_copy(value[0], on_gpu(args[0]), False, name)
            return
        into_host = name.endswith("_") and not name.endswith("__") and not on_gpu(args[0]) and (
            not isinstance(args[0], (list, tuple)))
        word = name.strip("_")
        takes_a_number = word in TAKES_A_NUMBER or word.startswith(("foreach_", "fused_"))
        if any(t.dim() for t in here) or into_host or not takes_a_number:
            self.fail(f"{OTHER_DEVICE}, cuda:0 and cpu! ({name}, {[tuple(t.shape) for t in here]} "
                      "on cpu)")

    def note_waits(self, name, args, kwargs):
        """Note what makes the host wait."""
        if name in WAITS or name == "__format__" and args[0].dim() == 0:
            self.note("wait", name)
        elif name in ("__getitem__", "__setitem__") and on_gpu(args[0]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = list(tensors(parts))
            masks = [t for t in index if t.dtype in (torch.bool, torch.uint8)]
            number = name == "__setitem__" and (not isinstance(args[2], torch.Tensor)
                                                or not args[2].dim() and not on_gpu(args[2]))
            if masks and not number:
                self.note("wait", f"mask in {name}")
            if any(on_gpu(t) and not t.dim() and t.dtype not in (torch.bool, torch.uint8)
                   for t in index):
                self.note("wait", f"number on the device as index in {name}")
            for t in index:
                if t.dim() and not on_gpu(t):
                    self.note_copy(t, True, False, f"index on the CPU in {name}")
            if any(isinstance(p, list) for p in parts):
                self.note("wait", f"list as index in {name}")
            if number and not masks and any(t.dim() for t in index):
                self.note("wait", "number into an indexed tensor")
        elif name == "where":
            if len(args) == 1 and not kwargs:
                self.note("wait", "where of one argument")
            for t in tensors(args):
                if not on_gpu(t):
                    self.note_copy(t, True, False, "number on the CPU in where")
        elif name in ("masked_fill", "masked_fill_", "index_fill", "index_fill_"):
            if isinstance(args[-1], torch.Tensor) and on_gpu(args[-1]) and len(args) > 2:
                self.note("wait", f"value of {name}")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None and (
                len(args) < 2 or isinstance(args[1], torch.Tensor)):
            self.note("wait", name)
        elif name == "one_hot" and len(args) < 2 and kwargs.get("num_classes", -1) == -1:
            self.note("wait", name)


class CPUAutocast(torch.amp.autocast_mode.autocast):
    """autocast of the CPU where CUDA's is asked for."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def pinned(x):
    """Mark all tensors in x as pinned; returns x."""
    for t in tensors(x):
        t.untyped_storage().pinned = True
    return x


class PinningLoader(torch.utils.data.DataLoader):
    """DataLoader that marks its batches where a real one would pin them."""

    def __init__(self, *args, pin_memory=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.pins = pin_memory

    def __iter__(self):
        return map(pinned, super().__iter__()) if self.pins else super().__iter__()


def by_pretended_device(real):
    """Optimizer._group_tensors_by_device_and_dtype, whose C++ sees the CPU."""
    def group(lists, *args, **kwargs):
        return {(CUDA if any(map(on_gpu, tensors(value[0]))) else device, dtype): value
                for (device, dtype), value in real(lists, *args, **kwargs).items()}
    return staticmethod(group)


@contextlib.contextmanager
def one_gpu():
    """Inside there is one GPU; yields the PretendedGPU."""
    def nothing(*args, **kwargs):
        return None

    fakes = dict(is_available=lambda: True, device_count=lambda: 1, is_initialized=lambda: True,
                 current_device=lambda: 0, get_device_name=lambda *a: "pretended GPU",
                 max_memory_allocated=lambda *a: 0, memory_allocated=lambda *a: 0,
                 is_current_stream_capturing=lambda: False, is_bf16_supported=lambda *a: True,
                 **dict.fromkeys(["set_device", "synchronize", "empty_cache", "_lazy_init",
                                  "reset_peak_memory_stats", "manual_seed", "manual_seed_all"],
                                 nothing))
    optimizer = torch.optim.Optimizer
    patches = [(torch.cuda, fakes), (torch.utils.data, dict(DataLoader=PinningLoader)),
               (torch.Tensor, dict(pin_memory=lambda t: pinned(t.clone()),
                                   is_pinned=lambda t: mark(t, "pinned"))),
               *((place, dict(autocast=CPUAutocast))
                 for place in (torch, torch.amp, torch.amp.autocast_mode)),
               (optimizer, {name: nothing for name in (  # they ask C++ for the current stream
                   "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
                            if hasattr(optimizer, name)}),
               (optimizer, dict(_group_tensors_by_device_and_dtype=by_pretended_device(
                   optimizer._group_tensors_by_device_and_dtype)))]
    benchmark = torch.backends.cudnn.benchmark
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, torch.backends.cudnn, "benchmark", benchmark)
        for place, names in patches:
            for name, fake in names.items():
                stack.enter_context(mock.patch.object(place, name, fake))
        yield stack.enter_context(PretendedGPU())
