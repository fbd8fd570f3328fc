"""The LTX-2 video model without a host: weights, network, text encoder, VAE, sampling, converter, command line.

Imports ``quant``, never the host. Nothing is imported here, because parts of it (``plan``, ``structure``, ``cli``) must run with the
standard library alone. Read ``pipeline.py`` first.

    pipeline      prompt -> frames
    checkpoint    any file -> transformer          text_encoder, video_vae   the parts around it
    dit           the transformer                  connector                 text features -> context
    schedulers    noise levels                     sampling, guidance, conditioning
    offload       weights within a memory budget   tiling                    activations of the VAE within one
    convert       checkpoints -> GGUF              plan                      what a conversion keeps and how
    identify      what is this file?               cli                       the command line
"""
