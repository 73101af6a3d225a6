"""Whether health monitoring survives dropping: is an exercise noticed as new that nobody has released before.

    python -m simulations health --seeds 0 1 2

Each exercise of the smart-watch data in turn is the novelty, of which no record is used before the test. People 1 and 2
give their records, from which the first layer learns (`donors`; `random`: it stays as it was drawn); devices of people
3..7 release their windows once, and the server learns from these and the donors'. Of people 8, 9 and 10 the first third
of each recording of a known exercise (4 to 8 windows of 2 s) calibrates their own device, unless a method is
`uncalibrated`; all that is measured is of the rest. Windows share no sample. The methods are in `detectors.py`.

- `window`, `precision`: area under the ROC curve, and average precision, of single windows; `episode`: of every 8
  consecutive windows. Within one device, averaged over devices, exercises and seeds.
- `alarms`, `found`: false alarms per day, and the share of episodes of the new exercise found, at the threshold for 10
  or 100 false alarms per device and day that the other held-out people's normal episodes give. `noticed`, `delay`: how
  often the new exercise is noticed at all when it follows upon a known one, and the seconds that this takes (median).
- `PSNR`, `identified`, `leverage`: of the audit's attacks on 100 private windows, released the same way.

Both the calibration and the normal records tested are of one session: what another day adds is not in this data.
Two more cases, not proofs: tumours as a table, and one recorded series with one anomaly, if the package aeon is there
(`pip install --no-deps aeon==1.6.0`).

Takes 24 CPU minutes on one core.
"""

from simulations.health.measuring import Options, study
from simulations.health.picture import draw
from simulations.health.report import tables

__all__ = ["Options", "draw", "study", "tables"]
