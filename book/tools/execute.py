"""Execute one notebook with papermill: ``execute.py notebooks/x.ipynb build/source/notebooks/x.ipynb``.

The notebook runs in the folder that its executed copy goes to, so that whatever it writes beside itself stays in
build/. The copy appears under its own name only when every cell has finished; a failed one is kept in build/failed/.
"""

import os
import sys
import time
from pathlib import Path

import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

RUNNING, FAILED = Path("build/running"), Path("build/failed")


class Narrator(NBClientEngine):
    """Papermill's engine, saying in one whole line (two notebooks may run at once) which cell has finished."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        """Run the notebook and report after each code cell."""
        name, start = Path(nb_man.output_path).stem, time.perf_counter()
        total = sum(cell.cell_type == "code" for cell in nb_man.nb.cells)
        done, complete = 0, nb_man.cell_complete

        def report(cell, *args, **more):
            nonlocal done
            complete(cell, *args, **more)
            if cell.cell_type == "code" and cell.metadata.papermill["status"] == nb_man.COMPLETED:
                done += 1
                seconds = time.perf_counter() - start
                print(f"{name:<20} cell {done:>2} of {total}  {seconds:6.1f} s\n", end="", flush=True)

        nb_man.cell_complete = report
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


def execute(source: Path, target: Path) -> None:
    """Execute the notebook `source` and write it, with its outputs, to `target`.

    Raises
    ------
    PapermillExecutionError
        If a cell raises; the notebook up to there is then in build/failed/.
    """
    for folder in (target.parent, RUNNING, FAILED, Path(os.environ["PERMASK_FIGURES"])):
        folder.mkdir(parents=True, exist_ok=True)
    running = RUNNING / target.name
    papermill_engines.register("narrator", Narrator)
    try:
        papermill.execute_notebook(
            source,
            running,
            cwd=target.parent,
            engine_name="narrator",
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],  # for the kernel, which warns that it talks over TCP
        )
    except PapermillExecutionError:
        running.replace(FAILED / target.name)
        raise
    running.replace(target)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    try:
        execute(source, target)
    except PapermillExecutionError as error:
        sys.exit(f"{error}\n{source}: code cell {error.exec_count} failed; up to there it is in {FAILED / target.name}")
