"""Prints what the project would run with on this machine: `python -m bench.gpu.day.environment`."""

import sys
from importlib import import_module
from importlib.util import find_spec

import torch

PACKAGES = "hydra omegaconf deepspeed wandb tokenizers safetensors rich flash_attn deep_gemm deep_ep pytest xdist"
MODULES = ("launch.config.compose", "train.run", "train.optim.zero1", "kernels.gemm")


def main() -> int:
    """Prints versions, packages and imports that fail; the exit code is 1 if a module cannot be imported."""
    python = sys.version.split()[0]
    print(f"python {python}, torch {torch.__version__}, cuda {torch.version.cuda}, GPU: {torch.cuda.is_available()}")
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        print(f"{name} {capability}, cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}")
    if find_spec("triton") is not None:
        print("triton", import_module("triton").__version__)
    for package in PACKAGES.split():
        print(f"  {package}: {'installed' if find_spec(package) else 'missing'}")
    failed = 0
    for module in MODULES:
        try:
            import_module(module)
        except Exception as error:  # reported, and the other modules are tried
            failed += 1
            print(f"  cannot import {module}: {type(error).__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
