"""A GPU that is not there: tensors that compute on the CPU and hold to the rules of another device.

    with pretend_gpu.pretend(capability=(7, 5)): ...

What a GPU would refuse is refused: operations on tensors of two devices, `.numpy()` of a tensor
that is not on the CPU, a generator of another device, on MPS float64. Everything else gives true
values, so that whole trainings, notebooks and resumed runs can be rehearsed. `waits` counts what a
GPU has to be waited for. Not rehearsed: its own kernels, its speed, its memory, its asynchrony.

How: a `TorchFunctionMode` sees each call of torch, brings its `device=` back to the CPU and changes
the class of the results to one whose `device` says what was asked for. (FakeTensorMode has no
values and no `.item()`, its modules can't be moved by `.to`, and its backward needs a driver.)
"""

import collections
import contextlib
import functools
import itertools
import sys
import types
from unittest import mock

import torch
import torch._dynamo  # now, since its import looks at what is replaced below
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
KIND = "cuda"  # or "mps"
waits = collections.Counter()  # how often which function was asked for something of the device

MOVES = {"to", "cuda", "mps", "cpu", "type_as"}
MIXED = {"copy_", "_has_compatible_shallow_copy_type", "data"}  # take tensors of two devices
ASKS = {"item", "tolist", "nonzero", "equal", "__bool__", "__float__", "__int__"}
STRICT = {"cat", "concat", "stack"}  # and what begins with _fused_: there, numbers count too


class Pretend(torch.Tensor):
    """A tensor of the CPU that says it lies on another device: one of `marked`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs)  # where no mode is active

    def get_device(self):
        return self.device.index

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def __reduce_ex__(self, protocol):  # pickled as what it is
        return mark(self.detach(), CPU, isinstance(self, nn.Parameter)).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = mark(self.detach().clone(), self.device, isinstance(self, nn.Parameter))
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]


@functools.cache
def marked(device, parameter):
    """The class of the tensors, or parameters, that say they lie on `device`."""
    base = nn.Parameter if parameter else torch.Tensor
    return type(base)(f"On_{device.type}{device.index}_{base.__name__}", (Pretend, base), {
        "device": property(lambda self: device), "is_cuda": device.type == "cuda",
        "is_mps": device.type == "mps", "is_cpu": False,
    })


def mark(tensor, device, parameter=None):
    """Has the tensor say that it lies on `device`. The object stays the same."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if device.type == "mps" and tensor.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                        "support float64. Please use float32 instead.")
    parameter = isinstance(tensor, nn.Parameter) if parameter is None else parameter
    plain = nn.Parameter if parameter else torch.Tensor
    tensor.__class__ = plain if device == CPU else marked(device, parameter)
    return tensor


def place(device):
    """The torch.device, with its number; None for "as it is"."""
    device = device if device is None else torch.device(device)
    bare = device is not None and device.type == KIND and device.index is None
    return torch.device(KIND, 0) if bare else device


def refuse_mixture(name, args, tensors):
    """Raises what a GPU's operation would for tensors of several devices."""
    if name in MIXED:
        return
    strict = name in STRICT or name.startswith("_fused_")
    devices = {t.device for t in tensors if strict or t.dim() or isinstance(t, Pretend)}
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i")
    if in_place and isinstance(args[0], torch.Tensor):
        devices.add(args[0].device)
    if name in ("__getitem__", "__setitem__"):  # indices may lie on the CPU, values not
        strangers = {t.device for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)}
        devices = {args[0].device} | (strangers - {CPU})
        value = args[2] if name == "__setitem__" else None
        if strangers and isinstance(value, torch.Tensor) and value.dim():
            devices.add(value.device)
    if len(devices) > 1:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, {' and '.join(sorted(map(str, devices)))}! (in {name})")


def call(function, args, kwargs):
    """What a function of torch gives, on the device where it would have computed it."""
    with torch._C.DisableTorchFunctionSubclass():
        return _call(function, args, dict(kwargs or {}))


