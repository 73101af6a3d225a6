"""The server's half against plain torch: joining releases, mini-batches, cut gradients, scores."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsplit.common.seeds import seed_of
from fedsplit.model.tasks import task_of
from fedsplit.release.admitted import unguarded
from fedsplit.release.kept import Kept
from fedsplit.release.policies import Bits
from fedsplit.server.batches import Batches, minibatches
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.wire.release import Release

WIDTH = 11


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def dense_of(device: int, records: int, width: int = WIDTH) -> np.ndarray:
    """One device's outputs after dropping: about half are zero, some records are all zero."""
    rng = np.random.default_rng(device)
    x = rng.normal(size=(records, width)).astype(np.float32)
    return np.where((rng.random(x.shape) < 0.5) & (rng.random((records, 1)) < 0.9), x, 0).astype(np.float32)


def targets_of(device: int, records: int) -> np.ndarray:
    return 1000 * device + np.arange(records)


def release(counts: dict[int, int], dtype: str = "float32", targets: np.ndarray | None = None) -> Release:
    devices = sorted(counts)
    dense = np.concatenate([dense_of(d, counts[d]) for d in devices] or [np.zeros((0, WIDTH), np.float32)])
    kept = Kept.of(dense, np.ones(dense.shape, dtype=bool), zeros_count=False)
    if targets is None:
        targets = np.concatenate([targets_of(d, counts[d]) for d in devices] or [ints()])
    return Release.pack(unguarded(kept, "test"), ints(*devices), ints(*[counts[d] for d in devices]), targets, dtype)


def batches(records: int, targets: np.ndarray, device: int = 1) -> Batches:
    return Batches.join([release({device: records}, targets=targets)])


# --- joining ---------------------------------------------------------------------------------------------------

counts_by_device = st.dictionaries(st.integers(0, 30), st.integers(0, 4), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(counts_by_device, st.randoms(use_true_random=False))
def test_releases_join_into_canonical_order_whatever_the_nodes(counts: dict[int, int], random: Any) -> None:
    nodes: dict[int, dict[int, int]] = {}
    for device in counts:
        nodes.setdefault(random.randrange(3), {})[device] = counts[device]
    packed = list(nodes.values())
    random.shuffle(packed)
    joined = Batches.join([release(node) for node in packed])
    devices = sorted(counts)
    assert joined.devices.tolist() == [d for d in devices for _ in range(counts[d])]
    assert joined.targets.tolist() == [t for d in devices for t in targets_of(d, counts[d]).tolist()]
    expected = np.concatenate([dense_of(d, counts[d]) for d in devices])
    found, cells, positions = joined.dense(np.arange(len(joined)))
    pattern = np.isin(np.arange(found.size), cells).reshape(found.shape)
    assert np.array_equal(found, expected)
    assert np.array_equal(pattern, expected != 0)
    assert positions.tolist() == list(range(len(joined.values)))
    alone = Batches.join([release(counts)])
    for name in ("devices", "targets", "starts", "bitmap", "values"):
        assert np.array_equal(getattr(joined, name), getattr(alone, name))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=12))
def test_dense_gives_any_rows_in_any_order(rows: list[int]) -> None:
    joined = Batches.join([release({2: 4}), release({1: 5})])
    everything = np.concatenate([dense_of(1, 5), dense_of(2, 4)])
    found, cells, positions = joined.dense(ints(*rows))
    pattern = np.isin(np.arange(found.size), cells).reshape(found.shape)
    assert np.array_equal(found, everything[ints(*rows)])
    assert np.array_equal(pattern, found != 0)
    assert np.array_equal(joined.values[positions], found[pattern])


def test_float16_releases_of_different_scales_join() -> None:
    joined = Batches.join([release({3: 2}, "float16"), release({1: 4}, "float32"), release({2: 3}, "float16")])
    expected = np.concatenate([dense_of(1, 4), dense_of(2, 3), dense_of(3, 2)])
    np.testing.assert_allclose(joined.dense(np.arange(9))[0], expected, rtol=2**-10)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_releases_of_few_bits_join(bits: int) -> None:
    dropping = Bits(bits)
    dense = {d: dropping.coded(np.maximum(dense_of(d, n), 0)) for d, n in {2: 4, 5: 3}.items()}

    def coded(device: int) -> Release:
        kept = Kept.of(dense[device], np.ones(dense[device].shape, dtype=bool), zeros_count=False)
        n = len(dense[device])
        return Release.pack(unguarded(kept, "test"), ints(device), ints(n), targets_of(device, n), "float16", bits)

    joined = Batches.join([coded(5), coded(2)])
    found, cells, _ = joined.dense(np.arange(7))
    pattern = np.isin(np.arange(found.size), cells).reshape(found.shape)
    assert np.array_equal(found, np.concatenate([dense[2], dense[5]]))
    assert np.array_equal(pattern, found != 0)
    assert pattern.any()


