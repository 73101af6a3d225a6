"""The Flower ServerApp, for ``flwr run``: the same training as ``fedsplit simulate``."""

import shutil

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.client_app import APP_FOLDER, STATE_FOLDER
from fedsplit.config import default_folder, load_settings
from fedsplit.training import TrainingRun, check_data, open_run_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with the settings file that the run config names; write to ``runs/`` of the current folder."""
    settings = load_settings(APP_FOLDER / str(context.run_config["config"]))
    folder = default_folder(settings)
    run = TrainingRun(settings, folder)
    check_data(run.source)
    open_run_folder(folder, settings, resume=False)
    result = run.train(grid)
    shutil.rmtree(STATE_FOLDER / f"{run.strategy.progress.run:x}", ignore_errors=True)
    print(f"test accuracy {result['test_accuracy']}, written to {folder.resolve()}")
