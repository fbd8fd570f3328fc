"""A stand-in for the GPU allocator behind the host's dynamic VRAM, so that the host's own code for it runs on a CPU.

"The device" is ``cpu:0`` and main memory is ``cpu``: the host compares devices, and these two differ. Torch itself drops the index, so casting is told that
its input is on the device. Pages are plain tensors; ``fits(number)`` says which allocation has room, in the order they were made.
"""

import torch

DEVICE, MEMORY = torch.device("cpu", 0), torch.device("cpu")


class Pages:
    """One allocation of the virtual VRAM."""

    def __init__(self, arena, number, size):
        self.arena, self.number = arena, number
        self.data = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        self.pins = 0

    def __getitem__(self, index):
        """(allocator, offset, size), as the host reads an allocation from 0.33 on."""
        return (self.arena, 0, self.data.numel())[index]


class Arena:
    """What the host calls a vbar: allocations of one model."""

    faults = 0

    def __init__(self, size=0, device=0):
        self.allocations = []

    def alloc(self, size):
        self.allocations.append(Pages(self, len(self.allocations), size))
        return self.allocations[-1]

    def prioritize(self):
        pass

    deprioritize = prioritize

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


class Buffer:
    """A host buffer that is never used, since pinning is off."""

    size = 0

    def __init__(self, *args):
        pass


def install(monkeypatch, fits=lambda number: True):
    """Make the host believe in a device with dynamic VRAM for the length of a test."""
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    original = comfy.ops.cast_bias_weight

    def cast_on_the_device(module, input=None, dtype=None, device=None, bias_dtype=None, **options):
        dtype = dtype if dtype is not None or input is None else input.dtype
        return original(module, None, dtype, DEVICE, bias_dtype if bias_dtype is not None else dtype, **options)

    def fault(pages):
        Arena.faults += 1
        if not fits(pages.number):
            return None
        pages.pins += 1
        return ("resident", id(pages))

    def unpin(pages):
        pages.pins -= 1

    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Arena)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", fault)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", unpin)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda device: 0)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda pages, device: pages.data)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", Buffer)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_on_the_device)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: device == MEMORY)
    monkeypatch.setattr(management, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(management, "unet_offload_device", lambda: MEMORY)
