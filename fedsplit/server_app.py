"""The Flower ServerApp, for ``flwr run``: the same training as ``fedsplit simulate``."""

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.client_app import APP_FOLDER
from fedsplit.config import load_settings
from fedsplit.training import TrainingRun, open_run_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with the settings file that the run config names; write to ``runs/`` of the current folder."""
    settings = load_settings(APP_FOLDER / str(context.run_config["config"]))
    folder = Path("runs") / f"{settings.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    open_run_folder(folder, settings, resume=False)
    result = TrainingRun(settings, folder).train(grid)
    print(f"test accuracy {result['test_accuracy']}, written to {folder.resolve()}")
