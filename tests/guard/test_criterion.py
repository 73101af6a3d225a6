"""Leverages against projectors from singular values, the first layer's map against the layer, gradients against dW."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsplit.guard import criterion
from fedsplit.guard.criterion import LayerMap, coordinates, leverage, null_probe
from fedsplit.guard.gradient import joint, record_leverage
from fedsplit.model.layer import FirstLayer

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4, bias=False), (3, 6)),
    (nn.Conv1d(2, 3, 5, stride=2, padding=2), (2, 17)),
    (nn.Conv1d(4, 6, 3, dilation=2, groups=2, bias=False), (4, 16)),
    (nn.Conv2d(1, 3, 3, padding=1), (1, 6, 7)),
    (nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2), (2, 7, 8)),
]
PARTS = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v).replace(" ", ""))
CONVOLUTIONS = pytest.mark.parametrize(("layer", "shape"), LAYERS[2:], ids=lambda v: str(v).replace(" ", ""))


def layer_map(layer: nn.Module, shape: tuple[int, ...], seed: int = 0) -> LayerMap:
    first, rng = FirstLayer(layer, nn.ReLU(), shape), np.random.default_rng(seed)
    return LayerMap(first, {n: rng.normal(size=s).astype(np.float32) for n, s in first.shapes.items()})


def sensor_map(seed: int = 0) -> LayerMap:
    """600 coordinates, 32 channels x 50 steps of outputs."""
    return layer_map(nn.Conv1d(6, 32, 9, stride=2, padding=4), (6, 100), seed)


def masks(layer: LayerMap, records: int, keep: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((records, layer.width)) < keep


def projector(rows: np.ndarray) -> tuple[int, np.ndarray]:
    """Rank and diagonal of the projector on the span of the rows, by the definition."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    _, s, vt = np.linalg.svd(rows / np.where(norms > 0, norms, 1), full_matrices=False)
    basis = vt[s > 1e-10]
    return len(basis), np.diag(basis.T @ basis)


