"""What a run's schedule is made for. No torch here."""

from dataclasses import replace

from dualpipe.simulate.costs import CostModel, uniform
from train.config import TrainConfig


def nominal_costs(config: TrainConfig, num_stages: int) -> CostModel:
    """The configured costs of each of so many stages.

    Exchange takes time only where experts are shared out, and is no more than computation where groups run one
    member after the other.
    """
    costs = config.costs
    if config.parallelism.expert == 1:
        costs = replace(costs, exchange=0.0)
    if config.schedule.pairing == "sequential":
        forward, backward = costs.forward + costs.exchange, costs.backward_input + costs.exchange
        costs = replace(costs, forward=forward, backward_input=backward, exchange=0.0)
    return uniform(costs, config.parallelism.pipeline, num_stages)
