"""Execute one notebook with papermill: ``execute.py notebooks/x.ipynb build/source/notebooks/x.ipynb``.

The notebook runs in the folder of its executed copy, so that its files are written below build/. The copy gets its
final name when the last cell has finished. A notebook that fails does not stop the build of the book: the copy ends at
the error, begins with a notice, and is immediately out of date, so that the next `make` runs it again. ``--seed`` is
added to the committed seed of the notebook.
"""

import argparse
import os
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from permask_core.runs.notebooks import PAGE, notebook_version, read_claims

SEED = "first_seed"  # the parameter of notebooks that draw random numbers
RUNNING, FAILED = Path("build/running"), Path("build/failed")
PARTIAL = "permask_failure"  # metadata of a page that ends at an error: the error message


class Narrator(NBClientEngine):
    """Papermill's engine, which prints one complete line for each finished cell (two notebooks may run at once)."""

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
        # Papermill would write the whole notebook twice for each cell; it also writes it at the end, whatever happened.
        save, nb_man.save = nb_man.save, lambda **_: None
        try:
            return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        finally:
            nb_man.save = save


def seeded(source: Path, added: int) -> dict:
    """Return the parameter that changes the seeds of the notebook `source`: its own seed plus `added`.

    A notebook without a seed draws no random numbers and gets no parameter.
    """
    found = papermill.inspect_notebook(source)
    return {SEED: int(found[SEED]["default"]) + added} if SEED in found else {}


def run(source: Path, target: Path, parameters: dict, **options) -> str:
    """Execute the notebook `source` with `parameters`, and write it with its outputs to `target`.

    Returns
    -------
    str
        The failure, empty if there is none: an error of a cell, a dead kernel, or a sentence that is claimed twice.
    """
    # The claims find their rates by the name of the page. Rates are for the committed parameters, with any seed.
    os.environ[PAGE] = f"{source.stem}@{notebook_version(source)}" if parameters.keys() <= {SEED} else ""
    try:  # a kernel inherits the environment
        papermill.execute_notebook(source, target, parameters, cwd=target.parent, progress_bar=False,
                                   extra_arguments=["--log-level=ERROR"],  # for the kernel, which warns of its TCP
                                   **options)
        read_claims(target)
    except PapermillExecutionError as error:
        return f"code cell {error.exec_count} failed: {error.ename}: {error.evalue}"
    except DeadKernelError:
        return "its kernel died, perhaps because it ran out of memory"
    except ValueError as error:
        return str(error)
    finally:
        del os.environ[PAGE]
    return ""


# What a folded cell is called, by what stands in its outputs; the first that fits.
LABELS = {"permask-figure": "Code for this figure", "permask-results": "Code for this table",
          "permask-claim": "Code for these claims", "'output_type': 'stream'": "Code for these numbers"}


def with_labels(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return an executed `notebook` in which each folded cell is labelled by its outputs, unless it has a label."""
    for cell in notebook.cells:
        tags, outputs = cell.metadata.get("tags", []), repr(cell.get("outputs"))
        if "mystnb" in cell.metadata or not {"hide-input", "hide-cell"} & {*tags}:
            continue
        label = "Imports" if cell.source.startswith(("import ", "from ")) else "Code"
        label = "Settings" if "check" in tags else label
        label = next((name for mark, name in LABELS.items() if mark in outputs), label)
        cell.metadata["mystnb"] = {"code_prompt_show": label, "code_prompt_hide": label}
    return notebook


def with_notice(notebook: nbformat.NotebookNode, failure: str) -> nbformat.NotebookNode:
    """Return an executed `notebook` that failed with a notice below its title instead of papermill's notice."""
    cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    text = failure.replace("`", "'").splitlines()[0]
    notice = nbformat.v4.new_markdown_cell(
        '<div class="admonition warning">\n<p class="admonition-title">This page is not complete</p>\n\n'
        f"It ends where this build failed: `{text}`\n\n</div>")
    metadata = {**notebook.metadata, PARTIAL: failure}
    return nbformat.from_dict({**notebook, "metadata": metadata, "cells": [*cells[:1], notice, *cells[1:]]})


def execute(source: Path, target: Path, added: int = 0) -> str:
    """Execute the notebook `source` into `target` and return the failure, empty if there is none.

    A failed notebook is also copied to build/failed/.
    """
    for folder in (target.parent, RUNNING, FAILED, Path(os.environ["PERMASK_FIGURES"])):
        folder.mkdir(parents=True, exist_ok=True)
    running, failed = RUNNING / target.name, FAILED / target.name
    papermill_engines.register("narrator", Narrator)
    failure = run(source, running, seeded(source, added) if added else {}, engine_name="narrator")
    if failure:
        nbformat.write(with_notice(nbformat.read(running, as_version=4), failure), failed)
        running.write_bytes(failed.read_bytes())
        os.utime(running, (0, 0))
    else:
        failed.unlink(missing_ok=True)
        nbformat.write(with_labels(nbformat.read(running, as_version=4)), running)
    running.replace(target)
    return failure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("PERMASK_SEED") or 0),
                        help="number added to the notebook's seed (default: the environment's PERMASK_SEED, or 0)")
    given = parser.parse_args()
    if failure := execute(given.source, given.target, given.seed):
        print(f"{given.source}: {failure}\nThe notebook until the error is {FAILED / given.target.name}.", flush=True)
