"""Which device trains, in which precision, and what it is called."""

import ctypes
import os
import platform
import time

import torch

from utils import InputError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def cores():
    """How many cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_memory():
    """Has this process keep the memory that it frees, for its next step.

    The C library gives large blocks back to the system, which fills them with zeros before they
    can be used again. On Linux with glibc, until the process ends; elsewhere it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which would go back at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back at the end either
        mallopt(-2, 2**30)  # M_TOP_PAD: and ask for more a gigabyte at a time


def prepare(*, keep=True):
    """Sets this process up for training at full speed; `keep`: with `keep_memory`."""
    # The sizes of a training are fixed, so cuDNN's search for the fastest algorithm of each
    # convolution pays: once for its batches, and once for a short last one.
    torch.backends.cudnn.benchmark = True
    if keep:
        keep_memory()


def pick_device(name=None):
    """The named torch.device, or the machine's accelerator, or else its CPU.

    Raises InputError where this machine does not have it.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).item()  # "meta" computes nothing
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        raise InputError(f"no device {name!r} on this machine; try --device cpu") from error
    return torch.device(name)


def amp_dtype(device):
    """The dtype of mixed precision that pays on the device; None: float32 only.

    bfloat16 on NVIDIA and AMD GPUs and on x86 CPUs with instructions for it, float16 on older
    GPUs with tensor cores; float32 on all other devices.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability >= (8, 0):
            return torch.bfloat16
        # before 7.0 and in the GTX 16…: no tensor cores, and there wrong convolutions in float16
        tensor_cores = capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device)
        return torch.float16 if tensor_cores else None
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if native else None
    return None


def pick_precision(name, device):
    """The dtype that "fp32", "bf16", "fp16" or "auto" stands for; None: float32 only.

    A run that is resumed, on another device perhaps, picks again.
    """
    return amp_dtype(device) if name == "auto" else PRECISIONS[name]


def device_name(device):
    """What the machine calls the device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities().get("cpu_name")
        name = known or platform.processor() or platform.machine()
        return f"{name} CPU, {torch.get_num_threads()} thread(s)"
    return str(device)


def dtype_name(dtype):
    """"float32" for None, no mixed precision; "bfloat16", "float16"."""
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device, dtype):
    """Mixed precision in `dtype`, or none where that is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def clock(device):
    """The seconds of a clock, read when the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
