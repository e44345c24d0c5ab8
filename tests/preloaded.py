"""Imports what ranks and commands of tests need, once, in the server from which they are forked."""

import gc
import importlib
from contextlib import suppress

MODULES = (
    "torch",
    "torch.distributed",
    "numpy",
    "pytest",
    "torch._dynamo",
    "setuptools",  # extends the search path, and DeepSpeed imports it for an optimizer
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "train.run",
    "launch.config.compose",
    "launch.ranks.local",
    "tests.train.job",
    "tests.comm.laws",
    "tests.short_pictures",
)

gc.disable()  # collections took a fifth of the time of these imports
for name in MODULES:
    with suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
gc.enable()
