"""The server operator's commands: ``fedsplit certs | server start | server register | run | status``."""

import json
import shlex
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from fedsplit.cli.console import show_progress, stderr
from fedsplit.cli.extras import need
from fedsplit.cli.node import find_functions
from fedsplit.common.errors import ConfigError

server = typer.Typer(no_args_is_help=True, help="The server of a deployment: start it, let nodes in.")


def certs(
    folder: Annotated[Path, typer.Argument(help="The server's folder.")],
    hosts: Annotated[list[str], typer.Option("--host", help="Name or address by which nodes reach it; repeatable.")],
    days: Annotated[int, typer.Option(help="How long the certificates are good for.")] = 365,
) -> None:
    """Make a private authority and the server's certificate; nodes need ca.crt, nobody needs the private key."""
    from fedsplit.common.certs import CA, make_certificates

    make_certificates(folder, list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"])), days)
    print(f"made {folder}; give {folder / CA} to the nodes, and nothing else of it")


@server.command()
def start(
    folder: Annotated[Path, typer.Argument(help="The server's folder, with the certificates.")],
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine should reach a proxy only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Where to listen.")] = 9092,
    name: Annotated[str, typer.Option(help="By which fedsplit run and Flower's commands know it.")] = "fedsplit",
    insecure: Annotated[bool, typer.Option(help="No TLS and no keys: for a trial on one machine.")] = False,
) -> None:
    """Start Flower's SuperLink: with TLS, and for nodes whose keys were registered."""
    need("server")
    from fedsplit.common.certs import read_authority
    from fedsplit.device.link.supernode import check_superlink
    from fedsplit.flower import programs as flower
    from fedsplit.server.link.folder import ServerFolder, superlink_command

    where = ServerFolder(folder.resolve())
    command = superlink_command(where, host, port, insecure=insecure)
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    reached = f"[{reached}]:{port}" if ":" in reached else f"{reached}:{port}"
    config = flower.connect_flower(name, reached, None if insecure else where.authority)
    known, authority = ([], b"") if insecure else (where.keys(), read_authority(where.authority))
    print(f"known as {name!r} in {config}")
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(command, env=flower.environment(), preexec_fn=flower.end_with_parent)
    signal.signal(signal.SIGINT, lambda *_: None)  # which the SuperLink gets as well
    stopped = threading.Event()

    def stop(*_: object) -> None:
        stopped.set()
        process.terminate()

    signal.signal(signal.SIGTERM, stop)
    try:
        while known and process.poll() is None:
            if check_superlink(reached, authority) and flower.tell_keys(reached, authority, known):
                break
            time.sleep(0.05)
    except ConfigError:
        process.terminate()
        raise
    code = process.wait()
    if code and not stopped.is_set():
        raise ConfigError(f"flower-superlink ended with code {code}: see what it said above")


@server.command()
def register(
    public_key: Annotated[Path, typer.Argument(help="A node's public key, key.pub.")],
    superlink: Annotated[str, typer.Option(help="The SuperLink's name.")] = "fedsplit",
    devices: Annotated[
        list[int] | None, typer.Option("--device", help="Its devices; default: those that the key's file names.")
    ] = None,
) -> None:
    """Let a node in, with its devices: no other key may register them."""
    need("server")
    from fedsplit.server.link.folder import register_node

    chosen = register_node(superlink, public_key, devices)
    print(f"registered {public_key} for devices {chosen}")


def run(
    config: Annotated[Path, typer.Argument(help="Settings file (TOML).")],
    superlink: Annotated[str, typer.Option(help="The SuperLink's name.")] = "fedsplit",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-TIMESTAMP.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Result on stdout as JSON, logs on stderr.")] = False,
) -> None:
    """Train over the nodes of a SuperLink, on its machine, with the settings of CONFIG."""
    need("server")
    from fedsplit.cli.report import result_table
    from fedsplit.plan.experiment import Experiment
    from fedsplit.plan.named_code import names_code
    from fedsplit.plan.settings import AuditSettings, GuardSettings, default_folder, load_settings
    from fedsplit.runs.folder import check_fresh, submitting
    from fedsplit.runs.following import follow, forget_state
    from fedsplit.server.link import runs

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    find_functions(config)
    given = load_settings(config, overrides or [])
    # each owner's guard goes by the owner's limits, nobody but the owner could record originals for an audit, and real
    # devices need the time that they need
    devices = given.devices.model_copy(update={"profile": None})
    settings = given.model_copy(update={"guard": GuardSettings(), "audit": AuditSettings(), "devices": devices})
    if settings != given:
        said = "[guard], [audit] and [devices.profile] are for simulations: left out"
        stderr.print(said, markup=False, highlight=False)
    folder = (out or default_folder(settings)).resolve()
    modules = runs.own_modules(config.resolve().parent, list(names_code(settings).values()))
    if not resume:
        check_fresh(folder)
    forget_state(folder)
    terms = Experiment(settings).terms.to_json()
    with submitting(folder, settings):
        number = runs.submit(terms, superlink, folder, resume=resume, modules=modules)

    def ended() -> str | None:
        status = runs.run_status(number, superlink)
        return f"run {number} is {status}: see flwr log {number} {superlink}" if "finished" in status else None

    stderr.print(f"run {number} on {superlink!r}, in {folder}", markup=False, highlight=False)
    try:
        with show_progress(settings.run.rounds) as report:
            result = follow(folder, report, partial(stderr.print, markup=False, highlight=False), ended, number)
    except KeyboardInterrupt:
        said = (
            f"fedsplit: run {number} goes on; see fedsplit status {folder}, end it with flwr stop {number} {superlink}"
        )
        stderr.print(said, markup=False, highlight=False)
        raise
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(result_table(result, folder))


def status(
    folder: Annotated[Path, typer.Argument(help="The run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what the server has seen of each node: when, how much, and what it was refused."""
    from fedsplit.runs.folder import read_nodes
    from fedsplit.runs.following import ago

    rows = read_nodes(folder)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=str(folder), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("devices", "state", "last seen"):
        table.add_column(column)
    for column in ("exchanges", "up", "down", "missed", "offences", "over limits"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["devices"],
            escape(row["state"]),
            ago(row["last_seen"]),
            f"{row['exchanges']:,}",
            decimal(row["bytes_up"]),
            decimal(row["bytes_down"]),
            str(row["missed"]),
            str(row["offences"]),
            f"{row['refused']:,}",
        )
    Console().print(table)
