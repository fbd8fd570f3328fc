"""Kernels launched past Triton's own way: when, with what, and what is done where that is not known to work."""

import pytest
import torch

pytest.importorskip("triton")

from ltx2_gguf.quant.kernels import triton_launch


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
        self.global_scratch_size, self.profile_scratch_size, self.launch_cooperative_grid, self.launch_pdl = (
            scratch,
            0,
            False,
            True,
        )

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
    made, a, b, c = (
        launcher(),
        torch.zeros(64, dtype=torch.float16),
        torch.zeros(8),
        torch.zeros(8, dtype=torch.float16),
    )
    made((3, 2, 1), (a, b, 48, 0.5), ("Q4_0", True), 8)
    made((5, 1, 1), (c, b, 48, 0.5), ("Q4_0", True), 8)
    compiled, run = made.kernel.log
    assert (
        compiled[2][0] is a
        and compiled[2][2:] == (48, 0.5, "Q4_0", True)
        and compiled[3] == {"num_warps": 8, "enable_fp_fusion": False}
    )
    assert run == ("run", (5, 1, 1), 999, (c.data_ptr(), b.data_ptr(), 48, 0.5, "Q4_0", True))


@pytest.mark.parametrize(
    "version, scratch, direct_c",
    [((3, 6), 0, True), ((3, 5), 0, True), ((3, 6), 64, False), ((3, 4), 0, False), ((3, 7), 0, False)],
)
def test_the_c_launcher_is_called_where_it_is_known_and_needs_no_scratch(
    launcher, monkeypatch, version, scratch, direct_c
):
    monkeypatch.setattr(triton_launch, "version", lambda: version)
    made, a, log = launcher(), torch.empty(64), []
    monkeypatch.setattr(
        type(made.kernel), "__getitem__", lambda self, grid: lambda *args, **options: CompiledWithLauncher(log, scratch)
    )
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
    [
        ((3, 2), ["compile"] * 2),
        ((3, 3), ["compile", "run"]),
        ((3, 8), ["compile", "run"]),
        ((3, 99), ["compile", "compiled"]),
    ],
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
