"""Write docs/fidelity.md: component x version x precision x reference -> error, measured now, with the references' versions.

    COMFYUI_PATH=<ComfyUI source tree> python benchmarks/fidelity.py

Reduced models with random, non-degenerate weights are put into this pack and into the references (the host's own networks,
diffusers, transformers) and given the same inputs. The error is ||ours - reference|| / ||reference||; for bfloat16 both our error
and the reference's own are given against float32. The tests hold the same comparisons to limits; this script shows the numbers.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from common import load_pack

load_pack()

import hostenv
import reference_dit as ref

VERSIONS = ("2.0", "2.3")
SIGMA = torch.tensor([0.7, 0.31])
FPS = 24.0
TEXT = ROOT / "benchmarks" / "fidelity_notes.md"


class Table:
    """Rows of (component, case, version, precision, reference, error)."""

    def __init__(self):
        self.rows = []

    def add(self, component, case, version, precision, reference, value):
        value = value if isinstance(value, str) else f"{value:.1e}"
        self.rows.append((component, case, version, precision, reference, value))
        print("  ".join(self.rows[-1]), flush=True)

    def markdown(self):
        lines = ["| component | case | version | precision | reference | relative error |", "|---|---|---|---|---|---|"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])


def worst(errors):
    """The largest of several errors (one per geometry or shape)."""
    return max(errors)


def transformer(table, references):
    """Whole network: uniform and per-token timesteps, STG, bfloat16."""
    mask = torch.ones(2, 1, 4, 5, 6)
    mask[:, :, 0], mask[:, :, 2] = 0.3, 0.0
    region = torch.ones(2, 1, 4, 5, 6)
    region[..., 1:3, :] = 0.25
    cases = {"uniform timestep": None, "conditioned frames (strengths 0.7 and 1)": mask, "a masked region": region}
    for version in VERSIONS:
        for reference in references:
            for case, case_mask in cases.items():
                errors = []
                for index in range(len(ref.GEOMETRIES[version])):
                    config, model = ref.ours(version, index)
                    latent, context = ref.inputs(config)
                    v = model.velocity(latent, SIGMA, context, FPS, denoise_mask=case_mask)
                    errors.append(
                        ref.relative_error(
                            v, ref.reference_velocity(reference, version, index, latent, SIGMA, context, mask=case_mask)
                        )
                    )
                table.add("transformer", case, version, "float32", reference, worst(errors))
        config, model = ref.ours(version)
        latent, context = ref.inputs(config)
        v = model.velocity(latent, SIGMA, context, FPS, stg_blocks=(1,))
        table.add("transformer", "STG in one block", version, "float32", "diffusers",
                  ref.relative_error(v, ref.reference_velocity("diffusers", version, 0, latent, SIGMA, context, stg_blocks=(1,))))  # fmt: skip
        config, model = ref.ours(version, 2)
        half = ref.our_model(config, seed=1, dtype=torch.bfloat16)
        latent, context = ref.inputs(config, frames=6, height=6, width=8)
        exact = model.velocity(latent, SIGMA, context, FPS)
        ours = ref.relative_error(half.velocity(latent, SIGMA, context, FPS), exact)
        for reference in references:
            theirs = ref.reference_velocity(
                reference, version, 2, latent.bfloat16(), SIGMA, context.bfloat16(), dtype=torch.bfloat16
            )
            table.add(
                "transformer",
                "bfloat16 against float32",
                version,
                "bfloat16",
                reference,
                f"ours {ours:.1e}, reference {ref.relative_error(theirs.float(), exact):.1e}",
            )


def guides(table):
    """Keyframe guides as the host's node appends them."""
    import host_guides as g

    cases = {
        "image guide": "an image in the middle", "clip guide at strength 0.4": "a clip at strength 0.4", "three guides, one masked": "three guides",
        "dilated IC-LoRA reference, masked": "a dilated reference with a mask",
    }  # fmt: skip
    for version in VERSIONS:
        config = ref.tiny_config(version, channels=g.CHANNELS)
        model = ref.our_model(config, seed=3)
        theirs = ref.host_model(config, model.state_dict())
        context = ref.inputs(config, batch=1)[1]
        for case, name in cases.items():
            latent, mask, values = g.add_guides(g.GUIDES[name])
            extra = {
                "keyframe_idxs": values["keyframe_idxs"],
                "guide_attention_entries": values["guide_attention_entries"],
            }
            timestep = (mask * g.SIGMA.view(1, 1, 1, 1, 1)).flatten(2).transpose(1, 2)
            expected = ref.host_velocity(theirs, config, latent, timestep, context, g.FPS, denoise_mask=mask, **extra)
            table.add(
                "guides",
                case,
                version,
                "float32",
                "host",
                ref.relative_error(
                    model.velocity(latent, g.SIGMA, context, g.FPS, denoise_mask=mask, **extra), expected
                ),
            )


