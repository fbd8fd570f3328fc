"""Loading and unloading outside of dynamic VRAM: nothing comes back from the device, small weights stay there, bytes arrive unchanged."""

import contextlib
import threading

import pytest
import torch

import host_models as hm
from host_models import load, lora, tiny, velocity, with_lora
from ltx2_gguf.ltx2_core.offload import upload

pytestmark = pytest.mark.usefixtures("host")


OFFLOADED = "prev_comfy_cast_weights"  # the host's mark on a layer that stays in main memory


def packed_layers(patcher):
    return {name: m for name, m in patcher.model.named_modules() if hasattr(getattr(m, "weight", None), "_qdata")}


def to_memory(value):
    """What ``.to("cpu")`` does, for the device that has no bytes."""
    return torch.empty(0, dtype=value.dtype) if value.numel() == 0 else value.to("cpu")


def test_unloading_puts_the_tensors_of_the_file_back():
    patcher = tiny("Q4_0")
    layers = packed_layers(patcher)
    home = {name: m.weight for name, m in layers.items()}
    for _ in range(2):
        with torch.inference_mode():
            for m in layers.values():
                m.bias = None
                m.to("meta")  # a device that nothing could be copied back from
                m.to("meta")  # as the host does for a model that it loads whole: each layer, then the model
        assert all(m.weight.device.type == "meta" and m.weight.shape == home[name].shape for name, m in layers.items())
        with torch.inference_mode():
            for m in layers.values():
                m._apply(to_memory)
        assert all(m.weight is home[name] for name, m in layers.items())


def test_a_weight_that_somebody_replaced_on_the_device_is_not_brought_back_from_the_file():
    layer = next(iter(packed_layers(tiny("Q4_0")).values()))
    with torch.inference_mode():
        layer.bias = None
        layer.to("meta")
        layer.weight = torch.nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
        layer.weight = torch.nn.Parameter(torch.ones(3, 3), requires_grad=False)
        layer.to("cpu")
    assert layer.weight.shape == (3, 3)


def test_a_move_that_also_changes_the_type_is_left_to_torch():
    layer = next(iter(packed_layers(tiny("Q4_0")).values()))
    with torch.inference_mode():
        layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and not layer.at_home


@pytest.mark.parametrize("megabytes", [0.2, 0], ids=["partly loaded", "offloaded"])
def test_norms_and_tables_are_on_the_device_also_when_the_model_is_not(megabytes):
    patcher = with_lora(tiny("Q4_0"), lora())
    load(patcher, megabytes)
    small, large = [], []
    for name, m in patcher.model.named_modules():
        if not hasattr(m, "comfy_cast_weights") or not list(m.parameters(recurse=False)):
            continue
        (large if hasattr(m.weight, "_qdata") else small).append((name, m))
    assert any("q_norm" in name for name, _ in small)
    assert not any(hasattr(m, OFFLOADED) for name, m in small if "norm" in name)
    assert any(hasattr(m, OFFLOADED) for _, m in large)
    counted = patcher.model.model_loaded_weight_memory
    assert counted >= sum(p.nbytes for _, m in small for p in m.parameters(recurse=False))


def test_freeing_memory_frees_as_much_as_was_asked_for_and_keeps_the_norms():
    dense = with_lora(tiny("Q8_0", dense=True), lora())
    load(dense)
    patcher = with_lora(tiny("Q8_0"), lora())
    load(patcher)
    with torch.inference_mode():
        assert patcher.partially_unload(patcher.offload_device, 400_000) >= 400_000
    assert not any(hasattr(m, OFFLOADED) for name, m in patcher.model.named_modules() if name.endswith("q_norm"))
    assert any(hasattr(m, OFFLOADED) for m in patcher.model.modules())
    assert hm.error(velocity(patcher), velocity(dense)) < 1e-5


def test_there_is_no_uploader_where_there_is_nothing_to_gain():
    with upload.uploader("cpu") as nothing:
        assert nothing is None


class Late(torch.Tensor):
    """A place on the device: what is copied there arrives when somebody waits for it, with the bytes that the source has then."""

    under_way, lock = [], threading.Lock()

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        with Late.lock:
            Late.under_way.append((self.as_subclass(torch.Tensor), source))

    @staticmethod
    def arrive(before=None):
        with Late.lock:
            for number, pair in enumerate(Late.under_way[:before]):
                if pair is not None:
                    pair[0].copy_(pair[1])
                    Late.under_way[number] = None


class Stream:
    """A stand-in for a CUDA stream that copies late."""

    def __init__(self, *device):
        pass

    def wait_stream(self, other):
        pass

    def record_event(self):
        return Event(len(Late.under_way))

    def synchronize(self):
        Late.arrive()


class CallersStream(Stream):
    def wait_stream(self, other):
        Late.arrive()


class Event:
    def __init__(self, number):
        self.number = number

    def synchronize(self):
        Late.arrive(self.number)


@pytest.fixture
def no_device(monkeypatch):
    """``Uploader`` without CUDA: slots are ordinary memory, and small."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", CallersStream)
    monkeypatch.setattr(Late, "under_way", [])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(upload, "SLOT_BYTES", 1000)


def test_pieces_read_by_several_threads_make_up_the_whole(no_device):
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 999, 1000, 123_457)]
    targets = [torch.zeros_like(source).as_subclass(Late) for source in sources]
    with upload.uploader("cuda") as up:
        for source, target in zip(sources, targets):
            up.copy(source, target)
        up.wait()
        assert all(torch.equal(a, b) for a, b in zip(sources, targets)), (
            "a slot is filled again only after the device has read it"
        )
        up.copy(sources[3], targets[3].zero_())
    assert torch.equal(sources[3], targets[3])


def test_a_copy_that_fails_is_reported_and_few_bytes_are_left_to_torch(no_device):
    with pytest.raises(ValueError, match="5000 bytes"):
        with upload.uploader("cuda") as up:
            up.copy(torch.zeros(5000, dtype=torch.uint8), torch.zeros(4500, dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        with upload.uploader("cuda") as up:
            up.copy(torch.zeros(5000, dtype=torch.uint8), torch.zeros(5000, dtype=torch.uint8).as_subclass(Late))
            up.copy(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8))
            raise RuntimeError("in the middle of it")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ltx2-upload")]
    with upload.uploader("cuda", 1000) as nothing:
        assert nothing is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uploaded_bytes_arrive_unchanged_whatever_their_number():
    sources = [
        torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 1000, upload.SLOT_BYTES, 5 * upload.SLOT_BYTES + 3)
    ]
    for _ in range(2):
        targets = [torch.empty(s.numel(), dtype=torch.uint8, device="cuda") for s in sources]
        with upload.uploader("cuda") as up:
            for source, target in zip(sources, targets):
                up.copy(source, target)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(sources, targets))
