"""A notebook that takes a moment, in the place of those that train, and grids over it."""

import nbformat
import yaml

PARAMETERS = '''value: int = 1  # what it reports
rate: float = 0.5  # in (0, 1)
names: list = None  # of anything
fail: bool = False  # raise an error
runs: str = "runs"  # folder of the stages
output: str = ""  # folder of the results'''
CHECK = '''if not 0 < rate < 1:
    raise ValueError(f"rate is {rate!r}: expected a number in (0, 1)")
if value < 0:
    raise ValueError(f"value is {value!r}: expected at least 0")'''
WORK = '''import json, os, pathlib, time
if fail:
    raise RuntimeError("as asked")
(pathlib.Path(runs) / "log").parent.mkdir(parents=True, exist_ok=True)
with open(pathlib.Path(runs) / "log", "a") as file:
    print(value, file=file)
rows = [{"value": value, "rate": rate, "seed": seed, "parts": [1, 2], "seconds": time.time()} for seed in (0, 1)]
folder = pathlib.Path(output)
folder.mkdir(parents=True)
(folder / "results.svg").write_text("<svg/>")
(folder / "results.json").write_text(json.dumps({
    "runs": rows, "settings": {"rate": rate, "lists": [1]}, "commit": "abc", "versions": {"python": "3"},
    "device": f"{os.environ['OMP_NUM_THREADS']} threads"}))'''


def write_notebook(root, name="tiny", check=CHECK, work=WORK, parameters=PARAMETERS):
    """A notebook in the folder notebooks/ of `root`."""
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in (
        (parameters, ["parameters"]), (check, ["check"]), (work, []))]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3"}})
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


def write_grid(path, content):
    """A grid from what YAML holds, or from text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path
