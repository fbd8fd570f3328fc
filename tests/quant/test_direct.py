"""Packed layers past the tensor's dispatch, and kernels past Triton's: when they are taken, and that results are the same."""

import pytest
import torch

pytest.importorskip("triton")

import reference_dit  # noqa: E402
from block_bytes import DEVICE, random_raw  # noqa: E402
from ltx2_gguf.ltx2_core.text import gemma  # noqa: E402
from ltx2_gguf.ltx2_core.transformer import fused  # noqa: E402
from ltx2_gguf.quant import backends, decode, direct, eight_bit, formats, linear_gpu, tensor  # noqa: E402
from ltx2_gguf.quant.kernels import triton_launch  # noqa: E402


@pytest.fixture
def everywhere(monkeypatch):
    """Let the direct path run on the CPU, with the dense product behind it."""

    class Backend:
        pass

    def product(x, raw, fmt, shape, bias=None, plain=None):
        calls.append(fmt.name)
        return torch.nn.functional.linear(x, decode.dequantize(raw, fmt, x.dtype), bias)

    calls = []
    backend = Backend()
    backend.run = product
    monkeypatch.setattr(linear_gpu, "linear", product)
    monkeypatch.setattr(direct.backends, "pick", lambda *a: backend)
    monkeypatch.setattr(direct, "DEVICES", ("cpu", "cuda"))
    with torch.inference_mode():
        yield calls


def gemma_config():
    """The smallest Gemma-3 geometry that packs."""
    return gemma.GemmaConfig(
        vocab_size=32, width=64, ffn_width=128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32, query_width=32, sliding_window=64,
        sliding_layers=(True,), rope_theta=1e6, rope_local_theta=1e4, rope_factor=1.0, norm_eps=1e-6,
    )  # fmt: skip


def layer(n_out=32, n_in=64, seed=0, name="Q8_0"):
    module = torch.nn.Linear(n_in, n_out, device="meta")
    module.weight = torch.nn.Parameter(tensor.pack(random_raw(name, n_out, n_in, seed), name, (n_out, n_in), torch.float32), requires_grad=False)
    module.bias = torch.nn.Parameter(torch.randn(n_out, device=DEVICE), requires_grad=False)
    return module


def test_a_resident_packed_layer_is_multiplied_directly_with_the_modules_result(everywhere):
    module, x = layer(), torch.randn(2, 5, 64, device=DEVICE)
    expected = torch.nn.functional.linear(x, decode.dequantize(module.weight._qdata, formats.FORMATS["Q8_0"], torch.float32), module.bias)
    assert torch.allclose(fused.linear(module, x), expected, atol=1e-6) and everywhere == ["Q8_0"]


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "weight_function", "weight_lowvram_function", "dynamic memory", "dense", "other type", "subclass", "width"])
def test_anything_hung_on_a_layer_sends_the_call_through_the_module(everywhere, change):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    if change == "hook":
        module.register_forward_hook(lambda *a: None)
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda *a: None)
    elif change == "forward":
        module.forward = lambda x: x
    elif change in ("weight_function", "weight_lowvram_function"):
        setattr(module, change, [lambda w: w])
    elif change == "dynamic memory":
        module._v = object()
    elif change == "dense":
        module.weight = torch.nn.Parameter(torch.zeros(32, 64, device=DEVICE), requires_grad=False)
    elif change == "other type":
        x = x.half()
    elif change == "width":
        x = x[:, :32]
    elif change == "subclass":
        module.__class__ = type("Other", (torch.nn.Linear,), {})
    assert direct.ready(module, x) is None
    if change == "subclass":
        type(module).plain_product = True
        assert direct.ready(module, x) is not None


