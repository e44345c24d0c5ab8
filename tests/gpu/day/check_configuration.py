"""Composes and checks the configuration of a run, and starts nothing: `python -m tests.gpu.day.check_configuration`."""

import sys

from launch.compose import compose
from launch.config import read_config
from launch.errors import ConfigError


def main() -> int:
    """Reads overrides from the command line; the exit code is 2 if they compose to no valid configuration."""
    try:
        config = read_config(compose("train", sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{config.name}: {config.parallelism} on {config.cluster.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
