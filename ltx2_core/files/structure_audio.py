"""Names, shapes and metadata of the audio VAE and the vocoder in an LTX-2 checkpoint, at any geometry. Standard library only.

``g`` is a ``structure.Geometry``. Source: headers of ``ltx-2-19b-dev.safetensors`` and ``ltx-2.3-22b-dev.safetensors``.
"""

AUDIO_VAE_PREFIX = "audio_vae."
LATENT_CHANNELS, LATENT_BINS, MEL_BINS, STEREO = 8, 16, 64, 2
BLOCK_KERNELS, DILATIONS = (3, 7, 11), (1, 3, 5)
FILTER_TAPS = 12
BAND_FFT = 512

# version -> (prefix, rates, kernels, anti-aliased activations) of each generator; the second one is the bandwidth extension.
GENERATORS = {
    "2.0": (("vocoder.", (6, 5, 2, 2, 2), (16, 15, 8, 4, 4), False),),
    "2.3": (
        ("vocoder.vocoder.", (5, 2, 2, 2, 2, 2), (11, 4, 4, 4, 4, 4), True),
        ("vocoder.bwe_generator.", (6, 5, 2, 2, 2), (12, 11, 4, 4, 4), True),
    ),
}


def _conv(name, outputs, inputs, kernel=3, inner=".conv"):
    yield f"{name}{inner}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}{inner}.bias", (outputs,)