def test_a_weight_at_hand_is_multiplied_directly_with_the_bits_of_torchs_function(everywhere):
    module, x = layer(), torch.randn(2, 5, 64, device=DEVICE)
    weight, bias = module.weight, module.bias
    expected = torch.nn.functional.linear(x, decode.dequantize(weight._qdata, formats.FORMATS["Q8_0"], torch.float32), bias)
    assert torch.equal(direct.linear(x, weight, bias), expected) and everywhere == ["Q8_0"]
    dense = decode.dequantize(weight._qdata, formats.FORMATS["Q8_0"], torch.float32)
    assert torch.equal(direct.linear(x, dense, bias), expected) and everywhere == ["Q8_0"]
    with torch.inference_mode(False), torch.enable_grad():
        assert direct.ready_with(weight, bias, x) is None
    assert direct.ready_with(weight, bias, x.half()) is None and direct.ready_with(weight, bias.half(), x) is None


def test_gradients_keep_the_modules_own_path(everywhere):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    with torch.inference_mode(False), torch.enable_grad():
        assert direct.ready(module, x) is None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The table of backends and the shortcuts take this device for a GPU, so that a compiler traces what it would trace there."""
    rows = [backends.Backend("triton", op, (DEVICE,), run) for op, run in (("linear", linear_gpu.linear), ("dequantize", backends._triton_dequantize))]
    monkeypatch.setattr(backends, "BACKENDS", (*rows, *backends.BACKENDS))
    monkeypatch.setattr(direct, "DEVICES", (DEVICE,))
    monkeypatch.setattr(fused, "_TRITON_DEVICES", (DEVICE,))
    backends.forget_choices()
    with torch.inference_mode():
        yield
    torch._dynamo.reset()
    backends.forget_choices()
    linear_gpu.release_scratch()


def pack_linears(model, compute="exact"):
    """Every linear layer's weight in Q8_0; the product's path is direct for calls that are not traced."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = tuple(module.weight.shape)
            packed = tensor.pack(random_raw("Q8_0", *shape), "Q8_0", shape, torch.float32)
            module.weight = torch.nn.Parameter(tensor.with_compute(packed, compute), requires_grad=False)
    return model


