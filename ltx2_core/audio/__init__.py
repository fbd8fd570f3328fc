"""Audio VAE and vocoder: waveforms to latents and back, in float32.

config.py        geometry from names and shapes
autoencoder.py   mel spectrogram <-> latent
vocoder.py       mel spectrogram -> waveform (2.0: HiFi-GAN; 2.3: BigVGAN with bandwidth extension)
mel.py           waveform -> mel spectrogram, and resampling
model.py         the three together: encode and decode
"""
