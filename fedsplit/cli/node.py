"""The owner's commands: ``fedsplit node init | start | preview | ledger``."""

import logging
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsplit.cli.extras import need
from fedsplit.common.errors import ConfigError
from fedsplit.device.link.resident import Answer, resident

node = typer.Typer(
    no_args_is_help=True, help="A device owner's tools: make a node, start it, see what would and what did leave."
)


def find_functions(settings: Path) -> None:
    """Let a user's own ``module:function`` be found beside the settings file and in the current folder."""
    sys.path[:0] = [str(Path.cwd()), str(settings.resolve().parent)]


@node.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the secret, the limits and the ledgers go.")],
    devices: Annotated[list[int], typer.Option("--device", help="Id of a device on this node; repeatable.")],
    allow: Annotated[
        list[str] | None,
        typer.Option(help="module:function or folder here that a run's settings may name; repeatable, in node.toml."),
    ] = None,
) -> None:
    """Make a node's folder: a secret, the commented limits file, and ledgers of what has left (nothing yet)."""
    from fedsplit.device.home import Home

    home = Home.create(folder, devices, allow or [])
    print(f"made {folder} for devices {home.devices}; read and change {folder / 'limits.toml'} before it takes part")
    print(f"to take part in a deployment give {home.key_path}.pub, and nothing else of it, to the server's operator")


@node.command()
def start(
    superlink: Annotated[str, typer.Option(help="The server, HOST:PORT.")],
    home: Annotated[Path, typer.Option(help="The node's folder, made by fedsplit node init.")],
    data: Annotated[
        Path | None, typer.Option(help="Its records: an .npz file for each device; default: what the run names.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="The authority (ca.crt) of the server's certificate.")] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS and no key: for a trial on one machine.")] = False,
    warm: Annotated[bool, typer.Option(help="Serve the server from this process, without Flower's SuperNode.")] = False,
) -> None:
    """Take part in the runs of a server, until stopped."""
    need("node")
    from fedsplit.common.certs import read_authority
    from fedsplit.data.devices import own_files
    from fedsplit.device.home import Home
    from fedsplit.device.link import DATA, HOME, SOCKET
    from fedsplit.device.link import supernode as connection
    from fedsplit.flower.programs import CLIENT_APP, check_flower, flower

    logging.getLogger("fedsplit").setLevel(logging.INFO)
    if warm:
        check_flower()
    own = Home(home.resolve())
    if (ca is None) != insecure:
        raise ConfigError("a node needs either --ca, the authority of the server's certificate, or --insecure")
    authority = read_authority(ca) if ca else None
    own.check()
    where = str(data.resolve()) if data else None
    if where is not None:
        own_files(where, own.devices)  # so that a wrong path is told before anything starts
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with own.serving():
        answer = _real_answer(str(own.folder), where)
        connection.wait_for_superlink(superlink, authority, stop)
        if stop.is_set():
            return
        if warm:
            from fedsplit.device.link.warm import WarmNode

            WarmNode(superlink, authority, own.key_path, own.seen_path, answer).serve(stop)
            return
        with resident(answer, connection.client_app, flower(CLIENT_APP)) as served:
            config = {HOME: str(own.folder), SOCKET: str(served.path)} | ({DATA: where} if where else {})
            command = connection.supernode_command(superlink, ca, own.key_path, config)
            print(shlex.join(command), flush=True)
            supernode = connection.SuperNode(command, served.programs, own.seen_path)

            def goes_on() -> bool:
                if not stop.is_set():
                    supernode.look_after()
                return not stop.is_set()

            try:
                served.serve_while(goes_on)
            finally:
                supernode.stop()


def _real_answer(home: str, data: str | None) -> Answer:
    """Return what answers for a real node, with all that it needs loaded already."""
    from fedsplit.device.nodes import answer, real_node

    return lambda kind, terms, payload: answer(lambda: real_node(terms, home, data), kind, payload)


@node.command()
def preview(
    config: Annotated[Path, typer.Argument(help="Settings of the run that the node would take part in.")],
    device: Annotated[int, typer.Option(help="Whose record.")] = 0,
    record: Annotated[int, typer.Option(help="Which of its training records.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="first_layer.safetensors; default: before training.")] = None,
    home: Annotated[Path | None, typer.Option(help="The node's folder, whose secret draws masks.")] = None,
    out: Annotated[Path, typer.Option(help="Page with what the attacks make of it.")] = Path("preview.html"),
) -> None:
    """Show the bytes that one record would release, and what the standard attacks make of such a release.

    They are exact but for what is drawn anew in a run: noise, and masks unless dropping.mask is "keyed".
    """
    need("pictures")
    from fedsplit.plan.settings import load_settings
    from fedsplit.runs.auditing import preview_record

    find_functions(config)
    shown = preview_record(load_settings(config), device, record, weights, home, out)
    console = Console()
    console.print(
        f"device {device}, record {record}: {shown.sent} of {shown.width} outputs {shown.how}, in {len(shown.payload)} "
        "bytes (its label among them)"
    )
    console.print(shown.payload.hex(" ", 2), style="dim")
    report = shown.report
    best, guess = report["strongest"], max(scores["psnr"] for scores in report["baselines"].values())
    console.print(f"strongest attack: {best['attack']}, {best['psnr']:.1f} dB (peak {report['peak']:.3g})")
    console.print(f"without the release: {guess:.1f} dB")
    console.print(f"largest leverage of a number: {report['criterion']['leverage_max']:.3f}")
    console.print(f"written to {out}")


@node.command()
def ledger(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    most: Annotated[int, typer.Option(help="How many records to show, those that told most first.")] = 10,
) -> None:
    """Show what has left of this node's records, against its limits."""
    from fedsplit.device.home import ASKED, LEDGERS, Home
    from fedsplit.guard.gaussian import epsilon

    home = Home(folder)
    for name in LEDGERS:
        accountant = home.accountant(name)
        rows = sorted(accountant.rows(), key=lambda row: (-row[1].releases, -row[1].equations))
        table = Table(title=f"{name} records: {len(rows)} have left", title_justify="left")
        for column in ("device", "record", "releases", "equations", "bits", "leverage", "gradient", "epsilon"):
            table.add_column(column, justify="right")
        for number, spent in rows[:most]:
            told = epsilon(spent.precision, home.limits.delta)
            asked = number & ASKED  # about for a prediction: known by its content
            table.add_row(
                "-" if asked else str(number >> 32),
                f"{number ^ ASKED:015x}" if asked else str(number & 0xFFFFFFFF),
                str(spent.releases),
                str(spent.equations),
                str(spent.bits),
                "-" if spent.leverage != spent.leverage else f"{spent.leverage:.3f}",
                f"{spent.gradient:.3f}",
                "unbounded" if told == float("inf") else f"{told:.2f}",
            )
        Console().print(table)
    kept = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in home.limits.model_dump().items())
    print(f"limits: {kept}")
