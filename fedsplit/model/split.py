"""A network cut after its first layer."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from fedsplit.common.errors import ConfigError
from fedsplit.model.activations import ACTIVATIONS
from fedsplit.model.layer import FirstLayer


@dataclass(frozen=True)
class SplitModel:
    """A network cut after its first layer.

    Attributes
    ----------
    first_layer : FirstLayer
        Runs on the devices.
    trunk : nn.Module
        Everything after the cut, server only: takes ``(batch, *cut_shape)``, returns ``(batch, outputs)``.
    """

    first_layer: FirstLayer
    trunk: nn.Module

    @classmethod
    def from_sequential(cls, net: nn.Sequential, input_shape: tuple[int, ...], cut: int = 1) -> "SplitModel":
        """Cut an existing (for example pretrained) network after its first layer and that layer's activation.

        Parameters
        ----------
        net : nn.Sequential
            Its first module is Linear, Conv1d or Conv2d; a Flatten before a Linear is left out.
        input_shape : tuple of int
            The shape of one record.
        cut : int
            The number of layers that devices compute: 1.

        Raises
        ------
        ConfigError
            If ``cut`` is not 1 or the network has fewer than two parts.

        Examples
        --------
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> SplitModel.from_sequential(net, input_shape=(4,)).trunk
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=True)
        )
        """
        if cut != 1:
            raise ConfigError(f"cut must be 1 (only the first layer can stay on the device), got {cut}")
        if not isinstance(net, nn.Sequential) or not len(net):
            raise ConfigError("from_sequential needs an nn.Sequential that is not empty")
        modules: list[nn.Module] = list(net)
        if isinstance(modules[0], nn.Flatten) and len(modules) > 1 and isinstance(modules[1], nn.Linear):
            modules = modules[1:]  # a linear layer takes records flattened by itself
        has_activation = len(modules) > 1 and type(modules[1]) in ACTIVATIONS.values()
        activation = modules[1] if has_activation else nn.Identity()
        trunk = nn.Sequential(*modules[1 + has_activation :])
        if not len(trunk):
            raise ConfigError("from_sequential needs at least one module after the first layer and its activation")
        return cls(FirstLayer(modules[0], activation, tuple(input_shape)), trunk)

    def forward(self, x: Tensor) -> Tensor:
        """Run the whole network on ``(batch, *input_shape)``, undropped: for comparisons, not for devices."""
        first = self.first_layer
        return cast(Tensor, self.trunk(first.activation(first.outputs(x))))
