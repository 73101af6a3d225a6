"""The table of the study of labels at home."""

from statistics import mean

from simulations.shared.results import Results
from simulations.shared.statistics import by
from simulations.shared.tables import markdown

ATTACKS = ("chance", "head", "linked", "sum", "clusters", "features")


def tables(results: Results) -> str:
    """Return the shares of labels that attacks find out, means over seeds."""
    rows = []
    for (data, labels, noise), mine in by(results["rows"], "data", "labels", "noise").items():
        accuracy = f"{mean(row['accuracy'] for row in mine):.3f}"
        shares = [f"{mean(row[attack] for row in mine):.3f}" if attack in mine[0] else "" for attack in ATTACKS]
        rows.append((data, labels.replace("-", " "), f"{noise:g}", accuracy, *shares))
    return markdown(("data", "labels", "noise", "accuracy", *ATTACKS), rows)
