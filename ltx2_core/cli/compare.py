"""Check this pack's numbers against a file of inputs and expected outputs made elsewhere, with the official code or any other.

Such a file is a safetensors whose names are ``component/case/field``; docs/developer/compare-reference.md describes every field. Components
are the video transformer (``transformer.model``), the embeddings connector (``connector``), the text feature extractor (``features``) and the
video VAE (``vae``). Whatever a file holds is compared; nothing has to be complete.
"""

import logging
from dataclasses import dataclass

import torch

from ...quant.output import Output
from ..files.errors import WeightFileError
from ..files.names import PROJECTION, classify
from ..files.weights import open_weights
from ..loading.assign import assign
from ..loading.transformer import CheckpointError, load_connector, load_dit
from ..loading.vae import load_vae
from ..text.projection import TextProjection
from ..transformer.patchify import pixel_coords, token_positions

logger = logging.getLogger(__name__)

COMPONENTS = ("dit", "connector", "features", "vae")
LAYOUT = "ltx2-compare 1"  # the file's metadata entry ``layout``
OFFICIAL_STG_BLOCK = {"2.0": 29, "2.3": 28}
TOLERANCES = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}  # for the lower of the two precisions involved
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# component -> (fields without which a case cannot run, one of each group; all other fields)
FIELDS = {
    "dit": (
        (("latent",), ("context", "features"), ("sigma", "timesteps"), ("expected", "expected_x0")),
        ("denoise_mask", "frame_rate", "keyframe_idxs", "positions", "stg_blocks"),
    ),
    "connector": ((("features",), ("expected",)), ("attention_mask",)),
    "features": ((("hidden_states",), ("expected",)), ("attention_mask",)),
    "vae": ((("pixels", "latent"), ("expected_latent", "expected_pixels")), ()),
}


