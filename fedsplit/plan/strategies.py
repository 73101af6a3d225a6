"""Which of Flower's strategies can aggregate the first layer, and what is known of each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which a simulation does while Ray starts
    pass


ADAPTIVE = ("FedAdam", "FedYogi", "FedAdagrad")
ROBUST = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")


NOISY = ("DifferentialPrivacyServerSideFixedClipping", "DifferentialPrivacyServerSideAdaptiveClipping")
"""Clip every device's step, average them with equal weights, add noise to the mean; see :func:`build_strategy`."""


PER_DEVICE = (*ROBUST, *NOISY)
"""Strategies that are not a weighted mean: they need one contribution per device."""


STRATEGIES = ("FedAvg", "FedAvgM", *ADAPTIVE, *PER_DEVICE)