@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_a_packed_block_compiles_as_one_graph(as_on_a_gpu, compute, monkeypatch):
    if compute == "fast" and DEVICE == "cpu":
        monkeypatch.setattr(eight_bit, "supports", lambda *a: True)
        monkeypatch.setattr(eight_bit, "kind_for", lambda device, compute: "int8")
    config = reference_dit.tiny_config()
    model = reference_dit.our_model(config).to(DEVICE)
    pack_linears(model.transformer_blocks, compute)
    block, width = model.transformer_blocks[0], config.inner_dim
    x, context = torch.randn(1, 24, width, device=DEVICE), torch.randn(1, 20, width, device=DEVICE)
    rows, prompt = torch.randn(1, 1, 9 * width, device=DEVICE), torch.randn(1, 1, 2 * width, device=DEVICE)
    pe = model._rotary_tables_for((2, 3, 4), 24.0, None, None, torch.device(DEVICE))["v_pe"]
    assert direct.ready(block.attn1.to_q, x) is not None

    def run(block):
        return block((x.clone(), x[:, :0]), v_context=context, v_timestep=rows, v_pe=pe, v_prompt_timestep=prompt, transformer_options={})[0]

    quantised = []
    monkeypatch.setattr(eight_bit, "empty_tokens", lambda *a, make=eight_bit.empty_tokens: quantised.append(a[:2]) or make(*a))
    separate = []  # passes that a fast product's own pass has taken in
    with monkeypatch.context() as patch:
        patch.setattr(fused, "head_gate", lambda *a, gate=fused.head_gate: separate.append("gate") or gate(*a))
        expected = run(block)
    inner = 4 * width
    on_the_gpu = DEVICE != "cpu"  # there nothing stands in for its 8-bit products, which take neither float32 nor so few rows
    assert separate == (["gate"] * 2 if compute == "exact" or on_the_gpu else [])
    # self-attention's input, again for the gates' logits, gated output; cross-attention's input, text, logits, output; the feed-forward's input, middle
    fast_passes = [(24, width)] * 4 + [(20, width)] + [(24, width)] * 3 + [(24, inner)]
    assert quantised == ([] if compute == "exact" or on_the_gpu else fast_passes)
    got = run(torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False))
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_a_packed_layer_of_the_text_encoder_compiles_as_one_graph(as_on_a_gpu):
    config = gemma_config()
    layer = pack_linears(gemma.GemmaLayer(config, config.attention(True), torch.nn, torch.float32, DEVICE)).requires_grad_(False)
    x, rope = torch.randn(1, 20, config.width, device=DEVICE), gemma.rope_table(torch.arange(20, device=DEVICE), config.head_dim, 1e4)
    assert direct.ready(layer.mlp.up_proj, x) is not None
    expected = layer(x, rope, None, torch.float32)
    got = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)(x, rope, None, torch.float32)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_fast_layers_on_one_input_quantise_it_once_and_the_feed_forward_takes_gelu_in_the_same_pass(everywhere, monkeypatch):
    quantised = []

    def tokens(rows, kind, gelu=False):
        quantised.append(gelu)
        assert rows.shape == (40, rows.shape[1])
        return eight_bit.quantize_rows(torch.nn.functional.gelu(rows, approximate="tanh") if gelu else rows, kind)

    def product(xq, scale, raw, fmt, shape, bias, kind, dtype, gelu=False):
        w, w_scale = eight_bit.quantize_rows(decode.dequantize(raw, fmt, torch.float32), kind)
        y = (xq.float() @ w.float().t()) * scale * w_scale.t() + bias
        return (torch.nn.functional.gelu(y, approximate="tanh") if gelu else y).to(dtype)

    monkeypatch.setattr(eight_bit, "tokens", tokens)
    monkeypatch.setattr(eight_bit, "product", product)
    monkeypatch.setattr(eight_bit, "supports", lambda *a: True)
    x = torch.randn(1, 40, 64, device=DEVICE)
    for kind in ("fp8", "int8"):
        monkeypatch.setattr(eight_bit, "kind_for", lambda device, compute, kind=kind: kind)
        layers = [layer(seed=s) for s in range(3)] + [layer(128, 64, 4), layer(64, 128, 5)]
        exact = fused.linears(layers[:3], x), fused.feed_forward(*layers[3:], x)
        for module in layers:
            module.weight = torch.nn.Parameter(tensor.with_compute(module.weight, "fast"), requires_grad=False)
        quantised.clear()
        got = fused.linears(layers[:3], x), fused.feed_forward(*layers[3:], x)
        assert quantised == [False, False, kind == "fp8"]  # q, k, v together; the input; the middle, with GELU where the epilogue has none
        for a, b in zip((*got[0], got[1]), (*exact[0], exact[1])):
            assert a.shape == b.shape and 0 < torch.linalg.norm(a - b) < 0.06 * torch.linalg.norm(b)


class Compiled:
    """A compiled kernel with the surface of Triton 3.3 to 3.8: ``run`` is its launcher, ``compiled[grid](*args)`` its own way there."""

    function, packed_metadata = 77, (4, 1, 0)

    def __init__(self, log, refuses=False):
        self.log, self.refuses = log, refuses

    def run(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *args):
        if self.refuses:
            raise TypeError("function takes exactly 14 arguments")
        assert (function, packed_metadata, launch_metadata, enter_hook, exit_hook) == (77, (4, 1, 0), None, None, None)
        self.log.append(("run", (x, y, z), stream, args))

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("compiled", grid, args))


class CompiledWithLauncher(Compiled):
    """One whose ``run`` is Triton 3.5's and 3.6's CudaLauncher: ``launch`` is the C function."""

    def __init__(self, log, scratch=0):
        super().__init__(log)
        self.run = self
        self.global_scratch_size, self.profile_scratch_size, self.launch_cooperative_grid, self.launch_pdl = scratch, 0, False, True

    def __call__(self, *args):
        return Compiled.run(self, *args)

    def launch(self, x, y, z, stream, function, cooperative, pdl, global_scratch, profile_scratch, *args):
        assert (cooperative, pdl, global_scratch, profile_scratch) == (False, True, None, None)
        self.log.append("launch")
        Compiled.run(self, x, y, z, stream, function, *args)


