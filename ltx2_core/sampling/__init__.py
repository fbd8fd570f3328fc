"""From noise to a clean latent.

schedules.py     noise levels
samplers.py      the loops
guidance.py      combining predictions
conditioning.py  given frames and guides
settings.py      one run with everything decided
finite.py        not-a-number, and the layer it comes from
"""
