"""What studies make of their files: rows of the documentation, from figures that give them."""

import math
from typing import Any

import pytest

from simulations.shared.study import load


def rows(name: str, results: dict[str, Any]) -> list[list[str]]:
    """Return the cells of all rows of a study's tables, without the lines below their heads."""
    lines = load(name).tables(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if set("".join(row)) != {"-"}]


def test_throughput_is_compared_with_the_row_beside_it() -> None:
    training = [
        {"model": "conv", "devices": 1000, "row": "plain loop", "seconds": [80e-6, 88.7e-6, 160e-6]},
        {"model": "conv", "devices": 1000, "row": "naive Flower app", "seconds": [160e-6, 1190.5e-6, 1600e-6]},
        {"model": "light", "devices": 1000, "row": "plain loop", "seconds": [1.0]},
    ]
    guard = [
        {"model": "conv", "row": "single pass, observing", "seconds": [139.6e-6]},
        {"model": "conv", "row": "single pass, enforcing", "seconds": [356e-6]},
    ]
    found = rows("throughput", {"training": training, "guard": guard})
    assert found[0] == ["network", "devices", "", "µs a record", "ratio"]
    assert found[1] == ["conv", "1,000", "plain loop", "88.7", "1.00"]
    assert found[2] == ["conv", "1,000", "naive Flower app", "1,190.5", "10.00"]  # the median of 2, 13.4 and 10
    assert found[-1] == ["conv", "single pass, enforcing", "356.0", "2.55"]


def test_scale_has_the_documentations_columns() -> None:
    row = {"devices": 100_000, "cohort": 1000, "nodes": 2, "round": 0.66, "gibibytes": 1.96, "driver_gibibytes": 0.51}
    row |= {"megabytes_up": 3.84, "megabytes_down": 2.1, "outside": 16.6, "fixed": True}
    head, cells = rows("scale", {"rows": [row]})
    assert head[3:5] == ["seconds a round", "GiB"]
    assert cells == ["100,000", "1,000", "2", "0.66", "1.96", "0.51", "3.8", "2.1", "16.6"]


def test_costs_are_the_differences_of_runs() -> None:
    from simulations.costs import predict, runs, solve

    cost = {"trunk_record": 2e-5, "node_record": 1e-5, "device": 6e-5, "exchange": 0.014, "megabyte": 0.007}

    def measured(run: Any) -> dict[str, float]:
        records, up = run.devices * run.records, 1e-3 * run.devices * (4 if run.all_kept else 1)
        trunk = records * cost["trunk_record"]
        nodes = records * cost["node_record"] + run.devices * cost["device"] + run.nodes * cost["exchange"]
        outside = nodes + up * cost["megabyte"]
        own = {"devices": run.devices, "records": run.records, "nodes": run.nodes}
        return {**own, "trunk": trunk, "round": trunk + outside, "megabytes_up": up, "megabytes_down": 0.0}

    found = solve({name: measured(run) for name, run in runs(1000).items()})
    for name, value in cost.items():
        tolerance = 0.3 if name in ("device", "node_record") else 1e-6  # in these, more bytes went, too
        assert found[name] == pytest.approx(value, rel=tolerance), name
    assert predict(cost, 10_000, 10, 64, 2) == pytest.approx((10_000 * 16e-5 / 32, 2.0 + 4 * 0.014))
    shown = rows("costs", {"costs": [cost, cost], "cores": 2})
    assert shown[4] == ["exchange (a message and its answer)", "14,000.0", "14,000.0", "14,000.0"]


def test_pairs_have_medians_and_the_median_ratio() -> None:
    pairs = [[5.0, 7.0], [5.0, 6.0], [4.0, 8.0]]
    assert rows("startup", {"options": {"devices": 1000}, "pairs": pairs})[1] == [
        *("1,000", "5.0", "7.0", "1.40", "1.20", "2.00")
    ]
    assert rows("tuning", {"options": {"parallel": 2}, "pairs": pairs})[1] == ["5.00", "7.00", "1.40"]
    assert rows("threads", {"threads": 2, "pairs": pairs})[1] == ["2", "1.40", "1.20", "2.00"]
    leverage = load("leverage").tables({"options": {"windows": 3000}, "pairs": pairs, "windows": 2.0})
    assert "| 3,000 windows of 600 numbers, 48 outputs each | 2.0 s |" in leverage and "two: 1.40" in leverage
    ratios = {"everybody in time": [1.0, 1.1, 1.3]}
    assert rows("clock", {"options": {"devices": 10_000}, "plain": [2.0], "ratios": ratios})[1][1:] == [
        *("1.100", "1.000", "1.300")
    ]


