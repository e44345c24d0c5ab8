"""Rules of a run's dispatch: whether the dispatcher that it names can serve it. No torch here."""

from comm.dispatch.registry import DISPATCHERS
from comm.dispatch.requirements import DispatchRequirementError
from train.config import TrainConfig
from train.config.errors import ConfigError


def check_exchange(config: TrainConfig) -> None:
    """Refuses an exchange that the run cannot have.

    Raises:
        ConfigError: a dispatcher that does not fit the run or this machine, or tokens that may touch too many nodes.
    """
    try:
        DISPATCHERS.get(config.dispatch.kind).check(config.dispatch, config.dispatch_site)
    except DispatchRequirementError as error:
        raise ConfigError(str(error)) from error
