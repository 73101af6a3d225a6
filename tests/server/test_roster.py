"""The server's view of the nodes: whose key has which devices, who is asked again, who is kept out."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.common.certs import fingerprint, make_key_pair, read_public_key
from fedsplit.flower.record import to_record
from fedsplit.server import roster as module
from fedsplit.server.roster import Roster
from fedsplit.wire.exchange import Registration

DEVICES = 10
NOT_LET_IN = "its key has no devices here: fedsplit server register lets it in"
Answer = Callable[[Message], Message | None]


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_800_000_000.0 + self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic, time=found.time))
    # a Message cannot be built by nobody
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return found


class FakeGrid(Grid):
    """Nodes that answer as the tests say: by node, and None for one that does not."""

    def __init__(self, answers: dict[int, Answer], keys: dict[int, bytes] | None = None) -> None:
        self.answers, self.keys = answers, keys or {}
        self.asked: list[int] = []
        self.late: dict[str, Message] = {}
        self._sent: dict[str, Message] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.answers]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            assert message.metadata.message_type == "query"
            ids.append(f"message {len(self.asked)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._sent[ids[-1]] = message
            self.asked.append(message.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            if (message := self._sent.get(identifier)) is None:
                continue
            answer = self.answers.get(message.metadata.dst_node_id, silent)
            if (reply := answer(message)) is not None:
                del self._sent[identifier]
                replies.append(reply)
        return replies

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl=None):
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def has(*devices: int) -> Answer:
    some = np.array(devices, dtype=np.int64)
    payload = Registration(some, some + 10, some).to_bytes()
    return lambda message: Message(to_record(payload), reply_to=message)


def says(payload: bytes) -> Answer:
    return lambda message: Message(to_record(payload), reply_to=message)


def fails(code: int, reason: str) -> Answer:
    return lambda message: Message(Error(code, reason), reply_to=message)


def silent(message: Message) -> None:
    return None


def look(roster: Roster, grid: FakeGrid, timeout: float = 60.0) -> list[int]:
    """Look once; return the nodes that were asked."""
    before = len(grid.asked)
    asked, _ = roster.look(grid, timeout)
    assert asked == len(grid.asked) - before
    return grid.asked[before:]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Public keys as Flower gives them: PEM."""
    folder, found = tmp_path_factory.mktemp("keys"), []
    for number in range(4):
        make_key_pair(folder / str(number), "")
        found.append(pem(folder / f"{number}.pub"))
    return found


def name(key: bytes) -> str:
    return fingerprint(read_public_key(key))


def pem(path: Path) -> bytes:
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return serialization.load_ssh_public_key(path.read_bytes()).public_bytes(*form)


def test_nodes_register_once() -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({7: has(0, 2), 5: has(1)})
    assert look(roster, grid) == [5, 7]
    assert {node: r.devices.tolist() for node, r in roster.nodes.items()} == {5: [1], 7: [0, 2]}
    assert look(roster, grid) == [] and not roster.waiting
    grid.answers[6] = has(3)
    assert look(roster, grid) == [6]  # the new one alone
    del grid.answers[5]
    assert look(roster, grid) == [] and sorted(roster.nodes) == [6, 7] and roster.present == {6, 7}
    grid.answers[5] = has(1)
    assert look(roster, grid) == [5]  # who comes back is asked again


