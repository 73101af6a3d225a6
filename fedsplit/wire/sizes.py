"""How long the messages of devices are, as if each was alone on its node.

A simulation packs many devices into one message; a device on its own pays for the weights, the heads and a sum of
gradients itself. The sizes are those of :meth:`Download.to_bytes` and :meth:`Upload.to_bytes`, and of their like for
labels at home, which a test compares.
"""

from dataclasses import dataclass

import numpy as np

from fedsplit.common.arrays import IntArray
from fedsplit.release.codes import Code
from fedsplit.wire.ledger import Ledger

_HEAD, _ONE, _TWO = 6, 6, 10  # bytes of a payload's head, and of the entry of an array with one axis or two


@dataclass(frozen=True)
class Sizes:
    """What all devices have in common.

    Attributes
    ----------
    parameters, width : int
        Of the first layer.
    value : int
        Bytes of a value at the cut: 2 or 4.
    bits : int
        Of a released value's code; 0: it is sent as a value.
    columns : int or None
        Of a record's target; None: one class; 0: labels stay at home.
    """

    parameters: int
    width: int
    value: int
    bits: int
    columns: int | None

    def download(self, rows: IntArray, blocks: IntArray, values: IntArray) -> IntArray:
        """Return the bytes of messages.

        Parameters
        ----------
        rows : int64 array (devices,)
            1 where a chunk is asked for, else 0.
        blocks, values : int64 arrays (devices,)
            Pending chunks, and the cut gradients of all of them.
        """
        fixed = _HEAD + (_ONE + 6 * 8) + (_ONE + 4 * self.parameters) + _TWO
        block = 5 * _ONE + 2 * 8 + 4 + 8 + 4
        return fixed + 16 * rows + block * blocks + self.value * values

    def upload(
        self, records: IntArray, values: IntArray, failed: IntArray, refused: IntArray, sums: IntArray
    ) -> IntArray:
        """Return the bytes of answers.

        Parameters
        ----------
        records, values : int64 arrays (devices,)
            That are released.
        failed, refused : int64 arrays (devices,)
            1 where the device sat out, and the reasons for which its guard refused records.
        sums : int64 array (devices,)
            1 where a gradient is sent.
        """
        fixed = _HEAD + (_ONE + 8) + (_ONE + 8 * len(Ledger._fields)) + 2 * _ONE + _TWO + (_ONE + 8)
        release = 6 * _ONE + _TWO  # devices, records, targets, counts, bitmap, codes, exponents
        targets = 4 * (1 if self.columns is None else self.columns)
        record = targets + (2 if self.width <= 0xFFFF else 4) + -(-self.width // 8)
        code = Code(self.bits)
        codes, record = code.nbytes(values, self.value), record + 2 * code.floats  # an exponent
        gradient = 2 * _ONE + _TWO + (4 + 8 + 8 * self.parameters) * sums
        # without records nobody knows that targets have columns, but where a guard has refused them all: 4 bytes more
        devices = (8 if self.columns is None else 8 + _TWO - _ONE) * (records > 0).astype(np.int64)
        return fixed + 4 * failed + 12 * refused + release + devices + record * records + codes + gradient

    def head_download(self, records: IntArray, features: int, head: int) -> IntArray:
        """Return the bytes of questions about labels, where these are at home.

        Parameters
        ----------
        records : int64 array (devices,)
            That are asked about.
        features, head : int
            Of a record, and parameters of the trunk's last layer.
        """
        fixed = _HEAD + (_ONE + 4 * 8) + (_ONE + 4) + (_ONE + 8) + (_ONE + 4 * head)
        return fixed + self._rows(records, features)

    def head_upload(self, records: IntArray, features: int, head: int) -> IntArray:
        """Return the bytes of the answers to :meth:`head_download`.

        Parameters
        ----------
        records : int64 array (devices,)
            Records that each device released.
        features : int
            The last layer's inputs.
        head : int
            The last layer's parameters.
        """
        fixed = _HEAD + (_ONE + 3 * 8) + (_ONE + 8) + (_ONE + 8 * head)
        return fixed + self._rows(records, features)

    def _rows(self, records: IntArray, columns: int) -> IntArray:
        return _TWO + _ONE + (self.value * columns + 2) * records
