"""The LoRA node: any spelling of a LoRA for LTX-2 on the MODEL."""

from comfy_api.latest import io

from ..ltx2_core.sampling.finite import check_numbers
from . import folders
from .category import LOADERS
from .loaders import stamp


class LTX2GGUFLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFLoraLoader",
            display_name="LTX-2 GGUF LoRA Loader (Model)",
            category=LOADERS,
            description="Applies a LoRA for LTX-2 or LTX-2.3 to the model, whatever its keys are called, and says how many of its layers fit.",
            search_aliases=["ltx2", "ltx-2", "lora", "load lora", "ic-lora", "camera lora", "distilled lora", "gguf"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From 'LTX-2 GGUF Loader'. Several of these nodes can follow one another."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=folders.loras(),
                    tooltip="A safetensors file from models/loras. Keys of diffusers, PEFT, kohya and LyCORIS are understood as well as the released files'.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the model. 0 = not at all; negative values invert it.",
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The model with the LoRA.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name, strength_model):
        if strength_model == 0:
            return io.NodeOutput(model)
        from .host import internals, lora_file

        check_numbers(strength_model=strength_model)
        patched, warnings = lora_file.apply(model, folders.path("loras", lora_name), strength_model)
        for text in warnings:
            internals.notice(cls, text)
        return io.NodeOutput(patched)

    @classmethod
    def fingerprint_inputs(cls, lora_name, strength_model, model=None):
        return [strength_model, *stamp(("loras", lora_name))]
