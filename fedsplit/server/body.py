"""The server's half where labels stay at home: all of the trunk but its last layer, in steps of one batch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.seeds import seed_of
from fedsplit.model.head import Head, cut_head
from fedsplit.server.batches import Batches
from fedsplit.server.trunk import Trunk, thinned, trunk_outputs


@dataclass(frozen=True)
class _Step:
    """A step that waits for the gradients at its features, which are in the order of ``rows``."""

    rows: IntArray
    cells: IntArray
    positions: IntArray
    cut: Tensor
    features: Tensor


class Body(Trunk):
    """A trunk whose last layer computes on the devices; its parameters stay here, with their optimizer.

    It must be one that :func:`fedsplit.model.head.cut_head` cuts.
    """

    _open: _Step | None = None
    _random: Tensor | None = None
    """State of torch's generator after a step, with which the round's next one goes on."""

    @cached_property
    def _cut(self) -> tuple[nn.Sequential, nn.Linear]:
        return cut_head(self.module)

    @cached_property
    def head(self) -> Head:
        """The shape of the last layer."""
        return Head.of(self.module, self.task)

    @property
    def head_parameters(self) -> FloatArray:
        """The head's parameters as one float32 vector; see :class:`fedsplit.model.head.Head`."""
        return np.concatenate([p.detach().numpy().ravel() for p in self._cut[1].parameters()]).astype(np.float32)

    def train_features(self, batches: Batches, round_number: int, epoch: int = 0) -> FloatArray:
        """Begin a step, and return the features ``(records, features)`` that the body makes of a round's records.

        Parameters
        ----------
        batches : Batches
            The round's records.
        round_number : int
        epoch : int
            Counts the round's steps from 0.

        Raises
        ------
        RunError
            If the features are not finite.
        """
        self._begin(round_number)
        # as in Trunk.train: the same order and the same random numbers
        rows = np.random.default_rng(seed_of(self.seed, "order", round_number, epoch)).permutation(len(batches))
        outputs, cells, positions = batches.dense(rows)
        cut = torch.from_numpy(outputs).reshape(-1, *self.cut_shape).requires_grad_()
        with torch.random.fork_rng(devices=[]):
            if epoch == 0 or self._random is None:
                torch.manual_seed(seed_of(self.seed, "trunk", round_number))
            else:
                torch.set_rng_state(self._random)
            found = self._cut[0](thinned(cut, self.options.thinning))
            self._random = torch.get_rng_state()
        self._open = _Step(rows, cells, positions, cut, found)
        features = np.empty(tuple(found.shape), dtype=np.float32)
        features[rows] = found.detach().numpy()
        self._check_finite(round_number, 0.0, features)
        return features

    def learn(
        self, batches: Batches, gradients: FloatArray, head: NDArray[np.float64], count: int, round_number: int
    ) -> FloatArray:
        """End the step that :meth:`train_features` began, with the mean over ``count`` records.

        Parameters
        ----------
        batches : Batches
            As then.
        gradients : float32 array (records, features)
            Of the summed loss at the features; zero where a node has not answered.
        head : float64 array (parameters,)
            Of the loss summed over the same records at the head's parameters.
        count : int

        Returns
        -------
        float32 array (sent outputs,)
            Gradients of the summed loss at the outputs sent.

        Raises
        ------
        RunError
            If gradients or parameters are no longer finite.
        """
        step, self._open = self._open, None
        assert step is not None
        self.optimizer.zero_grad()
        used = 0
        for parameter in self._cut[1].parameters():
            mean = head[used : used + parameter.numel()] / count
            parameter.grad = torch.from_numpy(mean.astype(np.float32)).reshape(parameter.shape)
            used += parameter.numel()
        step.features.backward(torch.from_numpy(gradients[step.rows] / np.float32(count)))  # type: ignore[no-untyped-call]
        self.optimizer.step()
        assert step.cut.grad is not None
        cut = np.zeros(len(batches.values), dtype=np.float32)
        cut[step.positions] = step.cut.grad.flatten().numpy()[step.cells] * count
        self._check_finite(round_number, 0.0, cut)
        return cut

    def test_features(self, batches: Batches) -> FloatArray:
        """Return the features ``(records, features)`` of released test records."""
        self.module.eval()
        return trunk_outputs(self._cut[0], self.cut_shape, batches)