def test_rounds_are_put_behind_one_another_for_replay() -> None:
    first, second = Batches.join([release({1: 5, 2: 3})]), Batches.join([release({0: 4})])
    whole = Batches.concat([first, second])
    assert whole.devices.tolist() == [1] * 5 + [2] * 3 + [0] * 4
    assert whole.targets.tolist() == [*first.targets.tolist(), *second.targets.tolist()]
    expected = np.concatenate([dense_of(1, 5), dense_of(2, 3), dense_of(0, 4)])
    assert np.array_equal(whole.dense(np.arange(12))[0], expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 900), st.integers(1, 12), st.integers(0, 3))
def test_a_part_is_as_many_whole_records_as_fit(size: int, records: int, seed: int) -> None:
    whole = Batches.join([release({1: records, 4: 2})])
    found = whole.part(size, np.random.default_rng(seed))
    rows = [whole.targets.tolist().index(t) for t in found.targets.tolist()]
    assert rows == sorted(rows)
    assert np.array_equal(found.dense(np.arange(len(found)))[0], whole.dense(ints(*rows))[0])
    assert found.nbytes <= max(size, 8)  # of nothing there is still where it begins
    if len(found) < len(whole):  # not one more of the largest would fit
        assert found.nbytes + 8 + 8 + 8 + 2 + 4 * WIDTH > size


