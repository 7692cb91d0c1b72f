"""One thread a process: the suite runs on two cores, several processes at a time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("ci")
