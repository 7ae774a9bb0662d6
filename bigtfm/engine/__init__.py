"""The only place that imports deepspeed: process group, engine, checkpoints.

Before that its chatter is turned off: what it only warns of is checked before, and its errors are raised.
"""

import os
import warnings

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
warnings.filterwarnings(
    "ignore", category=FutureWarning, module="torch.distributed"
)  # names that it uses are renamed
