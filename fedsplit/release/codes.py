"""How a value that leaves stands on the wire: as a float of the run's dtype, or as a code of few bits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.common.errors import ConfigError

_FLOAT_BITS = {"float16": 16, "float32": 32}
_ROUNDING = {"float16": 2.0**-11, "float32": 2.0**-24}  # largest relative error of a value that is not subnormal
_ARITHMETIC = 2.0**-19  # error of a device's own float32 outputs
_SUBNORMAL = {"float16": 2.0**-39, "float32": 0.0}  # and error of others, over the record's largest value


@dataclass(frozen=True)
class Code:
    """Floats (``bits`` 0), or levels of ``bits`` bits: a level is ``code * 2^(1 - bits)``, code 0..2^bits - 1.

    A code of 0 is an output of zero and is not sent: the bitmap tells it.

    Attributes
    ----------
    bits : int
        In 0..8.

    Raises
    ------
    ConfigError
        If ``bits`` is not in 0..8.
    """

    bits: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 8:
            raise ConfigError(f"the bits of a code must be in 0..8, got {self.bits}")

    @property
    def floats(self) -> bool:
        """Whether values are floats, which have one exponent per record beside them."""
        return self.bits == 0

    @property
    def exact(self) -> bool:
        """Whether a value sent is an equation in the record's numbers: one bit is only an inequality."""
        return self.bits != 1

    @property
    def exponent(self) -> int:
        """The power of two that a code is multiplied by."""
        return 1 - self.bits

    @property
    def step(self) -> float:
        """The distance between two levels."""
        return float(2.0**self.exponent)

    def rounded(self, outputs: FloatArray) -> FloatArray:
        """Round outputs that are not negative up to the levels: one bit tells zero from above zero."""
        if self.floats:
            return outputs
        step = np.float32(self.step)
        return np.asarray(np.minimum(np.ceil(outputs / step), np.float32(2**self.bits - 1)) * step, np.float32)

    def levels(self, values: FloatArray) -> NDArray[np.uint8]:
        """Return the codes of values that stand on levels above zero; raises ConfigError of others."""
        codes = values * np.float32(1 / self.step)
        if not ((codes >= 1) & (codes < 2**self.bits) & (codes == np.floor(codes))).all():
            raise ConfigError(f"the policy's values are not levels of its code of {self.bits} bits")
        return np.asarray(codes, dtype=np.uint8)

    def sent_bits(self, dtype: str) -> int:
        """Return how many bits a value takes beside the bitmap: 0 of a one-bit code, since those sent are all 1."""
        return 0 if self.bits == 1 else self.any_bits(dtype)

    def any_bits(self, dtype: str) -> int:
        """Return log2 of how many values an output can have on the wire, zero among them."""
        return self.bits or _FLOAT_BITS[dtype]

    def record_bits(self, dtype: str) -> int:
        """Return the bits of what is sent once per record: the exponent that float16 values share."""
        return 16 if self.floats and dtype == "float16" else 0

    def nbytes(self, values: IntArray, size: int) -> IntArray:
        """Return the bytes that numbers of values take; ``size`` is that of a float."""
        return size * values if self.floats else -(-values * self.sent_bits("") // 8)

    def centre(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean outputs behind values as sent: a level stands for all between the one below and itself."""
        return values if self.floats else values - self.step / 2

    def error(self, values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
        """Return the standard deviation of a record's outputs around :meth:`centre`; infinite if unbounded."""
        if self.floats:
            largest = float(np.abs(values).max(initial=0))
            return np.maximum(_ROUNDING[dtype] * np.abs(values), _SUBNORMAL[dtype] * largest)
        return np.where(self._inner(values), self.step / 12**0.5, np.inf)

    def bounds(self, values: NDArray[np.float64], dtype: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return between which outputs a record's values as sent were: the last level has no end."""
        if self.floats:
            error = self.error(values, dtype) + _ARITHMETIC * (1 + np.abs(values))
            return values - error, values + error
        return values - self.step, np.where(self._inner(values), values, np.inf)

    def _inner(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which levels are not the last; of a one-bit code none."""
        return np.asarray(values < (2**self.bits - 1) * self.step)
