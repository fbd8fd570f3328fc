"""An emulated Metal device: run code with ``device="mps"`` on any machine, under Metal's rules.

    with mps_mode.emulated():
        y = model.to("mps")(x.to("mps"))

Tensors on the emulated device hold CPU memory and claim to be on "mps". Every operation on them is checked before it runs:

    dtypes       float64, complex, uint16, uint32, uint64 and float8 do not exist on the device
    operations   an aten operation must have an MPS kernel, or be composed of operations, in this torch's own operator list
    devices      mixing device and CPU tensors is refused (zero-dimensional CPU tensors excepted), as torch does
    memory       ``.numpy()`` and ``.data_ptr()`` fail: nothing may look at device memory from the host

What this cannot show: Metal's rounding, its speed, and kernels that exist but are wrong. It is not a Mac.

Source of the operator list: ``torchgen/packaged/ATen/native/native_functions.yaml``, installed with torch.
"""

import contextlib
import functools
import re
from pathlib import Path
from unittest import mock

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

MISSING_DTYPES = {
    torch.float64, torch.complex32, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
}  # fmt: skip
MPS = torch.device("mps", 0)
MEMORY = 8 << 30  # what the emulated device says it has
_aten = torch.ops.aten

# What torch's core calls on the CPU in place of Metal's own attention, outside inference mode.
STAND_INS = {"_fused_sdp_choice", "_scaled_dot_product_flash_attention_for_cpu"}
# Operators that take index tensors from the CPU on any device.
TAKE_CPU_INDICES = {"index.Tensor", "index_put", "index_put_", "_index_put_impl_"}


class RefusedByMPS(AssertionError):
    """The device could not have run this."""


