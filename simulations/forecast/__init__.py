"""Whether a forecast survives dropping: the mean venous pressure of the next second, on pigs that are held out.

    python -m simulations forecast --seeds 0 1 2

Twelve pigs give their records, of which first layers learn; those of 24 others are released once, under each policy,
and the trunk learns from all; 16 pigs are held out (`configs/pig-forecast.toml`). Beside them, without any privacy:

- `persistence`: the pressure stays as it is. `mean change`: it changes as it does on average in training.
- `ridge`: a linear model of whole windows, its ridge chosen by leaving training pigs out; `all windows`: it learns also
  from windows that overlap, one every 0.1 s, as nothing else here does.
- `central`: whole networks trained end to end on the raw windows of all 36 pigs.

`ridge, released` is the linear model of what the private policy releases; `donors alone` its trunk, had it learned from
the donors' records only.

RMSE is in mmHg, R² that of the change from the last pressure, `pigs` the 10th and 90th percentile of single pigs' RMSE;
intervals are 95 % over seeds (Student's t). `below ridge` is by how much the RMSE is below the ridge's, with a 95 %
interval over pigs drawn with replacement, and `better on` on how many of them it is.

Leakage is that of the runs' audits; `error` is how far, in mmHg, the best attack stays from the windows if it also has
all of the donors' windows that begin every 0.1 s, and knows what followed each window, as the server does (`mean`: a
guess without any release).
"""

from simulations.forecast.measuring import Options, study
from simulations.forecast.report import tables

__all__ = ["Options", "study", "tables"]