class Kernel:
    """A ``triton.jit`` function that compiles to :class:`Compiled`."""

    device_caches = {}

    def __init__(self, refuses=False):
        self.log, self.refuses = [], refuses

    def __getitem__(self, grid):
        def call(*args, **options):
            self.log.append(("compile", grid, args, options))
            return Compiled(self.log, self.refuses)

        return call

    def kinds(self):
        kinds = [entry[0] for entry in self.log]
        self.log.clear()
        return kinds


@pytest.fixture
def launcher(monkeypatch):
    """Makes launchers that believe in a CUDA device; ``launcher.current`` is its number (tensors here say -1), ``launcher.hooks`` Triton's hooks."""

    class Hooks:
        launch_enter_hook = launch_exit_hook = None

    def make(**options):
        made = triton_launch.Launcher(Kernel(**options), enable_fp_fusion=False)
        made.hooks = make.hooks
        return made

    make.hooks, make.current = Hooks(), -1
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton_launch, "version", lambda: (3, 6))
    monkeypatch.setattr(triton_launch, "_current_device", lambda: make.current)
    monkeypatch.setattr(triton_launch, "_raw_stream", lambda device: 1000 + device)
    return make


def test_a_kernel_compiled_before_is_launched_by_address_on_the_streams_own_handle(launcher):
    made, a, b, c = launcher(), torch.zeros(64, dtype=torch.float16), torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    made((3, 2, 1), (a, b, 48, 0.5), ("Q4_0", True), 8)
    made((5, 1, 1), (c, b, 48, 0.5), ("Q4_0", True), 8)
    compiled, run = made.kernel.log
    assert compiled[2][0] is a and compiled[2][2:] == (48, 0.5, "Q4_0", True) and compiled[3] == {"num_warps": 8, "enable_fp_fusion": False}
    assert run == ("run", (5, 1, 1), 999, (c.data_ptr(), b.data_ptr(), 48, 0.5, "Q4_0", True))


@pytest.mark.parametrize(
    "version, scratch, direct_c", [((3, 6), 0, True), ((3, 5), 0, True), ((3, 6), 64, False), ((3, 4), 0, False), ((3, 7), 0, False)]
)
def test_the_c_launcher_is_called_where_it_is_known_and_needs_no_scratch(launcher, monkeypatch, version, scratch, direct_c):
    monkeypatch.setattr(triton_launch, "version", lambda: version)
    made, a, log = launcher(), torch.empty(64), []
    monkeypatch.setattr(type(made.kernel), "__getitem__", lambda self, grid: lambda *args, **options: CompiledWithLauncher(log, scratch))
    for _ in range(2):
        made((3, 2, 1), (a, 48), ("Q4_0",))
    assert log == ["launch"] * direct_c + [("run", (3, 2, 1), 999, (a.data_ptr(), 48, "Q4_0"))]


def test_what_triton_compiles_differently_is_compiled_again(launcher):
    made, a = launcher(), torch.zeros(64, dtype=torch.float16)
    calls = [
        (a, 3), (a[1:], 3), (a.view(torch.bfloat16), 3), (a, 1), (a, 16), (a, 1 << 31), (a, (1 << 31) + 1), (a[1:], 1), (a, 0.5),
    ]  # fmt: skip
    for args in calls:
        made((1, 1, 1), args, ())
    made((1, 1, 1), (a, 3), (), 8)
    made((1, 1, 1), (a, 3), ("constant",))
    assert made.kernel.kinds() == ["compile"] * 11
    for args in (*calls, (a[8:], 3), (a[3:], 1)):
        made((1, 1, 1), args, ())
    assert made.kernel.kinds() == ["run"] * 11