def test_a_key_registers_its_own_devices(keys: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    """Another's, and one that is nobody's, are an offence; a part of its own is none."""
    owners = {name(keys[0]): [0, 1], name(keys[1]): [2], name(keys[2]): [3]}
    grid = FakeGrid({10: has(0), 11: has(1, 2), 12: has(3, 9)}, {10: keys[0], 11: keys[1], 12: keys[2]})
    roster = Roster(DEVICES, 3, lambda: owners)
    look(roster, grid)
    assert sorted(roster.nodes) == [10]
    assert roster.refusals == {
        11: "devices: 1 does not belong to the node's key",
        12: "devices: 9 does not belong to the node's key",
    }
    assert [roster.account(node).offences for node in (10, 11, 12)] == [0, 1, 1]
    assert "node 11 is left out: devices: 1 does not belong to the node's key (offence 1)" in caplog.text
    assert look(roster, grid) == []  # who was refused is not asked again and again


@pytest.mark.parametrize("key", [3, b"", b"garbage"])
def test_an_unknown_key_is_refused(key: int | bytes, keys: list[bytes]) -> None:
    """Even without any device, and before anybody has the ones that it names."""
    roster = Roster(DEVICES, 3, lambda: {name(keys[0]): [0]})
    grid = FakeGrid({10: has(0), 11: has()}, dict.fromkeys((10, 11), keys[key] if isinstance(key, int) else key))
    look(roster, grid)
    assert roster.nodes == {}
    assert roster.refusals == dict.fromkeys(
        (10, 11), "its key has no devices here: fedsplit server register lets it in"
    )
    assert roster.account(10).offences == 0 and roster.account(10).devices == []


def test_a_node_that_is_let_in_during_a_run_registers(keys: list[bytes]) -> None:
    owners = {name(keys[0]): [0]}
    roster, grid = Roster(DEVICES, 3, lambda: owners), FakeGrid({10: has(0)}, {10: keys[0], 11: keys[1]})
    look(roster, grid)
    owners[name(keys[1])] = [1]
    grid.answers[11] = has(1)
    look(roster, grid)
    assert sorted(roster.nodes) == [10, 11]


def test_without_a_list_the_first_to_name_a_device_has_it() -> None:
    """The second is refused, but for no offence of its own, and asked again when the first has gone."""
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: has(1, 2), 6: has(2)})
    look(roster, grid)
    assert sorted(roster.nodes) == [5]
    assert roster.refusals == {6: "devices: 2 is registered by another node"}
    assert roster.account(6).offences == 0
    del grid.answers[5]
    assert look(roster, grid) == [6] and sorted(roster.nodes) == [6] and roster.refusals == {}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (has(3, DEVICES), "devices must be below 10, got 10"),
        (says(b""), ""),
        (says(b"garbage"), ""),
        (says(Registration(np.array([1]), np.array([1]), np.array([1])).to_bytes() + b"x"), ""),
        (lambda message: Message(RecordDict(), reply_to=message), "message must hold one packed array"),
    ],
)
def test_a_malformed_registration_is_an_offence(answer: Answer, told: str) -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: has(0), 6: answer})
    look(roster, grid)
    assert sorted(roster.nodes) == [5] and list(roster.refusals) == [6] and told in roster.refusals[6]
    assert roster.account(6).offences == 1


def test_a_nodes_own_error_is_no_offence(caplog: pytest.LogCaptureFixture) -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: fails(2, "Traceback\n  File x\nConfigError: no such model\n")})
    look(roster, grid)
    assert roster.refusals == {5: "ConfigError: no such model"} and roster.account(5).offences == 0
    assert "node 5 could not register: ConfigError: no such model" in caplog.text


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    ],
)
def test_flowers_word_that_there_is_no_answer_is_no_refusal(code: int) -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: fails(code, "gone")})
    assert look(roster, grid) == [5]
    assert roster.refusals == {} and not roster.hopeless and not roster.waiting
    grid.answers[5] = has(0)
    assert look(roster, grid) == [5] and sorted(roster.nodes) == [5]


def test_who_has_not_answered_in_time_is_asked_again(clock: Clock) -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: silent, 6: has(0)})
    assert look(roster, grid, timeout=60) == [5, 6]
    assert roster.waiting and not roster.hopeless and sorted(roster.nodes) == [6]
    clock.now += 59
    assert look(roster, grid, timeout=60) == [] and roster.waiting
    clock.now += 2
    assert look(roster, grid, timeout=60) == [5] and roster.waiting
    grid.answers[5] = has(1)
    assert look(roster, grid) == [] and sorted(roster.nodes) == [5, 6] and not roster.waiting


def test_who_has_gone_is_not_waited_for(clock: Clock) -> None:
    """And what it answers afterwards counts for nothing."""
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: silent})
    look(roster, grid)
    late = grid.answers.pop(5)
    assert late is silent
    look(roster, grid)
    assert not roster.waiting
    (identifier,) = grid._sent
    message = grid._sent.pop(identifier)
    assert roster._hear(has(0)(message)) == 0 and roster.nodes == {} and roster.refusals == {}


def test_of_a_simulation_no_others_will_come() -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: has(0), 6: has(0), 7: silent})
    look(roster, grid)
    assert roster.refusals and not roster.hopeless  # one has still to answer
    grid.answers[7] = has(1)
    look(roster, grid)
    assert roster.hopeless
    for node in (6, 7):
        del grid.answers[node]
    look(roster, grid)
    assert not roster.hopeless and sorted(roster.nodes) == [5]
    assert not Roster(DEVICES, 3).hopeless  # of nobody


def test_a_deployment_is_hopeless_when_every_known_key_was_refused(keys: list[bytes]) -> None:
    owners = {name(keys[0]): [0], name(keys[1]): [1]}
    roster, grid = Roster(DEVICES, 3, lambda: owners), FakeGrid({5: has(1)}, {5: keys[0], 6: keys[1]})
    look(roster, grid)
    assert list(roster.refusals) == [5] and not roster.hopeless  # the other may come
    grid.answers[6] = has(0)
    look(roster, grid)
    assert sorted(roster.refusals) == [5, 6] and roster.hopeless


def test_strangers_do_not_make_a_deployment_hopeless(keys: list[bytes]) -> None:
    """Keys that Flower knows and the server's list does not: the nodes on the list may come yet."""
    roster = Roster(DEVICES, 3, lambda: {name(keys[0]): [0]})
    look(roster, FakeGrid({5: has(0)}, {5: keys[3]}))
    assert list(roster.refusals) == [5] and not roster.hopeless