def test_latency_is_beside_flowers_loop_where_that_was_run() -> None:
    naive = {"exchange": 7.1, "round": 14.0, "records_per_second": 2.0}
    stock, warm = ({"exchange": e, "round": 1.0, "records_per_second": r} for e, r in ((6.2, 497.0), (0.36, 5376.0)))
    names = ("naive", "Flower's own loop", "fedsplit node start --warm")
    found = rows("latency", {"rows": dict(zip(names, ([naive], [stock], [warm]), strict=True))})
    assert [row[1:] for row in found[1:]] == [
        ["7.1", "", "2.0", "1"],
        ["6.2", "1.0", "497", "248"],
        ["0.36", "17.2", "5,376", "2,688"],
    ]
    assert rows("latency", {"rows": {names[2]: [warm]}})[1][1:] == ["0.36", "", "5,376", ""]


def test_protocols_are_beside_centralised_training_seed_by_seed() -> None:
    def run(accuracy: float, exchanges: int, exposures: int) -> dict[str, float]:
        cost = {"exchanges": exchanges, "bytes_up": 4.5e6, "bytes_down": 2.2e6, "wall": 3.0}
        return {"test_accuracy": accuracy, "exposures_max": exposures, **cost}

    runs = {"centralised": [run(0.8, 0, 20), run(0.9, 0, 20)], "single-pass": [run(0.79, 440, 1), run(0.89, 440, 1)]}
    found = rows("protocols", {"runs": {"dropping": runs}})
    assert found[1][3:] == ["-", "-", "-", "20", "3.0"]
    assert found[2] == ["single-pass", "0.840 ± 0.635", "-0.010", "440", "4.5", "2.2", "1", "3.0"]


def test_profiles_have_the_gain_where_there_are_public_records() -> None:
    private = {"name": "p", "seed": 1, "accuracy": 0.901, "undropped": 0.931, "public_only": 0.879, "gain": 0.022}
    private |= {"gain_interval": 0.011, "releases": 1, "attack": "decoder", "psnr": 14.04, "identified": 0.065}
    other = {**private, "name": "q", "public_only": None, "gain": None, "gain_interval": None, "psnr": 120.0}
    found = rows("profiles", {"rows": [private, other]})
    assert found[1] == ["p", "1", "0.901", "0.931", "0.879", "+2.2 ± 1.1", "1", "14.0 dB (decoder)", "0.065"]
    assert found[2][4:8] == ["-", "-", "1", "120 dB (decoder)"]
    assert "gain over public only +2.2 ± 0.8 points" in load("profiles").tables({"rows": [private, private]})


def frontier(name: str, family: str, accuracy: float, chosen_on: float, reported: float) -> dict[str, Any]:
    scores = {"psnr_p95": 20.0, "ssim": 0.5, "identification": 0.19}
    shown = {"psnr": reported, **scores}
    return {"name": name, "family": family, "accuracy": accuracy, "chosen_on": {"psnr": chosen_on}, "reported": shown}


def test_the_frontier_recommends_by_the_other_targets() -> None:
    found = [
        frontier("random 0.15", "random", 0.8, 14.0, 14.2),
        frontier("random 0.5", "random", 0.9, 18.0, 18.2),
        frontier("8 units", "units", 0.85, 15.0, 17.0),  # one below random dropping where it is chosen
        frontier("1 bit", "bits", 0.85, 15.5, 12.0),
        frontier("4 units", "units", 0.7, 1.0, 1.0),  # less accurate than any random dropping
        frontier("projection", "LightSplit", 0.9, 1.0, 1.0),
    ]
    said = load("frontier").tables({"rows": found})
    assert "8 units, accuracy 0.850, 17.00 dB, -0.80 dB below random" in said
    assert rows("frontier", {"rows": found})[4] == ["1 bit", "0.850 ± 0.000", "12.0 dB", "20.0 dB", "0.50", "0.19"]


def test_labels_found_out_are_means_over_seeds() -> None:
    shared = {"data": "digits", "seed": 1, "labels": "shared", "noise": 0.0, "accuracy": 0.833, "head": 1.0}
    attacks = {"chance": 0.106, "head": 1.0, "linked": 1.0, "sum": 0.5, "clusters": 0.8, "features": 0.3}
    home = [{**shared, "labels": "at-home", "noise": 4.0, "seed": seed, **attacks} for seed in (1, 2)]
    home[1]["sum"] = 0.7
    found = rows("labels", {"rows": [shared, *home]})
    assert found[1] == ["digits", "shared", "0", "0.833", "", "1.000", "", "", "", ""]
    assert found[2][1:4] == ["at home", "4", "0.833"] and found[2][7] == "0.600"