def test_the_number_of_kept_forms_is_bounded(launcher, monkeypatch):
    monkeypatch.setattr(triton_launch, "KEPT", 3)
    made, a = launcher(), torch.zeros(4)
    for n in (0, 1, 2, 0, 3, 3, 0):
        made((1, 1, 1), (a, n), ())
    assert made.kernel.kinds() == ["compile"] * 3 + ["run", "compile", "run", "compile"] and len(made.compiled) == 2


def test_hooks_on_launches_are_heard_and_empty_chains_cost_nothing(launcher):
    class Chain:
        calls = []

    made, a = launcher(), torch.zeros(4)
    launcher.hooks.launch_enter_hook = chain = Chain()
    for _ in range(2):
        made((1, 1, 1), (a,), ())
    assert made.kernel.kinds() == ["compile", "run"]
    chain.calls = [print]
    made((1, 1, 1), (a,), ())
    launcher.hooks.launch_enter_hook, launcher.hooks.launch_exit_hook = None, lambda metadata: None
    made((1, 1, 1), (a,), ())
    assert made.kernel.kinds() == ["compiled"] * 2
    launcher.hooks.launch_exit_hook = None
    made((1, 1, 1), (a,), ())
    assert made.kernel.kinds() == ["run"]


def test_a_launcher_that_refuses_addresses_is_given_tensors_and_the_log_says_so_once(launcher, caplog):
    made, a = launcher(refuses=True), torch.zeros(4)
    for _ in range(3):
        made((1, 1, 1), (a,), (2,))
    assert made.kernel.log[1:] == [("compiled", (1, 1, 1), (a, 2))] * 2
    assert caplog.text.count("by way of tensors") == 1


@pytest.mark.parametrize(
    "version, kinds",
    [((3, 2), ["compile"] * 2), ((3, 3), ["compile", "run"]), ((3, 8), ["compile", "run"]), ((3, 99), ["compile", "compiled"])],
)
def test_only_known_versions_are_launched_by_address(launcher, monkeypatch, version, kinds):
    monkeypatch.setattr(triton_launch, "version", lambda: version)
    made, a = launcher(), torch.zeros(4)
    for _ in range(2):
        made((1, 1, 1), (a,), ())
    assert made.kernel.kinds() == kinds


def test_a_kernel_runs_on_the_device_of_its_tensors(launcher, monkeypatch):
    entered = []

    class device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            self.before, launcher.current = launcher.current, self.index

        def __exit__(self, *exception):
            launcher.current = self.before

    monkeypatch.setattr(torch.cuda, "device", device)
    made, a = launcher(), torch.zeros(4)
    launcher.current = 2
    for _ in range(2):
        made((1, 1, 1), (a,), ())
    assert entered == [-1, -1] and launcher.current == 2 and made.kernel.kinds() == ["compile", "run"]


def test_rounding_up_helpers():
    assert [triton_launch.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [triton_launch.power_of_2(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]
    assert formats.FORMATS["Q8_0"].name in {fmt.name for fmt in direct._FORMATS.values()}


def test_layout_names_here_are_those_of_the_registered_layouts():
    from ltx2_gguf.quant import layouts

    assert direct._FORMATS == layouts.FORMAT_OF_LAYOUT


def test_threads_have_scratch_memory_of_their_own_and_one_call_frees_all_of_it():
    import threading

    device = torch.device("cpu")  # one stream for all threads, as where nobody made others
    mine = linear_gpu.scratch_matrix((4, 8), torch.float32, device)
    assert linear_gpu.scratch_matrix((4, 8), torch.float32, device) is mine
    theirs, made, seen = [], threading.Event(), threading.Event()

    def work():
        theirs.append(linear_gpu.scratch_matrix((4, 8), torch.float32, device).data_ptr())
        made.set()
        seen.wait(10)
        theirs.append(bool(linear_gpu._thread.buffers.of))

    thread = threading.Thread(target=work)
    thread.start()
    assert made.wait(10)
    linear_gpu.release_scratch()
    seen.set()
    thread.join()
    assert theirs[0] != mine.data_ptr() and theirs[1] is False and not linear_gpu._thread.buffers.of
