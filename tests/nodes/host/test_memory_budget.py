"""The pipeline's memory budget, held against an allocator that counts every byte.

In a process of its own: what other tests of a process have left to be freed would be counted too.
"""

import os
import subprocess
import sys

import pytest
import torch

import wild_files
from counting_allocator import CountingAllocator
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.offload.streamer import MemoryBudgetError
from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline

OWN_PROCESS = "COUNTED_IN_OWN_PROCESS"
counted = pytest.mark.skipif(OWN_PROCESS not in os.environ, reason="runs in a process of its own, below")
GIB = 2**30
SHAPE = (1, 128, 2, 16, 16)  # 512 tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    geometry = wild_files.geometry("2.3", num_layers=8)
    synthetic.make(folder / "model.gguf", geometry, type="q8_0")
    return folder


def pipeline(files, budget=None):
    return LTX2Pipeline.from_files(files / "model.gguf", files / "gemma.gguf", memory_budget=budget)


def counting(module):
    """A counting allocator that knows the module's own tensors, which lie in the memory map, as no memory of the device."""
    counter = CountingAllocator()
    for value in (*module.parameters(), *module.buffers()):
        counter._sizes[(value._qdata if hasattr(value, "_qdata") else value).untyped_storage()._cdata] = 0
    return counter


def step(pipe, count=2):
    """A denoise step's velocities on the CPU, which the budget treats as a device; with the counted peak of everything allocated meanwhile."""
    generator = torch.Generator().manual_seed(0)
    latent, result = torch.randn(SHAPE, generator=generator), None
    context = torch.randn(1, 1024, pipe.dit.config.context_dim, generator=generator)
    with torch.inference_mode(), counting(pipe.dit) as counter, pipe._transformer(latent[0, 0].numel()):
        for _ in range(count):
            result = pipe.dit.velocity(latent, 0.7, context, 24.0)
    return result, counter.peak


def smallest_budget(files):
    """GB: what one error message after the other asks for."""
    budget = 0.001
    while True:
        try:
            step(pipeline(files, budget), 0)
            return budget
        except MemoryBudgetError:
            budget *= 1.2


@counted
def test_streaming_stays_within_the_budget_counted_byte_by_byte_and_computes_the_same(files):
    expected, _ = step(pipeline(files))
    smallest = smallest_budget(files)
    peaks = []
    for budget in (smallest, 1.5 * smallest, 3 * smallest):
        pipe = pipeline(files, budget)
        result, peak = step(pipe)
        assert torch.equal(result, expected)
        assert peak <= budget * GIB, f"{peak / budget / GIB:.2f} of the budget"
        assert pipe.memory.peak <= budget * GIB and pipe.memory.used == 0
        peaks.append(peak)
    assert peaks[0] < 0.85 * peaks[2], "a smaller budget is kept by holding less"


@counted
def test_the_text_encoder_is_streamed_within_the_budget_and_gone_before_the_transformer_comes(files):
    free = pipeline(files)
    with torch.inference_mode():
        expected = free.encode_prompts(["a red kite over the sea"])[0]
    budget = 0.02
    pipe = pipeline(files, budget)
    with torch.inference_mode(), CountingAllocator() as counter:
        result = pipe.encode_prompts(["a red kite over the sea"])[0]
        assert pipe.memory.used == 0, "nothing of the text encoder stays"
    assert torch.equal(result, expected)
    assert counter.peak <= budget * GIB


@counted
def test_a_budget_that_is_too_small_names_one_that_would_do(files):
    with pytest.raises(MemoryBudgetError, match="raise it") as caught:
        step(pipeline(files, 0.001))
    assert "GB" in str(caught.value) or "MB" in str(caught.value)


@pytest.mark.skipif(OWN_PROCESS in os.environ, reason="this is that process")
def test_every_budget_is_kept_in_a_process_of_its_own():
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=env | {OWN_PROCESS: "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