def connector(table, references):
    """Short, full and ragged prompts."""
    import connector_references as c

    for version in VERSIONS:
        _, model = ref.ours(version)
        config = model.config.connector
        rows = [c.features(config.inner_dim, 1, n, seed=n)[0] for n in (3, 200, 1024)]
        if "host" in references:
            theirs = ref.theirs("host", version).video_embeddings_connector
            errors = [
                ref.relative_error(model.video_embeddings_connector(row[None])[0], theirs(row[None])[0]) for row in rows
            ]
            table.add("connector", "prompts of 3, 200 and 1024 tokens", version, "float32", "host", worst(errors))
        x, additive = c.padded(rows, 1024, "left")
        expected = c.diffusers_connector(config, model.video_embeddings_connector.state_dict())(x, additive)[0]
        table.add("connector", "a batch of these, left-padded", version, "float32", "diffusers",
                  ref.relative_error(model.video_embeddings_connector(x, (additive[:, 0, 0] == 0).int())[0], expected))  # fmt: skip


def text(table, references):
    """Gemma's hidden states and the feature extractors."""
    import projection_references as t
    import reference_gemma as g

    model = g.reference(window=7)
    ids = torch.randint(0, g.VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    want, got = g.reference_states(model, ids), g.ours(model, sliding_window=7, rope_factor=8.0)(ids)
    errors = [ref.relative_error(got[i], want[i]) for i in range(len(want))]
    table.add("Gemma-3", "every hidden state, sliding window in use", "both", "float32", "transformers", worst(errors))
    for version in VERSIONS:
        module, hidden = t.projection(version), t.hidden_states()
        table.add(
            "feature extractor",
            "left-padded reference",
            version,
            "float32",
            "diffusers",
            ref.relative_error(module(hidden), t.diffusers_features(version, module, hidden)),
        )
        if "host" in references:
            table.add(
                "feature extractor",
                "left-padded reference",
                version,
                "float32",
                "host",
                ref.relative_error(module(hidden), t.host_features(version, module, hidden)),
            )


def vae(table, references):
    """Encode and decode, several lengths and shapes."""
    import vae_references as v

    clips = [(1, 64, 96), (9, 96, 64), (33, 64, 128)]
    for version in VERSIONS:
        ours = v.tiny_vae(version)
        pairs = {"diffusers": (v.diffusers_vae(ours), v.diffusers_encode, v.diffusers_decode)}
        if "host" in references:
            pairs["host"] = (v.host_vae(ours), lambda m, x: m.encode(x), lambda m, z: m.decode(z))
        for reference, (model, encode, decode) in pairs.items():
            results = []
            for clip in clips:
                pixels = v.random_clip(*clip)
                latent = encode(model, pixels)
                results.append(
                    (v.error(ours.encode(pixels), latent), v.error(ours.decode(latent), decode(model, latent)))
                )
            table.add("VAE", "encode 1, 9, 33 frames", version, "float32", reference, worst(e for e, _ in results))
            table.add("VAE", "decode 1, 9, 33 frames", version, "float32", reference, worst(d for _, d in results))


def schedules(table, references):
    """Sigmas for several token counts; the error is the largest absolute difference."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from ltx2_gguf.ltx2_core.sampling import schedules as schedulers

    differences = []
    for tokens in (1024, 4096, 6144, 14080):
        theirs = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        )
        theirs.set_timesteps(sigmas=[1 - i / 30 for i in range(30)], mu=schedulers.shift_for_tokens(tokens))
        differences.append((schedulers.ltx2_sigmas(30, tokens) - theirs.sigmas.float()).abs().max().item())
    table.add(
        "schedule", "30 steps, 1024 to 14080 tokens (absolute)", "both", "float32", "diffusers", worst(differences)
    )
    if "host" in references:
        from comfy_extras.nodes_lt import LTXVScheduler

        differences = [
            (schedulers.ltx2_sigmas(steps) - LTXVScheduler.execute(steps, 2.05, 0.95, True, 0.1).args[0])
            .abs()
            .max()
            .item()
            for steps in (8, 20, 30, 40)
        ]
        table.add("schedule", "8 to 40 steps, 4096 tokens (absolute)", "both", "float32", "host", worst(differences))


def denoising(table):
    """Whole runs of eight steps: the error of the final latent."""
    import denoising_loops as d
    from ltx2_gguf.ltx2_core.sampling import schedules as schedulers

    for version in VERSIONS:
        config, model = ref.ours(version)
        noise, context = ref.inputs(config, 1, 3, 3, 4, text=16)
        _, negative = ref.inputs(config, 1, 3, 3, 4, text=16, seed=9)
        mask = torch.ones(1, 1, 3, 3, 4)
        mask[:, :, 0] = 0.3
        clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
        runs = {
            "8 distilled steps": (schedulers.distilled_sigmas(), noise, None, None, (1.0, 0.0, 0.0, ())),
            "8 steps, CFG 3, STG 1, rescale 0.7": (schedulers.ltx2_sigmas(8), noise, None, None, (3.0, 1.0, 0.7, (1,))),
            "the same, first frame at strength 0.7": (
                schedulers.ltx2_sigmas(8),
                torch.lerp(clean, noise, mask),
                mask,
                clean,
                (3.0, 1.0, 0.7, (1,)),
            ),
        }
        for case, (sigmas, x, m, c, settings) in runs.items():
            ours = d.our_loop(model, sigmas, x, context, negative, m, c, *settings)
            theirs = d.reference_loop(version, sigmas, x, context, negative, m, c, *settings)
            table.add("denoising", case, version, "float32", "diffusers", ref.relative_error(ours, theirs))


def versions(references):
    """Name and version of everything that was compared."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    if "host" in references:
        import comfyui_version

        found["host (ComfyUI)"] = comfyui_version.__version__
    return found


def main():
    parser = argparse.ArgumentParser(description="Measure this pack against its references and write docs/fidelity.md.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "fidelity.md")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tiny tensors
    references = ["diffusers"]
    if hostenv.host_path() is not None:
        hostenv.import_host()
        references.append("host")
    else:
        print("COMFYUI_PATH names no ComfyUI source tree: the host is left out.", file=sys.stderr)
    table = Table()
    with torch.no_grad():
        transformer(table, references)
        if "host" in references:
            guides(table)
        connector(table, references)
        text(table, references)
        vae(table, references)
        schedules(table, references)
        denoising(table)
    listed = "\n".join(f"- {name} {version}" for name, version in versions(references).items())
    args.out.write_text(TEXT.read_text("utf-8").format(versions=listed, table=table.markdown()), "utf-8")
    print(f"\n{args.out}: {len(table.rows)} rows")


if __name__ == "__main__":
    main()