def test_parts_are_drawn_at_random() -> None:
    whole = Batches.join([release({1: 60})])
    drawn = [whole.part(whole.nbytes // 2, np.random.default_rng(n)).targets.tolist() for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 20 < len(drawn[0]) < 40 and max(np.diff(drawn[0])) > 1
    assert whole.part(whole.nbytes, np.random.default_rng(0)) is whole


# --- mini-batches ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20))
def test_minibatches_cover_the_order_and_none_but_the_only_one_has_one_record(count: int, size: int) -> None:
    order = np.random.default_rng(count).permutation(count)
    found = list(minibatches(order, size))
    assert np.concatenate(found).tolist() == order.tolist()
    assert all(len(b) == size for b in found[:-1])
    assert len(found[-1]) <= size + 1
    if count > 1 and size > 1:
        assert all(len(b) > 1 for b in found)


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(8, 4, [4, 4]), (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (1, 4, [1]), (5, 4, [5])]
)
def test_a_last_batch_of_one_joins_the_one_before(count: int, size: int, expected: list[int]) -> None:
    assert [len(b) for b in minibatches(np.arange(count), size)] == expected


# --- training --------------------------------------------------------------------------------------------------

TASKS = {"classification": 3, "binary": 1, "regression": 2}


def some_targets(task: str, records: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if task == "regression":
        return rng.normal(size=(records, 2)).astype(np.float32)
    return rng.integers(0, {"classification": 3, "binary": 2}[task], records)


def obvious_loss(task: str, outputs: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    """Summed over records, written out."""
    if task == "classification":
        return sum(-torch.log_softmax(row, 0)[t] for row, t in zip(outputs, targets, strict=True))
    if task == "binary":
        chances = torch.sigmoid(outputs[:, 0])
        return sum(-torch.log(p if t else 1 - p) for p, t in zip(chances, targets, strict=True))
    return ((outputs - torch.from_numpy(targets)) ** 2).mean(dim=1).sum()


def network(outputs: int, *, seed: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, outputs))


def trunk(task: str, module: nn.Module, cut_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Trunk:
    chosen = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    chosen |= {"batch_size": 1000, "epochs": 1} | options
    return Trunk(module, cut_shape, task_of(task), TASKS[task], TrunkOptions(**chosen), rounds=4, seed=9)


def reference_gradient(task: str, module: nn.Module, dense: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Gradient of the summed loss at every output that was sent, in order."""
    cut = torch.from_numpy(dense).requires_grad_()
    (found,) = torch.autograd.grad(obvious_loss(task, module(cut), targets), cut)
    return found.numpy()[dense != 0]


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_summed_over_records(task: str) -> None:
    outputs = torch.from_numpy(np.random.default_rng(1).normal(size=(9, TASKS[task])).astype(np.float32))
    targets = some_targets(task, 9)
    found = task_of(task).loss(outputs, torch.from_numpy(targets))
    torch.testing.assert_close(found, obvious_loss(task, outputs, targets))


@pytest.mark.parametrize("task", TASKS)
def test_one_batch_gives_autograds_gradient_and_one_step_of_sgd(task: str) -> None:
    targets, dense = some_targets(task, 20), dense_of(1, 20)
    module, plain = network(TASKS[task]), network(TASKS[task])
    found, metrics = trunk(task, module).train(batches(20, targets), 0, 1)
    expected = reference_gradient(task, plain, dense, targets)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    predictions = plain(torch.from_numpy(dense))
    loss = obvious_loss(task, predictions, targets) / 20
    assert metrics["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for parameter, mine in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), parameter.detach() - 0.1 * parameter.grad)
    assert ("train_accuracy" in metrics) == (task != "regression")
    if task == "classification":
        assert metrics["train_accuracy"] == pytest.approx((predictions.argmax(1).numpy() == targets).mean())
    if task == "binary":
        assert metrics["train_accuracy"] == pytest.approx(((predictions[:, 0] > 0).numpy() == targets).mean())


@pytest.mark.parametrize("fresh", [0, 6, 20])
@pytest.mark.parametrize("size", [1, 3, 19, 20])
def test_gradients_of_several_batches_stand_where_their_outputs_do(size: int, fresh: int) -> None:
    targets, dense = some_targets("classification", 20), dense_of(1, 20)
    standing = trunk("classification", network(3), batch_size=size, epochs=2, lr=1e-12)
    found, _ = standing.train(batches(20, targets), fresh, 1)
    replayed = np.count_nonzero(dense[:fresh])
    expected = reference_gradient("classification", network(3), dense, targets)[replayed:]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_several_batches_are_steps_in_the_named_order() -> None:
    targets, dense = some_targets("classification", 20), dense_of(1, 20)
    module, plain = network(3), network(3)
    found, _ = trunk("classification", module, batch_size=6, epochs=2, lr=0.5).train(batches(20, targets), 0, 3)
    gradients = np.zeros_like(dense)
    for epoch in range(2):
        order = np.random.default_rng(seed_of(9, "order", 3, epoch)).permutation(20)
        for rows in (order[:6], order[6:12], order[12:18], order[18:]):
            cut = torch.from_numpy(dense[rows]).requires_grad_()
            plain.zero_grad()
            obvious_loss("classification", plain(cut), targets[rows]).backward()
            gradients[rows] = cut.grad.numpy()
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= 0.5 * parameter.grad / len(rows)
    np.testing.assert_allclose(found, gradients[dense != 0], rtol=1e-4, atol=1e-6)
    for mine, parameter in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter)


def test_the_cut_is_shaped_for_the_module() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1:] == (1, WIDTH)
            return self.last(x.mean(dim=2))

    made = trunk("classification", Checks(), cut_shape=(1, WIDTH))
    made.train(batches(4, some_targets("classification", 4)), 0, 1)
    made.predict(batches(4, some_targets("classification", 4)))


def test_the_learning_rate_follows_its_schedule() -> None:
    made = trunk("classification", network(3), schedule="step", lr=0.6)
    rates = []
    for number in range(1, 5):
        made.train(batches(4, some_targets("classification", 4)), 0, number)
        rates.append(made.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.6, 0.6, 0.06, 0.006])


def test_training_draws_its_own_random_numbers() -> None:
    def run(number: int) -> np.ndarray:
        made = trunk("classification", nn.Sequential(nn.Dropout(), network(3)))
        return made.train(batches(9, some_targets("classification", 9)), 0, number)[0]

    state = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert np.array_equal(run(1), first)
    assert not np.array_equal(run(2), first)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_goes_on_from_a_saved_state(optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "momentum": 0.5 * (optimizer == "sgd"), "weight_decay": 0.01}
    data = batches(12, some_targets("classification", 12))
    made = trunk("classification", network(3), **options)
    made.train(data, 0, 1)
    resumed = trunk("classification", network(3, seed=5), **options)
    resumed.load_state(copy.deepcopy(made.module.state_dict()), copy.deepcopy(made.state()))
    assert np.array_equal(made.train(data, 0, 2)[0], resumed.train(data, 0, 2)[0])
    for a, b in zip(made.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


# --- evaluation ------------------------------------------------------------------------------------------------


def test_prediction_is_the_module_in_eval_mode_over_all_records() -> None:
    module = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(), network(3))
    made = trunk("classification", module)
    made.train(batches(30, some_targets("classification", 30)), 0, 1)
    found = made.predict(batches(1030, some_targets("classification", 1030), device=2))
    expected = module.eval()(torch.from_numpy(dense_of(2, 1030))).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_gives_the_mean_loss_and_the_scores(task: str) -> None:
    targets = some_targets(task, 20)
    made = trunk(task, network(TASKS[task]))
    before = [p.detach().clone() for p in made.module.parameters()]
    found = made.evaluate(batches(20, targets))
    outputs = network(TASKS[task])(torch.from_numpy(dense_of(1, 20))).detach()
    assert found.pop("test_loss") == pytest.approx(obvious_loss(task, outputs, targets).item() / 20, rel=1e-5)
    expected = task_of(task).score(outputs.numpy(), targets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
    assert all(torch.equal(a, b) for a, b in zip(before, made.module.parameters(), strict=True))


def test_scores_of_classes_by_hand() -> None:
    predicted, actual = [0, 0, 0, 1, 2, 2], ints(0, 0, 1, 1, 1, 2)
    outputs = np.eye(4, dtype=np.float32)[predicted]
    found = task_of("classification").score(outputs, actual)
    assert found["test_accuracy"] == pytest.approx(4 / 6)
    assert found["test_f1"] == pytest.approx([4 / 5, 2 / 4, 2 / 3, 0.0])  # nothing is or is said to be class 3


def test_correct_by_hand_and_as_the_accuracy_says() -> None:
    outputs = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2, 2]]
    right = task_of("classification").correct(outputs, ints(0, 0, 1, 1, 1, 2))
    assert right.tolist() == [True, True, False, True, False, True]
    assert task_of("classification").score(outputs, ints(0, 0, 1, 1, 1, 2))["test_accuracy"] == right.mean()
    chances, actual = np.array([[0.5], [-0.1], [2.0], [-3.0], [0.0]], dtype=np.float32), ints(1, 1, 0, 0, 0)
    right = task_of("binary").correct(chances, actual)
    assert right.tolist() == [True, False, False, True, True]
    assert task_of("binary").score(chances, actual)["test_accuracy"] == right.mean()


def test_scores_of_two_classes_by_hand() -> None:
    found = task_of("binary").score(np.array([[0.5], [-0.1], [2.0], [-3.0]], dtype=np.float32), ints(1, 1, 0, 0))
    assert found == {"test_accuracy": 0.5, "test_f1": pytest.approx([0.5, 0.5])}
    found = task_of("binary").score(np.array([[1.0], [1.0], [1.0]], dtype=np.float32), ints(1, 1, 0))
    assert found == {"test_accuracy": pytest.approx(2 / 3), "test_f1": pytest.approx([0.0, 0.8])}


def test_scores_of_a_regression_by_hand() -> None:
    targets = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    found = task_of("regression").score(np.array([[1.0], [2.0], [4.0]], dtype=np.float32), targets)
    assert found["test_accuracy"] is None
    assert found["test_rmse"] == pytest.approx((1 / 3) ** 0.5)
    assert found["test_r2"] == pytest.approx(1 - (1 / 3) / (2 / 3))
    assert task_of("regression").score(targets, targets)["test_r2"] == 1.0
    assert task_of("regression").score(np.full_like(targets, 2.0), targets)["test_r2"] == pytest.approx(0.0)
    assert task_of("regression").score(targets, np.ones_like(targets))["test_r2"] == 0.0  # no variance to explain


def test_variance_is_about_each_columns_own_mean() -> None:
    targets = np.array([[0.0, 100.0], [2.0, 102.0]], dtype=np.float32)
    assert task_of("regression").score(targets + 1, targets)["test_r2"] == pytest.approx(0.0)