class CompareError(WeightFileError):
    """The file does not follow the layout, or the checkpoints do not hold what it asks for."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class Row:
    """One comparison. error: ||ours - expected|| / ||expected||; largest: the largest absolute difference."""

    component: str
    case: str
    output: str
    shape: tuple
    error: float
    largest: float
    tolerance: float

    @property
    def passed(self):
        """Whether the error is within the tolerance (never for NaN)."""
        return self.error <= self.tolerance


def compare(path, checkpoints, dtype=torch.float32, device="cpu", only=None, tolerance=None):
    """Run every case of the file ``path`` and return a Row per expected output.

    checkpoints: paths that hold the parts between them; dtype: compute dtype; only: one of COMPONENTS; tolerance: None for the
    default of the lower of ``dtype`` and the reference's own dtype (metadata ``dtype``). Raises CompareError, and the loaders' errors.
    """
    file = open_weights(path)
    cases = read_cases(file)
    if only:
        cases = {only: cases.get(only, {})}
    if not any(cases.values()):
        raise CompareError(
            f"{file.path.name} holds no case{' of ' + only if only else ''} with an expected output; names must read 'component/case/field' (docs/developer/compare-reference.md)."
        )
    if tolerance is None:
        theirs = DTYPES.get(file.metadata.get("dtype", "float32"), torch.float32)
        tolerance = max(TOLERANCES[dtype], TOLERANCES[theirs])
    files = [open_weights(checkpoint) for checkpoint in checkpoints]
    rows = []
    with torch.inference_mode():
        for component in (c for c in COMPONENTS if cases.get(c)):
            run = {"dit": _Dit, "connector": _Connector, "features": _Features, "vae": _Vae}[component](
                files, dtype, device
            )
            for case, fields in cases[component].items():
                logger.info("%s/%s", component, case)
                for output, got, expected in run(fields):
                    rows.append(_row(component, case, output, got, expected, tolerance))
    return rows


def read_cases(file):
    """{component: {case: {field: tensor}}} of an open WeightFile. Raises CompareError for names and fields outside the layout."""
    layout = file.metadata.get("layout", LAYOUT)
    if layout != LAYOUT:
        raise CompareError(
            f"{file.path.name} has the layout '{layout}'; this version reads '{LAYOUT}', so make the file again or update the pack."
        )
    cases = {}
    for name in file.names():
        component, _, rest = name.partition("/")
        case, _, field = rest.rpartition("/")
        if component not in FIELDS or not case or not field:
            raise CompareError(
                f"{file.path.name}: '{name}' is not of the form 'component/case/field' with a component of {', '.join(COMPONENTS)}."
            )
        known = {f for group in FIELDS[component][0] for f in group} | set(FIELDS[component][1])
        if field not in known:
            raise CompareError(
                f"{file.path.name}: '{name}' has an unknown field '{field}'; {component} has {', '.join(sorted(known))}."
            )
        cases.setdefault(component, {}).setdefault(case, {})[field] = file.load(name)
    for component, of_component in cases.items():
        for case, fields in list(of_component.items()):
            if not any(field.startswith("expected") for field in fields):
                logger.warning("%s/%s has no expected output and is left out.", component, case)
                del of_component[case]
                continue
            for group in FIELDS[component][0]:
                if not any(field in fields for field in group):
                    raise CompareError(
                        f"{file.path.name}: case '{component}/{case}' lacks '{' or '.join(group)}'; add it (docs/developer/compare-reference.md)."
                    )
    return cases


def _row(component, case, output, got, expected, tolerance):
    if got.shape != expected.shape:
        raise CompareError(
            f"'{component}/{case}': {output} is {tuple(got.shape)} here and {tuple(expected.shape)} in the file; the inputs belong to another geometry."
        )
    got, expected = got.double().cpu(), expected.double()
    difference = got - expected
    return Row(
        component,
        case,
        output,
        tuple(expected.shape),
        (difference.norm() / expected.norm()).item(),
        difference.abs().max().item(),
        tolerance,
    )


class _Dit:
    def __init__(self, files, dtype, device):
        self.model, self.device = load_dit(files, dtype=dtype, device=device, require_connector=False), device

    def __call__(self, fields):
        model, frame_rate = self.model, float(fields["frame_rate"].item()) if "frame_rate" in fields else 24.0
        latent, positions = fields["latent"].float().to(self.device), fields.get("positions")
        keyframe_idxs = fields.get("keyframe_idxs")
        in_tokens = latent.ndim == 3
        if in_tokens:
            if positions is None:
                raise CompareError(
                    "A 'latent' in tokens [B, T, C] tells no frames, rows and columns; add 'positions', or give it as [B, C, F, H, W]."
                )
            latent = latent.transpose(1, 2)[
                ..., None, None
            ]  # (B, T, C) -> (B, C, T, 1, 1): every token lies where its position says
            keyframe_idxs = (
                positions.float() if positions.ndim == 4 else positions.float().unsqueeze(-1).expand(-1, -1, -1, 2)
            )
            keyframe_idxs, frame_rate = (
                keyframe_idxs.expand(latent.shape[0], -1, -1, -1),
                1.0,
            )  # times are in seconds already
        elif positions is not None:
            yield "positions", *self._positions(tuple(latent.shape[2:]), positions.float(), keyframe_idxs, frame_rate)
        context = (
            fields["context"].to(self.device)
            if "context" in fields
            else model.preprocess_text_embeds(fields["features"].to(self.device, model.dtype), True)
        )
        sigma, mask = (value if value is None else value.to(self.device) for value in _noise_levels(fields, latent))
        v = model.velocity(
            latent, sigma, context, frame_rate, denoise_mask=mask, keyframe_idxs=keyframe_idxs,
            stg_blocks=tuple(fields["stg_blocks"].flatten().tolist()) if "stg_blocks" in fields else (),
        )  # fmt: skip
        level = sigma.view(-1, 1, 1, 1, 1) * (1 if mask is None else mask)
        for output, field, value in (("velocity", "expected", v), ("x0", "expected_x0", latent - level * v)):
            if field in fields:
                expected = fields[field]
                yield output, value.flatten(2).transpose(1, 2) if expected.ndim == 3 else value, expected

    def _positions(self, grid, theirs, keyframe_idxs, frame_rate):
        """(our midpoints, theirs), [B, 3, T] each."""
        coords = pixel_coords(*grid, self.model.vae_scale_factors)
        if keyframe_idxs is not None:
            coords = coords.repeat(keyframe_idxs.shape[0], 1, 1, 1)
            coords[:, :, -keyframe_idxs.shape[2] :] = keyframe_idxs
        theirs = theirs.mean(dim=-1) if theirs.ndim == 4 else theirs
        return token_positions(coords, frame_rate).expand_as(theirs), theirs


def _noise_levels(fields, latent):
    """(sigma [B], denoise mask [B, 1, F, H, W] or None) from whatever says them. Raises CompareError for levels outside 0 … 1."""
    batch, grid = latent.shape[0], latent.shape[2:]
    levels = {name: fields[name].float() for name in ("sigma", "timesteps") if name in fields}
    for name, value in levels.items():
        if value.max() > 1 or value.min() < 0:
            raise CompareError(
                f"'{name}' goes from {value.min():g} to {value.max():g}; noise levels here lie in 0 … 1, so divide timesteps by 1000."
            )
    timesteps = (
        levels["timesteps"].reshape(levels["timesteps"].shape[0], -1).expand(batch, -1)
        if "timesteps" in levels
        else None
    )
    sigma = levels["sigma"].reshape(-1).expand(batch) if "sigma" in levels else timesteps.amax(dim=1)
    if timesteps is not None and timesteps.shape[1] > 1:
        mask = timesteps / sigma.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return sigma, mask.unflatten(1, (1, *grid))
    mask = fields.get("denoise_mask")
    return sigma, None if mask is None else mask.float().reshape(mask.shape[0], 1, *mask.shape[-3:]).expand(
        batch, 1, *grid
    )


def _real_tokens(fields):
    """bool [B, n], True at real tokens, of an attention mask of ones and zeros or an additive one (zero at real tokens); None without."""
    mask = fields.get("attention_mask")
    if mask is None:
        return None
    mask = mask.reshape(-1, mask.shape[-1]) if mask.ndim != 4 else mask[:, 0, 0]  # additive ones come as [B, 1, 1, n]
    return mask == 0 if mask.is_floating_point() and mask.min() < 0 else mask != 0


class _Connector:
    def __init__(self, files, dtype, device):
        holders = [file for file in files if classify(file.names()).has("connector")]
        if not holders:
            raise CompareError(
                "The file has connector cases, but no checkpoint given holds an embeddings connector; add the one that does."
            )
        self.connector, self.dtype, self.device = load_connector(holders[0], dtype=dtype, device=device), dtype, device

    def __call__(self, fields):
        mask = _real_tokens(fields)
        context, _ = self.connector(
            fields["features"].to(self.device, self.dtype), None if mask is None else mask.to(self.device)
        )
        yield "context", context, fields["expected"]


class _Features:
    def __init__(self, files, dtype, device):
        holders = [(file, names) for file in files if (names := classify(file.names())["projection"])]
        if not holders:
            raise CompareError(
                "The file has features cases, but no checkpoint given holds a text projection; add the one that does."
            )
        (self.file, names), self.device, self.module = holders[0], device, None
        self.names = {name.removeprefix(PROJECTION): source for name, source in names.items()}

    def __call__(self, fields):
        hidden, mask, expected = fields["hidden_states"].float(), _real_tokens(fields), fields["expected"]
        if hidden.ndim == 4:  # (1, n, D, L) as the official code stacks them, or (L, 1, n, D)
            hidden = hidden[0].permute(2, 0, 1) if hidden.shape[0] == 1 else hidden.squeeze(1)
        expected = expected.squeeze(0) if expected.ndim == 3 else expected
        if mask is not None:
            real = mask[0]
            hidden, expected = hidden[:, real], expected[real] if expected.shape[0] == real.shape[0] else expected
        if self.module is None:
            self.module = self._projection(hidden.shape[0], hidden.shape[2])
        yield "features", self.module(hidden.to(self.device), self.device), expected

    def _projection(self, states, width):
        version = "2.3" if "video_aggregate_embed.weight" in self.names else "2.0"
        (weight,) = (source for name, source in self.names.items() if name.endswith(".weight"))
        features = self.file.shape(weight)[0]
        module = TextProjection(version, width, states, features, device="meta")
        assign(module, {name: self.file.load_packed(source, torch.float32) for name, source in self.names.items()})
        return module


class _Vae:
    def __init__(self, files, dtype, device):
        self.vae, self.dtype, self.device = load_vae(files, dtype=dtype, device=device), dtype, device

    def __call__(self, fields):
        for given, wanted in (("pixels", "expected_latent"), ("latent", "expected_pixels")):
            if wanted in fields and given not in fields:
                raise CompareError(f"A vae case expects '{wanted}' but gives no '{given}' to make it from; add it.")
        if "pixels" in fields and "expected_latent" in fields:
            yield "latent", self.vae.encode(fields["pixels"].to(self.device, self.dtype)), fields["expected_latent"]
        if "latent" in fields and "expected_pixels" in fields:
            yield "pixels", self.vae.decode(fields["latent"].to(self.device, self.dtype)), fields["expected_pixels"]


def render(rows, metadata=None):
    """The comparison as a table for people."""
    lines = []
    if metadata and metadata.get("reference"):
        lines += [f"reference: {metadata['reference']} ({metadata.get('dtype', 'float32')})", ""]
    width = max(len(f"{row.component}/{row.case}") for row in rows)
    lines.append(f"{'case':{width}}  {'output':9}  {'shape':24}  {'rel. error':>10}  {'largest':>9}  {'allowed':>9}")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        verdict = "" if row.passed else "  TOO LARGE"
        lines.append(
            f"{row.component + '/' + row.case:{width}}  {row.output:9}  {shape:24}  {row.error:10.2e}  {row.largest:9.2e}  {row.tolerance:9.0e}{verdict}"
        )
    return "\n".join(lines)


def make_inputs(path, checkpoints, seed=0):
    """Write the inputs of a set of cases that fit these checkpoints, without expected outputs; returns {name: tensor} as written.

    Run them through a reference, add the ``expected…`` tensors under the same cases, and compare. Values are seeded, float32 and
    of the size the networks see in use.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    files = [open_weights(checkpoint) for checkpoint in checkpoints]
    held = [classify(file.names()) for file in files]
    tensors = {}
    dits = [file for file, names in zip(files, held) if names.has("dit")]
    if dits:
        tensors |= _dit_inputs(_config(dits[0], files), generator)
    for file, names in zip(files, held):
        for name, source in names["projection"].items():
            if name.endswith(".weight"):
                states, width = _hidden_geometry(file.shape(source)[1], file.metadata)
                tensors["features/short/hidden_states"] = torch.randn(states, 9, width, generator=generator) * 4 + 0.5
        registers = names["connector"].get("video_embeddings_connector.learnable_registers")
        if registers:
            width = file.shape(registers)[1]
            tensors["connector/short/features"] = torch.randn(1, 9, width, generator=generator)
            tensors["connector/long/features"] = torch.randn(1, 300, width, generator=generator)
        if names.has("vae"):
            channels = file.shape(names["vae"]["per_channel_statistics.mean-of-means"])[0]
            tensors["vae/clip/pixels"] = torch.rand(1, 3, 9, 64, 96, generator=generator) * 2 - 1
            tensors["vae/clip/latent"] = torch.randn(1, channels, 2, 2, 3, generator=generator)
    if not tensors:
        raise CheckpointError(
            f"{', '.join(file.path.name for file in files)}: no part of LTX-2 to make inputs for; name the model's files."
        )
    with Output(path) as output:
        save_file(tensors, str(output.partial), {"layout": LAYOUT})
    return tensors


