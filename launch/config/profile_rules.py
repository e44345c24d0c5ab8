"""What a run may record of its steps. No torch here."""

from train.config import TrainConfig
from train.config.errors import ConfigError


def check_profile(config: TrainConfig) -> None:
    """Refuses steps and ranks that the run does not have.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    steps, world = config.task.steps, config.parallelism.world_size
    for key, least, most, chosen in (
        ("profile.steps", 1, steps, config.profile.steps),
        ("profile.ranks", 0, world - 1, config.profile.ranks),
    ):
        for number in chosen:
            if not least <= number <= most:
                nearest = min(max(number, least), most)
                raise ConfigError(
                    f"{key}: each must be from {least} to {most}, one is {number}; nearest valid: {nearest}"
                )
        if len(set(chosen)) < len(chosen):
            once = ",".join(map(str, dict.fromkeys(chosen)))
            raise ConfigError(
                f"{key}: must name each at most once, is [{','.join(map(str, chosen))}]; nearest valid: [{once}]"
            )