def _call(function, args, kwargs):
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = function.__self__.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = next((t.device for t in tensors if isinstance(t, Pretend)), None)
    target = here or CPU
    if name in ("numpy", "__array__") and here:
        raise TypeError(f"can't convert {here} device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")
    if name in ("pin_memory", "is_pinned"):
        return args[0] if name == "pin_memory" else False
    if name in MOVES:
        target, rest = args[0].device, []
        for each in args[1:] if name in ("to", "type_as") else (name,):
            if isinstance(each, (str, torch.device)):
                target, each = place(each), CPU
            elif isinstance(each, torch.Tensor):
                target = each.device
            rest.append(each)
        function = function if name == "type_as" else torch.Tensor.to
        args, target = (args[0], *rest), place(kwargs.pop("device", None)) or target
    else:
        if kwargs.get("device") is not None:
            target, kwargs["device"] = place(kwargs["device"]), CPU
        if here:
            refuse_mixture(name, args, tensors)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"Expected a '{target.type}' device type for generator but found "
                               f"'{generator.device.type}' (in {name})")
    out = function(*args, **kwargs)
    if name in MOVES and target != args[0].device:
        if not kwargs.get("non_blocking") and not any(each is True for each in args):
            waits[f"{name} {target.type}"] += 1  # numbers that come from the CPU are waited for too
        if out is args[0]:
            out = out.clone()  # it has to be copied to get there
    if name in ASKS and here or name == "tensor" and target != CPU:
        waits[name] += 1
    if name == "data" and len(args) > 1:  # set: the parameter goes where its new data are
        mark(args[0], args[1].device)
    if target == CPU and not here:
        return out
    old = {id(t) for t in tensors}
    return tree_map(lambda t: t if id(t) in old else mark(t, target), out)


class Everywhere(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.where = place(device)
        return self

    device = property(lambda self: self.where)


class Autocast(torch.autocast):
    """Of the CPU, in bfloat16: these CPUs are slow in float16."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == KIND:
            device_type, dtype = "cpu", torch.bfloat16 if dtype == torch.float16 else dtype
        super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


def group_tensors(lists, with_indices=False, *, real=torch._C._group_tensors_by_device_and_dtype):
    """torch's own, with the devices that the tensors name."""
    for column in itertools.zip_longest(*lists):
        if len({t.device for t in column if t is not None and t.dim()}) > 1:
            raise RuntimeError("Tensors of the same index must be on the same device")
    return {(next(t for each in found[0] for t in each if t is not None).device, dtype): found
            for (_, dtype), found in real(lists, with_indices).items()}


def load(file, map_location=None, *, real=torch.load, **how):
    out = real(file, map_location="cpu", **how)
    device = place(map_location) if isinstance(map_location, (str, torch.device)) else CPU
    return out if device == CPU else tree_map(lambda t: mark(t, device), out)


def nothing(*_, **__):
    return None


def forget():
    """Has Lightning look anew for Apple's GPU."""
    for part in ("fabric", "pytorch"):
        module = sys.modules.get(f"lightning.{part}.accelerators.mps")
        if module:
            getattr(module.MPSAccelerator.is_available, "cache_clear", nothing)()


@contextlib.contextmanager
def pretend(kind="cuda", capability=(8, 0), count=1):
    """Within, this machine seems to have `count` GPUs of that kind. `waits` begin anew."""
    global KIND
    KIND = kind
    waits.clear()
    cuda = kind == "cuda"
    silent = ("_lazy_init _lazy_call manual_seed manual_seed_all empty_cache synchronize "
              "set_device reset_peak_memory_stats")
    answers = {
        torch.cuda: dict(
            is_available=lambda: cuda, is_initialized=lambda: cuda, current_device=lambda: 0,
            device_count=lambda: count if cuda else 0,
            get_device_capability=lambda device=None: capability,
            get_device_name=lambda device=None: "no GPU at all",
            is_bf16_supported=lambda including_emulation=True: (
                including_emulation or capability >= (8, 0)),
            memory_allocated=lambda device=None: 0, max_memory_allocated=lambda device=None: 0,
            _is_in_bad_fork=lambda: False, is_current_stream_capturing=lambda: False,
            **dict.fromkeys(silent.split(), nothing),
        ),
        torch.backends.mps: dict(is_available=lambda: not cuda, is_built=lambda: not cuda),
        torch.accelerator: dict(
            current_accelerator=lambda check_available=False: torch.device(KIND),
            is_available=lambda: True, device_count=lambda: count, synchronize=nothing,
            current_device_index=lambda: 0, set_device_index=nothing,
            current_stream=lambda device=None: types.SimpleNamespace(is_capturing=lambda: False),
        ),
        torch._C: dict(_group_tensors_by_device_and_dtype=group_tensors),
        torch: dict(Generator=Generator, autocast=Autocast, load=load),
        torch.amp: dict(autocast=Autocast),
        sys.modules["torch.optim.optimizer"]: dict(_foreach_supported_types=[
            torch.Tensor, nn.Parameter,
            *(marked(torch.device(kind, i), p) for i in range(count) for p in (False, True)),
        ]),
    }
    with contextlib.ExitStack() as stack:
        for module, functions in answers.items():
            stack.enter_context(mock.patch.multiple(module, **functions))
        forget()
        stack.callback(forget)
        if not cuda:  # Lightning asks for it
            stack.enter_context(mock.patch("platform.processor", lambda: "arm"))
        stack.enter_context(Everywhere())
        yield