def _config(file, files):
    from ..transformer.config import config_from_shapes

    names = classify(file.names())
    return config_from_shapes(
        {canonical: file.shape(source) for canonical, source in names["dit"].items()}, file.metadata
    )


def _dit_inputs(config, generator):
    frames, height, width = 3, 4, 6
    sigma, fps = torch.tensor([0.725]), torch.tensor([24.0])
    latent = torch.randn(1, config.in_channels, frames, height, width, generator=generator)
    context = torch.randn(1, 64, config.context_dim, generator=generator)
    base = {"latent": latent, "context": context, "sigma": sigma, "frame_rate": fps}
    mask = torch.ones(1, 1, frames, height, width)
    mask[:, :, 0] = 0.2
    guide = pixel_coords(1, height, width, config.vae_scale_factors)
    guide[:, 0] += 8 * (frames - 1)  # an image that stands at the clip's last frame
    guided_mask = torch.cat((torch.ones(1, 1, frames, height, width), torch.zeros(1, 1, 1, height, width)), dim=2)
    guided = torch.cat((latent, torch.randn(1, config.in_channels, 1, height, width, generator=generator)), dim=2)
    block = min(OFFICIAL_STG_BLOCK[config.version], config.num_layers - 1)
    cases = {
        "plain": base,
        "first_frame_given": base | {"denoise_mask": mask},
        "keyframe": base | {"latent": guided, "denoise_mask": guided_mask, "keyframe_idxs": guide},
        "stg": base | {"stg_blocks": torch.tensor([block])},
    }
    return {f"dit/{case}/{field}": value.clone() for case, fields in cases.items() for field, value in fields.items()}


def _hidden_geometry(inputs, metadata):
    """(hidden states, width) of the text model whose flattened states are ``inputs`` numbers per token."""
    from ..text.config import SIZES
    from ..transformer.config import transformer_metadata

    for width, layers in SIZES:
        if width * (layers + 1) == inputs:
            return layers + 1, width
    width = transformer_metadata(metadata).get("caption_channels")
    if not width or inputs % width:
        raise CompareError(
            f"The text projection takes {inputs} numbers per token, which is no known Gemma-3 size; make this component's inputs by hand."
        )
    return inputs // width, width
