"""Rules for a run's dispatcher. Imports no torch."""

from comm.dispatch.registry import DISPATCHERS
from comm.dispatch.requirements import DispatchRequirementError
from train.config import TrainConfig
from train.config.errors import ConfigError


def check_exchange(config: TrainConfig) -> None:
    """Rejects a dispatcher that cannot serve the run."""
    try:
        DISPATCHERS.get(config.dispatch.kind).check(config.dispatch, config.dispatch_site)
    except DispatchRequirementError as error:
        raise ConfigError(str(error)) from error
