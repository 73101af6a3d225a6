"""The Flower ServerApp: the same training as ``fedsplit simulate``, over the nodes of a SuperLink."""

import shutil
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedsplit.flower.record import TERMS
from fedsplit.plan.settings import default_folder, load_settings
from fedsplit.runs.assembly import calibrated
from fedsplit.runs.client_app import APP_FOLDER, CONFIG, STATE_FOLDER
from fedsplit.runs.folder import SUBMITTED, open_run_folder
from fedsplit.runs.following import working
from fedsplit.runs.pictures import draw_curves
from fedsplit.runs.training import TrainingRun
from fedsplit.server.link.folder import ServerFolder
from fedsplit.server.link.replies import DeploymentGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with the settings that ``fedsplit run`` has left in the run folder, or those of the file ``config``.

    Besides the nodes' terms a run config may have ``out``, the run folder (default: in ``runs/`` of the current
    folder), ``resume``, and for real nodes ``nodes``, the server's folder, which says which devices each key has: empty
    without keys.
    """
    config = context.run_config
    submitted = Path(str(config["out"])) / SUBMITTED if TERMS in config else APP_FOLDER / str(config[CONFIG])
    settings = load_settings(submitted)
    folder = Path(str(config["out"])) if "out" in config else default_folder(settings)
    owners = ServerFolder(Path(str(config["nodes"]))).owners if config.get("nodes") else None
    if isinstance(grid, HttpGrid):
        grid = DeploymentGrid(grid)
    with working(folder, f"{context.run_id}"):
        real, resume = "nodes" in config, bool(config.get("resume", False))
        if real:  # they need the time that they need
            devices = settings.devices.model_copy(update={"profile": None})
            settings = settings.model_copy(update={"devices": devices})
        settings = calibrated(settings, folder if resume else None)
        run = TrainingRun(settings, folder, owners=owners, real=real)
        if not real:
            run.check_startable()
        open_run_folder(folder, settings, resume=resume)
        result = run.train(grid)
    draw_curves(folder)  # whoever follows the run has its result already
    shutil.rmtree(STATE_FOLDER / f"{run.strategy.progress.run:x}", ignore_errors=True)
    known = [name for name in ("test_accuracy", "test_auc", "test_r2") if result.get(name) is not None]
    said = f"{known[0]} {result[known[0]]:.4f}, " if known else ""
    print(f"{said}written to {folder.resolve()}")
