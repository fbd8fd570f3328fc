"""One clip on several devices: Ulysses sequence parallelism, and passes of guidance on different groups of ranks.

plan.py       how ranks are used for a clip, decided from tokens, passes and ranks, and said in words
sequence.py   video tokens split over ranks; attention swaps heads for tokens
group.py      the ranks of a run: process groups, what is computed where, and how results meet
launch.py     starting a process per device, and one sentence when one of them fails
prompts.py    a file of prompts worked through line by line
"""