def test_devices_are_compared_at_the_time_when_pipelined_ends() -> None:
    from simulations.devices.report import at, reached

    points = [[0.0, 0.5], [2.0, 0.8], [4.0, 0.7]]
    assert [at(points, when) for when in (0.0, 1.9, 2.0, 9.0)] == [0.5, 0.5, 0.8, 0.7]
    assert math.isnan(at(points, -1.0)) and reached(points) == 2.0 and reached(points[:1]) is None
    run = {"points": points, "accuracy": 0.7, "seconds": 4.0, "bytes_up": 1.22e6, "bytes_down": 0.73e6}
    run |= {"multiply_adds": 0.3e9, "heard": 0.92}
    longer = {**run, "points": [[0.0, 0.5], [131.0, 0.75]], "accuracy": 0.75, "seconds": 131.0}
    found = rows("devices", {"runs": {"phones-4g": {"pipelined": [run], "FedAvg": [longer, longer]}}})
    assert found[1] == ["pipelined", "0.700", "0.700", "4.0", "2.0", "1.22", "0.73", "0.30", "92 %"]
    assert found[2][:5] == ["FedAvg", "0.750", "0.500", "131", "-"]
    assert load("rivals").tables({"runs": {}}) == ""


def test_encryption_adds_what_bytes_take_at_a_rate() -> None:
    row = {"device_us": 672.0, "server_us": 271.0, "bytes_up": 74.0, "bytes_down": 40.0, "seen": "activations"}
    results = {
        "attack": {"strongest": 14.2, "without": 13.0},
        "batches": {"1": {"fedsplit": row}},
        "said": ["left out"],
    }
    found = rows("encryption", results)
    assert found[1] == [
        "fedsplit",
        "672 us",
        "271 us",
        "74",
        "40",
        "10.1 ms",
        "1.85 ms",
        "1.03 ms",
        "952 us",
        "activations",
    ]
    said = load("encryption").tables(results)
    assert "14.2 dB, without any 13.0 dB" in said and said.endswith("- left out")


def test_a_service_is_beside_the_other_over_all_turns() -> None:
    def turn(cpu: float, memory: float, errors: int = 0) -> dict[str, float]:
        rates = {"records_per_second": 6333.0, "records": 1000, "cpu_seconds": cpu, "memory_mb": memory}
        return {"errors": errors, "p50": 0.01, "p99": 0.012, **rates}

    kinds = ("fedsplit", "AES-256-GCM, whole network")
    turns = dict(zip(kinds, ([turn(0.1, 300), turn(0.2, 301.3, 1)], [turn(0.2, 300), turn(0.2, 300)]), strict=True))
    found = rows("serving", {"turns": turns})
    assert found[1] == ["fedsplit", "1", "10.0", "12.0", "6,333", "150", "301", "+1.3"]
    assert "0.75 over all turns, 0.50 to 1.00 (median 0.75) by turns" in load("serving").tables({"turns": turns})


def test_watches_say_when_they_raised_alarms() -> None:
    exercises = [
        {"exercise": 0, "judged": 12, "withheld": 1, "alarms": []},
        {"exercise": 6, "judged": 12, "withheld": 0, "alarms": [16.0, 18.0]},
    ]
    found = rows("watching", {"watches": [{"watch": 14, "exercises": exercises}]})
    assert found[1:] == [["14", "PEN", "12", "1", "0", "-"], ["14", "ROW", "12", "0", "2", "16 s"]]


def test_a_deployment_is_beside_its_simulation() -> None:
    row = {
        "run": "as shipped",
        "difference": 0.0,
        "accuracy": [0.8309, 0.8309],
        "training": [20.4, 34.7],
        "total": 41.0,
    }
    found = rows("deployment", {"rows": [{**row, "exchanges": 440, "bytes_up": 4_500_000}]})
    assert found[1] == ["as shipped", "0", "0.8309", "0.8309", "20.4", "34.7", "41.0", "440", "4,500,000"]


