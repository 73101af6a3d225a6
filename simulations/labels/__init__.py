"""What labels at home keep from the server: label inference from all that is sent in their stead.

    python -m simulations labels configs/wearables.toml configs/digits.toml --seeds 1 2 3

Each configuration is trained with mode `synchronous` and labels shared, then at home, then with Gaussian noise on what
the devices send in their labels' stead. The attackers read the messages alone:

- `head`: an honest-but-curious server. It knows features and head, and tries every class: the gradient at a record's
  features is W'(softmax(Wh + b) - onehot(y)). `linked`: it adds up what all rounds tell of the same record.
- `sum`: the same server, from the head's gradient alone, which is summed over a node's records: as many equations as
  there are features (and one), for one unknown per record and class.
- `clusters`: somebody who does not know the head, and groups a round's gradients by their direction (k-means; clusters
  are given the names that fit best, so this is a bound). `features`: the same with the features, which is what
  releases without any labels tell.

Chance is the share of the largest class.
"""

from simulations.labels.measuring import Options, study
from simulations.labels.report import tables

__all__ = ["Options", "study", "tables"]