def _res_block(name, inputs, outputs):
    yield from _conv(f"{name}.conv1", outputs, inputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", outputs, inputs, 1)


def audio_vae_shapes(g):
    """{name: shape} of the audio VAE, with its prefix."""
    widths = [g.audio_vae_channels * m for m in g.audio_vae_multipliers]
    last, shapes = len(widths) - 1, {}
    encoder, decoder = AUDIO_VAE_PREFIX + "encoder.", AUDIO_VAE_PREFIX + "decoder."
    shapes.update(_conv(encoder + "conv_in", widths[0], STEREO))
    shapes.update(_conv(decoder + "conv_in", widths[-1], LATENT_CHANNELS))
    for n, width in enumerate(widths):
        for block in range(g.audio_res_blocks):
            shapes.update(
                _res_block(f"{encoder}down.{n}.block.{block}", widths[max(0, n - 1)] if block == 0 else width, width)
            )
        if n < last:
            shapes.update(_conv(f"{encoder}down.{n}.downsample", width, width))
        for block in range(g.audio_res_blocks + 1):
            shapes.update(
                _res_block(f"{decoder}up.{n}.block.{block}", widths[min(n + 1, last)] if block == 0 else width, width)
            )
        if n:
            shapes.update(_conv(f"{decoder}up.{n}.upsample.conv", width, width))
    for side in (encoder, decoder):
        for block in (1, 2):
            shapes.update(_res_block(f"{side}mid.block_{block}", widths[-1], widths[-1]))
    shapes.update(_conv(encoder + "conv_out", 2 * LATENT_CHANNELS, widths[-1]))
    shapes.update(_conv(decoder + "conv_out", STEREO, widths[0]))
    for statistic in ("mean-of-means", "std-of-means"):
        shapes[f"{AUDIO_VAE_PREFIX}per_channel_statistics.{statistic}"] = (LATENT_CHANNELS * LATENT_BINS,)
    return shapes


def _activation(name, channels):
    yield f"{name}.act.alpha", (channels,)
    yield f"{name}.act.beta", (channels,)
    yield f"{name}.upsample.filter", (1, 1, FILTER_TAPS)
    yield f"{name}.downsample.lowpass.filter", (1, 1, FILTER_TAPS)


def _generator(prefix, width, kernels, snake):
    shapes = {f"{prefix}conv_pre.weight": (width, STEREO * MEL_BINS, 7), f"{prefix}conv_pre.bias": (width,)}
    for n, kernel in enumerate(kernels):
        channels = width >> (n + 1)
        shapes[f"{prefix}ups.{n}.weight"] = (2 * channels, channels, kernel)
        shapes[f"{prefix}ups.{n}.bias"] = (channels,)
        for j, size in enumerate(BLOCK_KERNELS):
            block = f"{prefix}resblocks.{n * len(BLOCK_KERNELS) + j}."
            for k in range(len(DILATIONS)):
                for conv in ("convs1", "convs2"):
                    shapes[f"{block}{conv}.{k}.weight"] = (channels, channels, size)
                    shapes[f"{block}{conv}.{k}.bias"] = (channels,)
                if snake:
                    for act in ("acts1", "acts2"):
                        shapes.update(_activation(f"{block}{act}.{k}", channels))
    channels = width >> len(kernels)
    if snake:
        shapes.update(_activation(prefix + "act_post", channels))
    else:
        shapes[prefix + "conv_post.bias"] = (STEREO,)
    shapes[prefix + "conv_post.weight"] = (STEREO, channels, 7)
    return shapes


def vocoder_shapes(g):
    """{name: shape} of the vocoder, with its prefix."""
    shapes = {}
    for (prefix, _, kernels, snake), width in zip(GENERATORS[g.version], g.vocoder_widths):
        shapes |= _generator(prefix, width, kernels, snake)
    if len(GENERATORS[g.version]) == 2:
        bins = BAND_FFT // 2 + 1
        shapes["vocoder.mel_stft.mel_basis"] = (MEL_BINS, bins)
        for basis in ("forward_basis", "inverse_basis"):
            shapes[f"vocoder.mel_stft.stft_fn.{basis}"] = (2 * bins, 1, BAND_FFT)
    return shapes


def audio_config(g):
    """The ``audio_vae`` and ``vocoder`` entries of the files' metadata ``config`` for this geometry."""
    described = []
    for (_, rates, kernels, snake), width in zip(GENERATORS[g.version], g.vocoder_widths):
        entry = {
            "upsample_initial_channel": width, "resblock": "AMP1" if snake else "1", "upsample_rates": list(rates),
            "resblock_kernel_sizes": list(BLOCK_KERNELS), "upsample_kernel_sizes": list(kernels),
            "resblock_dilation_sizes": [list(DILATIONS)] * len(BLOCK_KERNELS), "stereo": True,
        }  # fmt: skip
        described.append(
            entry
            | ({"use_tanh_at_final": False, "activation": "snakebeta", "use_bias_at_final": False} if snake else {})
        )
    vocoder = described[0]
    if len(described) == 2:
        band = {
            "apply_final_activation": False, "input_sampling_rate": 16000, "output_sampling_rate": 48000, "hop_length": 80, "n_fft": BAND_FFT,
            "win_size": BAND_FFT, "num_mels": MEL_BINS,
        }  # fmt: skip
        vocoder = {"vocoder": described[0], "bwe": described[1] | band}
    network = {
        "double_z": True, "mel_bins": MEL_BINS, "z_channels": LATENT_CHANNELS, "resolution": 256, "downsample_time": False, "in_channels": STEREO,
        "out_ch": STEREO, "ch": g.audio_vae_channels, "ch_mult": list(g.audio_vae_multipliers), "num_res_blocks": g.audio_res_blocks,
        "attn_resolutions": [], "dropout": 0.0, "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height",
    }  # fmt: skip
    preprocessing = {
        "audio": {
            "sampling_rate": 16000,
            "max_wav_value": 32768.0,
            "duration": 5.12,
            "stereo": True,
            "causal_padding": 3,
        },
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": MEL_BINS, "mel_fmin": 0, "mel_fmax": 8000},
    }
    audio_vae = {"model": {"params": {"ddconfig": network, "sampling_rate": 16000}}, "preprocessing": preprocessing}
    return {"audio_vae": audio_vae, "vocoder": vocoder}
