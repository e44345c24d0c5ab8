"""An exponential moving average of the weights, on the host in float32, updated during the next step.

DeepSeek-V3 keeps one to see early how a model does after its learning rate has decayed (arXiv:2412.19437, section
3.2.3).
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from model.transformer import BIAS, Transformer, named_tensors


class ParameterEma:
    """Averages of the weights that this rank holds; it owns them, a copy of the weights, and the thread that averages.

    After an update the step waits only for the copy: averaging runs during the next one. The router's bias is no
    weight, and stands as it is after the last update.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        """Begins with the weights as they are.

        Args:
            model: this rank's part.
            decay: what an average keeps of itself in an update, from 0 to below 1.
        """
        self._model = model
        self._decay = decay
        weights = named_tensors(model)
        self._copies = {
            name: torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
            for name, weight in weights.items()
        }
        self._averages = {name: torch.empty(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._under_way: Future[None] | None = None
        self.follow_weights()

    def update(self) -> None:
        """Takes in the weights as an update has left them. Returns when they are copied.

        Waits for the average of the update before, if that is not done yet.
        """
        self.wait()
        for name, weight in named_tensors(self._model).items():
            self._copies[name].copy_(weight, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._under_way = self._worker.submit(self._average)

    def wait(self) -> None:
        """Waits until the averages are those of the last update.

        Raises:
            Exception: what went wrong in the worker.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def state(self) -> dict[str, Tensor]:
        """Averages by released name, float32 on the host: the tensors themselves, to be saved or filled in place.

        They stay as they are until the next `update`.
        """
        self.wait()
        return self._averages

    def loaded(self) -> None:
        """Follows a change of the tensors of `state`: nothing to do."""

    def follow_weights(self) -> None:
        """Restarts the averages from the weights as they are now."""
        self.wait()
        for name, weight in named_tensors(self._model).items():
            self._averages[name].copy_(weight)

    def close(self) -> None:
        """Ends the thread."""
        self.wait()
        self._worker.shutdown()

    @torch.no_grad()
    def _average(self) -> None:
        for name, average in self._averages.items():
            if name.endswith(BIAS):
                average.copy_(self._copies[name])
            else:
                average.mul_(self._decay).add_(self._copies[name].float(), alpha=1 - self._decay)