@functools.lru_cache(maxsize=1)
def _operators():
    """Operator name with overload -> (dispatch keys, structured delegate or None)."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    table = {}
    for block in re.split(r"\n(?=- func: )", text):
        func = re.match(r"- func: ([\w.]+)\(", block)
        if not func:
            continue
        section = re.search(r"\n  dispatch:\n((?:    .*\n?)+)", block)
        keys = (
            set(re.findall(r"\w+", " ".join(line.split(":")[0] for line in section[1].splitlines())))
            if section
            else set()
        )
        delegate = re.search(r"\n  structured_delegate: ([\w.]+)", block)
        entry = (keys, delegate and delegate[1])
        table[func[1]] = entry
        generated = re.search(r"\n  autogen: (.*)", block)
        for name in re.split(r",\s*", generated[1]) if generated else ():
            table.setdefault(name.strip(), entry)
    return table


@functools.cache
def has_kernel(name):
    """Whether an aten operator ("add.Tensor") runs on MPS in the installed torch."""
    entry = _operators().get(name)
    if entry is None:
        return False
    keys, delegate = entry
    if delegate:
        return has_kernel(delegate)
    return not keys or "MPS" in keys or any(key.startswith(("CompositeImplicit", "CompositeExplicit")) for key in keys)


def _operator_name(func):
    overload = func._overloadname
    return func._schema.name.split("::")[1] + ("" if overload in ("default", "") else f".{overload}")


def _check_dtype(dtype, func):
    if dtype in MISSING_DTYPES:
        raise RefusedByMPS(f"{func}: {dtype} does not exist on MPS")


def _check_operator(func):
    if func.namespace != "aten":
        if func.namespace != "prim":
            raise RefusedByMPS(f"{func}: no MPS kernel is registered for this operator")
    elif not has_kernel(_operator_name(func)) and _operator_name(func) not in STAND_INS:
        raise RefusedByMPS(f"{func}: torch has no MPS kernel for this operator")


class EmulatedTensor(torch.Tensor):
    """A tensor on the emulated device; ``held`` is its CPU memory.

    Torch's core takes it for a CPU tensor (a build without Metal has no device of that name to switch to), Python code sees "mps".
    """

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"EmulatedTensor({self.held!r})"

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {} if memory_format is None else {"memory_format": memory_format}
        if device is not None and device.type != "mps":
            return self.held.detach().to(device, dtype or self.dtype, copy=True, **options)
        if dtype is None or dtype == self.dtype:
            return self.clone() if copy else self
        return _aten._to_copy.default(self, dtype=dtype, **options)

    def cpu(self, *args, **kwargs):
        return self.to("cpu")

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(
            "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def data_ptr(self):
        raise RefusedByMPS("data_ptr: device memory has no address for the host")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _wants_device(kwargs):
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "mps"


def _run(func, args, kwargs):
    if func is _aten._has_compatible_shallow_copy_type.default:
        return False  # Module.to() then replaces its parameters instead of changing their data
    leaves, spec = tree_flatten((args, kwargs))
    emulated = [leaf for leaf in leaves if isinstance(leaf, EmulatedTensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, EmulatedTensor)]
    moves = func in (_aten._to_copy.default, _aten.copy_.default)
    to_host = func is _aten._to_copy.default and kwargs.get("device") is not None and not _wants_device(kwargs)
    if not moves:
        for tensor in plain:
            if emulated and tensor.dim() and _operator_name(func) not in TAKE_CPU_INDICES:
                raise RefusedByMPS(f"{func}: a CPU tensor of shape {tuple(tensor.shape)} meets tensors on MPS")
        _check_operator(func)
    if not to_host:
        _check_dtype(kwargs.get("dtype"), func)
    dtype_argument = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
    if not to_host:
        _check_dtype(dtype_argument, func)

    # In inference mode a view of a tensor made outside it is not an inference tensor either, and torch's core insists.
    lasting = any(not tensor.is_inference() for tensor in emulated)
    owners = {id(tensor.held): tensor for tensor in emulated}
    held = [leaf.held if isinstance(leaf, EmulatedTensor) else leaf for leaf in leaves]
    held_args, held_kwargs = tree_unflatten(held, spec)
    if _wants_device(held_kwargs):
        held_kwargs = {**held_kwargs, "device": torch.device("cpu")}
    result = func(*held_args, **held_kwargs)
    if to_host or (func is _aten.copy_.default and not isinstance(args[0], EmulatedTensor)):
        return args[0] if func is _aten.copy_.default else result

    def wrap(tensor):
        if id(tensor) in owners:
            return owners[id(tensor)]
        _check_dtype(tensor.dtype, func)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not lasting):
            return EmulatedTensor(tensor)

    return tree_map_only(torch.Tensor, wrap, result)


class _Mode(TorchDispatchMode):
    """Catches what does not reach a tensor of the device by itself: factories with ``device="mps"`` and copies to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for kind in types:
            own_rules = getattr(kind, "__torch_dispatch__", torch._C._disabled_torch_dispatch_impl)
            if (
                kind not in (EmulatedTensor, torch.Tensor, torch.nn.Parameter)
                and own_rules is not torch._C._disabled_torch_dispatch_impl
            ):
                with self:  # a tensor type with rules of its own: they apply first, and what they call comes back here
                    return own_rules(func, types, args, kwargs)
        if func is _aten.to.device and torch.device(args[1]).type == "mps":
            return _run(_aten._to_copy.default, (args[0],), {"device": MPS, "dtype": args[2]})
        leaves = tree_flatten((args, kwargs))[0]
        if _wants_device(kwargs) or any(isinstance(leaf, EmulatedTensor) for leaf in leaves):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _building_on_cpu(function):
    """``torch.tensor`` and ``torch.as_tensor`` build their result below the level that the mode sees: build on the CPU and move."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if _wants_device(kwargs):
            return function(*args, **{**kwargs, "device": "cpu"}).to(MPS)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def emulated():
    """Inside the block the device "mps" exists, and follows its rules. Use it under ``torch.inference_mode()`` or ``no_grad()``."""
    queries = {
        "recommended_max_memory": lambda: MEMORY, "driver_allocated_memory": lambda: 0, "current_allocated_memory": lambda: 0,
        "empty_cache": lambda: None, "synchronize": lambda: None,
    }  # fmt: skip
    literals = {"tensor": _building_on_cpu(torch.tensor), "as_tensor": _building_on_cpu(torch.as_tensor)}
    with _Mode(), mock.patch.multiple(torch.mps, **queries), mock.patch.multiple(torch, **literals):
        yield MPS
