"""Keeps an average of the weights on the host (arXiv:2412.19437, section 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from model.transformer import BIAS, Transformer, named_tensors


class ParameterEma:
    """The moving average of the weights that this rank holds.

    It owns the averages, a copy of the weights on the host, and a thread. After an update, the step waits only for the
    copy; the thread averages during the next step. The router bias is not a weight and is copied without averaging.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        """Starts with the present weights; `decay`, from 0 to below 1, is the weight of the old average."""
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
        """Waits for the average of the previous update, copies the weights, and starts to average them."""
        self.wait()
        for name, weight in named_tensors(self._model).items():
            self._copies[name].copy_(weight, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # host sync
        self._under_way = self._worker.submit(self._average)

    def wait(self) -> None:
        """Waits until the averages include the last update, and raises the error of the thread."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def state(self) -> dict[str, Tensor]:
        """Returns the averages by released name, float32 on the host, unchanged until `update`."""
        self.wait()
        return self._averages

    def loaded(self) -> None:
        """Does nothing, because nothing else depends on the tensors of `state`."""

    def follow_weights(self) -> None:
        """Restarts the averages from the present weights."""
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