def test_a_resumed_run_knows_offenders_by_their_keys(keys: list[bytes]) -> None:
    """After a restart of the SuperLink nodes have other numbers."""
    roster = Roster(DEVICES, 2)
    look(roster, FakeGrid({5: has(0), 6: has(1), 7: has(2)}, {5: keys[0], 6: keys[1]}))
    for node, times in ((5, 2), (6, 1), (7, 1)):
        for _ in range(times):
            roster.offend(node, "codes: not finite")
    later = Roster(DEVICES, 2)
    later.offences = roster.offences
    look(later, FakeGrid({15: has(0), 16: has(1), 17: has(2)}, {15: keys[0], 16: keys[1]}))
    assert {n: (a.offences, a.quarantined) for n, a in later.accounts.items()} == {
        15: (2, True), 16: (1, False), 17: (0, False)
    }  # fmt: skip
    assert later.present == {16, 17} and later.offences == roster.offences
    later.offend(16, "codes: not finite")
    assert later.account(16).quarantined


def test_who_is_quarantined_is_not_listed(keys: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    roster, grid = Roster(DEVICES, 2), FakeGrid({5: has(0), 6: has(1)})
    look(roster, grid)
    roster.offend(5, "codes: not finite")
    assert sorted(roster.nodes) == [5, 6]
    roster.offend(5, "codes: not finite")
    assert sorted(roster.nodes) == [6] and roster.account(5).quarantined
    assert "node 5 (devices 0) is quarantined after 2 offences" in caplog.text
    for _ in range(3):
        assert look(roster, grid) == []
        assert roster.present == {6} and sorted(roster.nodes) == [6] and not roster.hopeless
    grid.answers[7] = has(0)  # its device is free for another
    assert look(roster, grid) == [7] and sorted(roster.nodes) == [6, 7]


def test_what_a_quarantined_node_had_still_to_say_is_not_heard() -> None:
    roster, grid = Roster(DEVICES, 1), FakeGrid({5: silent, 6: has(1)})
    look(roster, grid)
    roster.offend(5, "a lie")
    grid.answers[5] = has(0)
    look(roster, grid)
    assert sorted(roster.nodes) == [6] and roster.account(5).last_seen == 0.0


def test_one_that_missed_a_message_is_asked_for_its_devices_if_it_is_gone() -> None:
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: has(0), 6: has(1)})
    look(roster, grid)
    roster.miss(5, gone=False)
    assert look(roster, grid) == []
    roster.miss(5, gone=True)
    assert look(roster, grid) == [5] and sorted(roster.nodes) == [5, 6]
    assert roster.account(5).missed == 2 and roster.account(6).missed == 0


def test_rows_say_what_was_seen_of_each(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="fedsplit")
    grid = FakeGrid({9: has(0, 1, 2, 5), 8: has(3), 7: fails(2, "ConfigError: no"), 6: has(4), 5: silent})
    roster = Roster(DEVICES, 2)
    look(roster, grid)
    clock.now += 5
    roster.sent(9, 100)
    roster.seen(9, 1000)
    roster.account(9).refused += 3
    roster.sent(9, 50)
    roster.miss(9, gone=False)
    roster.sent(8, 10)
    roster.miss(8, gone=True)
    for _ in range(2):
        roster.offend(6, "a lie")
    rows = {row["node"]: row for row in roster.rows()}
    assert list(rows) == ["5", "6", "7", "8", "9"]
    registered = len(Registration(np.arange(4), np.arange(4), np.arange(4)).to_bytes())
    assert rows["9"] == {
        "node": "9",
        "state": "connected",
        "devices": "0-2, 5",
        "last_seen": clock.time(),
        "exchanges": 2,
        "bytes_up": registered + 1000,
        "bytes_down": 150,
        "refused": 3,
        "missed": 1,
        "offences": 0,
        "quarantined": False,
    }
    assert (rows["8"]["state"], rows["8"]["missed"], rows["8"]["last_seen"]) == ("away", 1, clock.time() - 5)
    assert (rows["6"]["state"], rows["6"]["offences"], rows["6"]["devices"]) == ("quarantined", 2, "4")
    assert (rows["7"]["state"], rows["7"]["devices"]) == ("refused: ConfigError: no", "")
    assert (rows["5"]["state"], rows["5"]["last_seen"]) == ("away", 0.0)


def test_a_second_reply_to_a_question_is_not_heard() -> None:
    """One node can answer in another's name, as long as the reply's outside is its own."""
    roster, grid = Roster(DEVICES, 3), FakeGrid({5: has(0), 6: has(1)})
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [reply for reply in pull(ids) for _ in range(2)]  # type: ignore[method-assign]
    look(roster, grid)
    assert sorted(roster.nodes) == [5, 6]
