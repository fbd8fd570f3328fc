"""What the inputs of layers count: recorded, written, read, and used by a conversion."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wild_files
from ltx2_gguf.ltx2_core import cli
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.convert.convert import convert
from ltx2_gguf.ltx2_core.convert.importance import ImportanceError, Recorder, read_importance, write_importance
from ltx2_gguf.quant import decode
from ltx2_gguf.quant.gguf.reader import GGUFFile


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_the_mean_squares_of_all_calls_are_recorded_and_nothing_stays_on_the_model(tmp_path):
    model, recorder, calls = Model(), Recorder(), [torch.randn(2, 3, 8), torch.randn(5, 8)]
    with recorder.recording(model):
        for x in calls:
            model(x)
    model(calls[0])
    rows = torch.cat([x.reshape(-1, 8) for x in calls])
    means = recorder.means()
    assert recorder.rows == 11 and set(means) == {"first.weight", "second.weight"}
    assert torch.allclose(means["first.weight"], rows.square().mean(0))
    assert torch.allclose(means["second.weight"], model.first(rows).relu().square().mean(0), atol=1e-6)
    assert write_importance(tmp_path / "i.safetensors", recorder, "model") == 2
    read = read_importance(tmp_path / "i.safetensors", {"first.weight": (4, 8), "absent.weight": (3, 3)})
    assert set(read) == {"first.weight"} and torch.equal(read["first.weight"], means["first.weight"])


@pytest.mark.parametrize(
    "tensors, kind, message",
    [
        ({"a.weight": torch.ones(8)}, None, "holds no importance"), ({"b.weight": torch.ones(8)}, "ltx2-gguf importance", "names none of its matrices"),
        ({"a.weight": torch.ones(6)}, "ltx2-gguf importance", "a.weight has 6 inputs there and 8 here"),
        ({"a.weight": -torch.ones(8)}, "ltx2-gguf importance", "no mean square"), ({"a.weight": torch.full((8,), torch.nan)}, "ltx2-gguf importance", "no mean square"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_a_sentence(tmp_path, tensors, kind, message):
    save_file(tensors, tmp_path / "i.safetensors", metadata={"kind": kind} if kind else None)
    with pytest.raises(ImportanceError, match=message):
        read_importance(tmp_path / "i.safetensors", {"a.weight": (4, 8)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("importance")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    synthetic.make(folder / "model.safetensors", wild_files.geometry("2.3", num_layers=2), type="bf16")
    return folder


def test_calibrate_writes_a_file_with_which_convert_errs_less_where_it_counts(folder, capsys):
    options = [
        "--width",
        "64",
        "--height",
        "64",
        "--frames",
        "9",
        "--steps",
        "1",
        "--prompt",
        "one",
        "--prompt",
        "two",
        "-q",
    ]
    command = [
        "calibrate",
        str(folder / "i.safetensors"),
        "--model",
        str(folder / "model.safetensors"),
        "--text-encoder",
        str(folder / "gemma.gguf"),
    ]
    assert cli.main([*command, *options]) == 0, capsys.readouterr().err
    means = load_file(folder / "i.safetensors")
    assert {
        "transformer_blocks.1.ff.net.2.weight",
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight",
    } <= set(means)
    assert cli.main([*command, *options]) == 1 and "exists" in capsys.readouterr().err

    source, errors = load_file(folder / "model.safetensors"), []
    for importance in (None, folder / "i.safetensors"):
        convert([folder / "model.safetensors"], folder / "out.gguf", "q4_k_m", importance=importance, overwrite=True)
        file, total = GGUFFile(folder / "out.gguf"), 0.0
        for name, counts in means.items():
            info = file.tensors[name]
            if info.format.is_quantized:
                stored = next(value for key, value in source.items() if key.endswith(name)).float()
                change = decode.dequantize(torch.as_tensor(file.raw(name)), info.format).view_as(stored) - stored
                total += float((counts * change.square()).sum())
        errors.append(total)
        file.close()
    assert 0 < errors[1] < 0.97 * errors[0]