def test_faults_are_told_in_points_of_accuracy() -> None:
    from fedsplit.common.errors import RunError
    from simulations.faults.measuring import judged

    row = {"case": "node hangs", "seen": "hung for 16 s", "outcome": "goes on", "left": 749, "most": 1, "samples": 700}
    found = [judged({**row, "accuracy": accuracy}, 0.8) for accuracy in (0.79, 0.788)]
    left_out = {"case": "disk full", "outcome": "not run"}
    table = rows("faults", {"rows": [*found, left_out], "clocks": {"clock +60s": "connects"}})
    assert table[1] == ["node hangs", "hung for 16 s", "-1.1", "-1.0, -1.2", "0", "goes on"]
    assert table[2] == ["disk full", "", "", "", "", "not run"]
    for wrong in ({"most": 2}, {"left": 699}):
        with pytest.raises(RunError, match="node hangs: the ledgers are wrong"):
            judged({**row, "accuracy": 0.8, **wrong}, 0.8)


def test_the_clock_is_compared_round_by_round() -> None:
    row = {"real": [10.0, 10.0, 20.0], "simulated": [9.6, 9.2, 18.8], "overhead": 1.0234}
    seconds = {"0.02": 1.0 + 4.6 * 0.02, "0.1": 1.0 + 4.6 * 0.1, "0.4": 1.0 + 4.6 * 0.4}
    found = rows("shaped", {"rows": {"1 up": row}, "counted": {"long": seconds}})
    assert found[1] == ["1 up", "10.00", "9.60", ".94 (.92-.96)", "1.023"]
    assert found[3] == ["long exchanges", "4.6", "1.00"]


def test_health_is_told_by_seed_person_and_novelty() -> None:
    def row(seed: int, person: int, window: float, **more: Any) -> dict[str, Any]:
        named = {"seed": seed, "layer": "donors", "policy": "private", "novel": 6, "method": "recordings", **more}
        found = {"person": person, "calibrated": True, "window": window, "episode": 0.9, "precision": 0.7}
        delays = {"alarms 10": 800.0, "found 10": 0.3, "delays 10": [10.0, None], "delays 100": [None]}
        return {**named, **found, **delays, "alarms 100": 1200.0, "found 100": 0.5}

    folds = [row(0, 8, 0.8), row(0, 9, 0.9), row(1, 8, 0.8), row(1, 9, 0.94)]
    usual = [{**one, "calibrated": False, "window": 0.7} for one in folds]
    leaked = [{"layer": "donors", "policy": "private", "psnr": 23.4, "identified": 0.18, "leverage": 0.0}]
    cases = [{"case": "bleeding", "policy": "none", "seed": seed, "auc": 0.9, "right": seed == 0} for seed in (0, 1)]
    found = rows("health", {"folds": folds + usual, "leakage": leaked, "cases": cases})
    assert found[1][:4] == ["donors", "private: 1 bit of 400", "0.860 ± 0.127", "0.80..0.92"]
    assert found[1][-3:] == ["23.4 dB", "0.18", "0.00"]
    assert found[3] == ["donors", "private", *[""] * 6, "0.86 / 0.90"]
    assert found[5] == ["recordings", "private", "0.860 ± 0.127", "0.900", "0.700", "0.700", "0.900"]
    assert found[7:9] == [
        ["donors", "private", "10", "800", "0.300", "0.50", "10 s"],
        ["donors", "private", "100", "1200", "0.500", "0.00", "-"],
    ]
    assert found[10] == ["bleeding", "none", "0.900", "1 of 2"]


def test_forecasts_are_beside_the_linear_model() -> None:
    truth, whose = [1.0, -1.0, 2.0, -2.0], [36, 36, 37, 37]
    leak = {"psnr": 25.5, "psnr_mean": 22.0, "identified": 0.16, "error": 1.33, "error_mean": 2.1}
    private = {"seed": 0, "name": "private: 8 units", "forecast": truth, "leak": {**leak, "donors_alone_r2": 0.75}}
    linear = {"seed": 0, "name": "ridge", "forecast": [0.0] * 4, "leak": None}
    results = {"truth": truth, "whose": whose, "rows": [linear, private]}
    found = rows("forecast", results)
    assert found[1][:3] == ["ridge", "1.581", "0.000"] and found[1][4:] == [""] * 5
    assert found[2][:6] == ["private: 8 units", "0.000", "1.000", "0.00–0.00", "+1.58 (+1.00..+2.00)", "2"]  # noqa: RUF001
    assert found[2][6:] == ["25.5", "0.16", "1.33"]
    assert "donors alone: RMSE 0.791, R² 0.750" in load("forecast").tables(results)