# --- leverage --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_leverage_is_the_projectors_diagonal(k: int, n: int, rank: int, copies: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, rank)) @ rng.normal(size=(rank, n))
    rows = np.concatenate([rows, 3 * rows[:copies], np.zeros((copies // 2, n))])
    rank, h = leverage(rows)
    expected, diagonal = projector(rows)
    assert rank == expected
    np.testing.assert_allclose(h, diagonal, atol=1e-7)
    assert h.shape == (n,) and h.dtype == np.float64 and h.min(initial=0) >= 0 and h.max(initial=0) <= 1


@pytest.mark.parametrize("closeness", [1e-2, 1e-4, 1e-6, 1e-8])
def test_leverage_of_nearly_equal_rows(closeness: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 50))
    rows[1] = rows[0] + closeness * np.eye(50)[7]  # their difference gives coordinate 7 away
    rank, h = leverage(rows)
    assert rank == 30 and h[7] > 1 - 1e-6
    np.testing.assert_allclose(h, projector(rows)[1], atol=1e-6)


@pytest.mark.parametrize("count", [4, 5])
def test_tiny_rows_count_as_any_others(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 9))[[0, 1, 2, 3, 3][:count]]
    rank, h = leverage(rows)
    scaled = leverage(rows * np.array([[1e-20], [1.0], [1e15], [1e-3], [2.0]])[:count])
    assert rank == scaled[0] == 4
    np.testing.assert_allclose(scaled[1], h, atol=1e-12)


def test_rank_of_more_rows_than_coordinates() -> None:
    rng = np.random.default_rng(0)
    for rank in (5, 6) * 20:
        rows = rng.normal(size=(12, rank)) @ rng.normal(size=(rank, 6))
        found, h = leverage(rows)
        assert found == rank
        np.testing.assert_allclose(h, projector(rows)[1], atol=1e-9)


def test_well_conditioned_rows_need_no_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    m = sensor_map()
    m.kernels[4] = 0  # a dead channel
    kept = masks(m, 20, 0.1)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert leverage(np.random.default_rng(0).normal(size=(256, 784)))[0] == 256
    assert leverage(np.random.default_rng(0).normal(size=(60, 20)))[0] == 20
    assert (coordinates([(m, kept)] * 2).rank == kept.reshape(20, 32, 50).sum(axis=2) @ (np.arange(32) != 4)).all()


def test_no_rows_tell_nothing() -> None:
    rank, h = leverage(np.zeros((0, 5)))
    assert rank == 0 and h.tolist() == [0.0] * 5


# --- the layer's map -------------------------------------------------------------------------------------------


@PARTS
def test_the_map_is_the_layer_without_its_bias(layer: nn.Module, shape: tuple[int, ...]) -> None:
    m, x = layer_map(layer, shape), np.random.default_rng(1).normal(size=(5, *shape))
    plain, weight = type(layer).__new__(type(layer)), torch.from_numpy(m.kernels).reshape(layer.weight.shape)
    plain.__dict__ = {**layer.__dict__, "_parameters": {"weight": nn.Parameter(weight), "bias": None}}
    with torch.no_grad():
        expected = plain(torch.from_numpy(x)).reshape(5, -1).numpy()
    np.testing.assert_allclose(m.apply(x.reshape(5, -1)), expected, atol=1e-12)
    assert m.apply(x.reshape(5, -1).astype(np.float32)).dtype == np.float64


@PARTS
def test_the_transpose_is_the_adjoint(layer: nn.Module, shape: tuple[int, ...]) -> None:
    m, rng = layer_map(layer, shape), np.random.default_rng(1)
    x, u = rng.normal(size=(3, m.n)), rng.normal(size=(3, m.width))
    np.testing.assert_allclose((m.apply(x) * u).sum(axis=1), (x * m.transpose(u)).sum(axis=1))


@PARTS
@pytest.mark.parametrize("dense", [20_000_000, 0])
def test_rows_are_those_of_the_unrolled_matrix(
    layer: nn.Module, shape: tuple[int, ...], dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = layer_map(layer, shape)
    monkeypatch.setattr(criterion, "_DENSE", dense)
    monkeypatch.setattr(criterion, "_BLOCK", 3 * m.width)
    matrix = m.apply(np.eye(m.n)).T
    index = np.array([m.width - 1, 0, 2, 2, 1, 3, 4, 0])[: m.width] % m.width
    np.testing.assert_allclose(m.rows(index), matrix[index], atol=1e-12)
    np.testing.assert_allclose(m.norms, np.linalg.norm(matrix, axis=1), atol=1e-12)


# --- coordinates -----------------------------------------------------------------------------------------------


def test_bursts_determine_coordinates_that_counting_calls_safe() -> None:
    m, rng = sensor_map(), np.random.default_rng(0)
    burst, uniform = np.zeros((2, 32, 50), dtype=bool)
    burst[:, 20:35] = True  # all channels of 15 steps: 15 * 2 - 2 + 9 = 37 time steps of 6 sensors
    uniform.reshape(-1)[rng.permutation(1600)[:480]] = True
    found = coordinates([(m, np.stack([burst, uniform]).reshape(2, -1))])
    assert found.equations.tolist() == [480, 480] and found.equations.max() < m.n
    assert found.rank.tolist() == [222, 480]
    assert found.determined.tolist() == [0.37, 0.0]
    assert found.largest[0] == pytest.approx(1) and found.largest[1] < 1 - 1e-4


@PARTS
def test_releases_under_two_weights_are_stacked(layer: nn.Module, shape: tuple[int, ...]) -> None:
    maps = [layer_map(layer, shape, seed) for seed in (0, 1)]
    kept = [masks(m, 40, 0.2, seed) for seed, m in enumerate(maps)]
    kept[0][:3] = kept[1][1:4] = False
    found = coordinates(list(zip(maps, kept, strict=True)))
    for i in range(40):
        rows = np.concatenate([m.rows(np.flatnonzero(k[i])) for m, k in zip(maps, kept, strict=True)])
        rank, h = leverage(rows)
        assert (found.equations[i], found.rank[i]) == (len(rows), rank)
        assert found.determined[i] == (h > 1 - 1e-6).mean() and found.converged[i]
        np.testing.assert_allclose([found.largest[i], found.mean[i]], [h.max(), h.mean()], atol=1e-9)


def test_what_is_kept_twice_or_of_dead_outputs_adds_nothing() -> None:
    layer, rng = FirstLayer(nn.Linear(20, 12), nn.ReLU(), (20,)), np.random.default_rng(0)
    weight = rng.normal(size=(12, 20))
    weight[3] = 0
    first, again = (LayerMap(layer, {"weight": weight}) for _ in range(2))
    kept = rng.random((6, 12)) < 0.5
    kept[:, 3] = True
    found = coordinates([(first, kept), (again, kept), (again, np.roll(kept, 1, axis=0))])
    union = kept | np.roll(kept, 1, axis=0)
    assert found.equations.tolist() == union.sum(axis=1).tolist()
    assert found.rank.tolist() == (union.sum(axis=1) - 1).tolist()


@CONVOLUTIONS
@pytest.mark.parametrize("keep", [0.15, 0.5])
def test_probes_find_what_singular_values_find(layer: nn.Module, shape: tuple[int, ...], keep: float) -> None:
    maps = [layer_map(layer, shape, seed) for seed in (0, 1)]
    kept = [masks(m, 1, keep, seed)[0] for seed, m in enumerate(maps)]
    _, h = projector(np.concatenate([m.rows(np.flatnonzero(k)) for m, k in zip(maps, kept, strict=True)]))
    estimate, converged = null_probe(maps, kept, probes=200)
    assert converged
    assert ((estimate == 1) == (h > 1 - 1e-6)).all()
    np.testing.assert_allclose(estimate, h, atol=0.2)  # 200 probes: 5 standard errors of at most 0.035
    once, converged = null_probe(maps, kept, probes=1)
    assert converged and ((once == 1) == (h > 1 - 1e-6)).all()


def test_large_rows_are_probed_and_count_as_leaking_unless_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    m = sensor_map()
    m.kernels[4] = 0  # a dead channel
    kept = masks(m, 3, 0.05)
    kept[0] = (np.arange(1600) % 50 > 19) & (np.arange(1600) % 50 < 35)
    exact = coordinates([(m, kept)])
    monkeypatch.setattr(criterion, "_DENSE", 0)
    probed = coordinates([(m, kept)], probes=60)
    assert probed.converged.all() and (probed.largest[1:] < 1).all()
    np.testing.assert_array_equal(probed.determined, exact.determined)
    np.testing.assert_allclose(probed.rank, exact.rank, rtol=0.1)
    for seed in range(3):  # one probe comes near 0 by chance, but is not taken for 0
        np.testing.assert_array_equal(coordinates([(m, kept)], probes=1, seed=seed).determined, exact.determined)
    stopped = coordinates([(m, kept)], iterations=1)
    assert not stopped.converged.any()
    assert stopped.largest.tolist() == stopped.determined.tolist() == [1.0] * 3


# --- gradients -------------------------------------------------------------------------------------------------


def deltas(layer: LayerMap, records: int, keep: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(records, layer.width)).astype(np.float32)
    return values * masks(layer, records, keep, seed + 1)


def gradient_rows(first: FirstLayer, delta: np.ndarray) -> np.ndarray:
    """The matrix of dW as a function of all records' numbers, one column for each of these."""
    n = int(np.prod(first.input_shape))
    columns = []
    for j in range(len(delta) * n):
        x = np.zeros(len(delta) * n, dtype=np.float32)
        x[j] = 1
        dw = first.gradient(x.reshape(-1, *first.input_shape), delta.reshape(-1, *first.cut_shape))
        columns.append(first.unflatten(dw)["weight"].ravel())
    return np.array(columns, dtype=np.float64).T


def all_rows(
    m: LayerMap, delta: Sequence[np.ndarray], kept: Sequence[np.ndarray], maps: Sequence[LayerMap]
) -> np.ndarray:
    """Every equation of gradients and activations in all records' numbers."""
    parts, records = [gradient_rows(m.layer, d) for d in delta], len(delta[0])
    for own, mask in zip(maps, kept, strict=True):
        for i, j in zip(*np.nonzero(mask), strict=True):
            row = np.zeros((records, m.n))
            row[i] = own.rows(np.array([j]))[0]
            parts.append(row.reshape(1, -1))
    return np.concatenate(parts)


def test_record_leverage_is_the_projectors_diagonal() -> None:
    rng = np.random.default_rng(0)
    for size in ((30, 8), (8, 30), (20, 20)):
        delta = rng.normal(size=size)
        delta[:, 1] = 2 * delta[:, 0]
        np.testing.assert_allclose(record_leverage(delta), np.diag(delta @ np.linalg.pinv(delta)), atol=1e-9)
        ridged = delta @ np.linalg.solve(delta.T @ delta + 0.7 * np.eye(size[1]), delta.T)
        np.testing.assert_allclose(record_leverage(delta, 0.7), np.diag(ridged), atol=1e-9)


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_a_record_alone_in_a_unit_is_handed_back(size: float) -> None:
    delta = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    delta[:, 2] = 0
    delta[7, 2] = size  # however small: float32 sends it as precisely
    h = record_leverage(delta)
    assert h[7] == pytest.approx(1) and np.delete(h, 7).max() < 0.6
    delta[7] = 0
    assert record_leverage(delta)[7] == 0


@pytest.mark.parametrize("shape", [(10,), (3, 10)])
def test_equations_of_a_dense_layer_are_shared_out(shape: tuple[int, ...]) -> None:
    m = layer_map(nn.Linear(10, 4), shape)
    delta, kept = [deltas(m, 15, 0.6, 0), deltas(m, 15, 0.6, 9)], masks(m, 15, 0.3)
    found = joint(m, delta, [kept])
    positions = m.n // 10
    stacked = np.concatenate([d.reshape(15 * positions, 4) for d in delta], axis=1)
    assert found.rank == 8
    assert found.share == pytest.approx(kept.sum() / (15 * m.n) + found.rank / (15 * positions))
    np.testing.assert_allclose(found.leverage, record_leverage(stacked).reshape(15, -1).max(axis=1), atol=1e-12)
    rank, h = projector(np.concatenate([gradient_rows(m.layer, d) for d in delta]))
    assert rank == 10 * found.rank
    np.testing.assert_allclose(found.leverage, h.reshape(15, -1).max(axis=1), atol=1e-7)
    assert found.largest == found.leverage.max()


@CONVOLUTIONS
@pytest.mark.parametrize("releases", [1, 2])
@pytest.mark.parametrize(("records", "outside"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 1e-3), (4, 0.0)])
def test_joint_leverages_of_a_convolution(
    layer: nn.Module, shape: tuple[int, ...], releases: int, records: int, outside: float
) -> None:
    maps = [layer_map(layer, shape, seed) for seed in range(releases)]
    kept = [masks(m, records, 0.08, seed) for seed, m in enumerate(maps)]
    delta = [deltas(m, records, 0.4, seed) for seed, m in enumerate(maps)]
    # from gradients of kept outputs alone, some equations follow from those of the activations
    delta = [d * np.where(k, 1, outside).astype(np.float32) for d, k in zip(delta, kept, strict=True)]
    found = joint(maps[0], delta, kept, maps)
    rank, alone = projector(np.concatenate([gradient_rows(maps[0].layer, d) for d in delta]))
    np.testing.assert_allclose(found.leverage, alone.reshape(records, -1).max(axis=1), atol=1e-6)
    assert found.share == pytest.approx((sum(k.sum() for k in kept) + rank) / (records * maps[0].n))
    _, together = projector(all_rows(maps[0], delta, kept, maps))
    assert found.largest == pytest.approx(together.max(), abs=1e-5)


def test_a_gradient_almost_of_kept_outputs_gives_away_the_one_that_is_not() -> None:
    m = LayerMap(FirstLayer(nn.Conv1d(1, 1, 2), nn.ReLU(), (1, 8)), {"weight": np.ones((1, 1, 2))})
    kept, delta = np.zeros((8, 7), dtype=bool), np.zeros((8, 7), dtype=np.float32)
    kept[:, 0] = kept[0, 3] = kept[0, 5] = True
    delta[:, 0] = 1
    delta[0, 4] = 1e-3  # with outputs 3 and 5 that makes three equations in four numbers
    assert joint(m, [delta], [kept]).largest == pytest.approx(0.75, abs=1e-5)
    delta[0, 4] = 0
    assert joint(m, [delta], [kept]).largest == pytest.approx(0.5 + 0.5 / 8)


def test_one_gradient_determines_two_windows() -> None:
    m = sensor_map()
    found = joint(m, [deltas(m, 2)], [np.zeros((2, 1600), dtype=bool)])
    assert found.share == 1 and found.largest == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.leverage, 1)


def test_one_gradient_determines_half_of_three_windows_and_none_of_four() -> None:
    m = layer_map(nn.Conv1d(1, 32, 9, stride=2, padding=4), (1, 100))
    three, four = (joint(m, [deltas(m, n)], [np.zeros((n, 1600), dtype=bool)]) for n in (3, 4))
    # of the kernel's 9 taps, 5 touch only even time steps and 4 only odd ones (stride 2), each with 32 channels
    assert three.rank == min(150, 5 * 32) + min(150, 4 * 32)
    assert three.share == pytest.approx(278 / 300)
    np.testing.assert_allclose(three.leverage, 1)
    assert four.largest == pytest.approx(four.leverage.max()) and four.largest < 1 - 1e-6
