"""Teachers, students and distilled students on Trifeature at 32 pixels: by class, by group and by individual.

This takes too long for a notebook. There are two tasks, each with ten seeds (all fixed before the run; the recipes were
chosen on other seeds, only by the accuracy of teacher and student):

- groups: tell shapes apart, with colours and textures balanced, at temperatures from 1 to 40
- correlated: the same, but in half of the training images the colour depends on the shape; the test set is balanced

There are 20,000 test images, because with a few thousand the largest difference between ten groups is mostly chance.
Results are written to permask_core/data/measured/distillation.json. An interrupted run continues from its stored
stages. Run it with `python benchmarks/distillation.py`; it takes about half an hour on two cores.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _machine import at_least, written

import permask_core
from permask_core.evaluation.fairness import (
    chance_level,
    demographic_parity_difference,
    equalized_odds_difference,
    individual_fairness,
)
from permask_core.evaluation.statistics import class_accuracies
from permask_core.experiments.distilled_students import Experiment, data, run, train_network
from permask_core.runs.progress import progress
from permask_core.runs.store import Store, commit, device_name, versions
from permask_core.training import Recipe

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "distillation.json"
FIRST = 100
MEASURES = {"DPD": demographic_parity_difference, "EOD": equalized_odds_difference}
IMAGES = {"n_train": 4000, "n_test": 20_000, "image_size": 32, "augment": False}
TASKS = {
    "groups": ({"label": "shape"}, (1, 2, 4, 6, 10, 20, 40)),
    "correlated": ({"label": "shape", "correlated": "colour", "match": 0.5}, (1, 4, 10, 40)),
}
STUDENT = Recipe(epochs=20, lr=0.003, batch_size=64, weight_decay=0.01, optimizer="adamw")
TEACHER = replace(STUDENT, epochs=12)


def experiment(task, quick):
    options = IMAGES | TASKS[task][0] | ({"n_train": 100, "n_test": 1000, "image_size": 16} if quick else {})
    few = {"epochs": 1, "batch_size": 50} if quick else {}
    return Experiment("trifeature", options, teacher="resnet20", teacher_options={"width": 0.125 if quick else 0.5},
                      teacher_recipe=replace(TEACHER, **few), student="lenet5", student_options={"width": 0.5},
                      student_recipe=replace(STUDENT, **few))


def measured(chosen, store, row):
    """Return the stored measures of a run: accuracies of classes, and fairness."""
    test, classes = data(chosen).test, data(chosen).classes
    found = {key: row[key] for key in ("role", "temperature", "seed", "accuracy", "loss", "seconds")}
    found["class_accuracies"] = class_accuracies(test.y, row["predictions"], classes).round(5).tolist()
    _, logits, _ = train_network(chosen, store, row["seed"], row["role"], row["temperature"])
    alike = individual_fairness(logits.softmax(1), test.x.float() / 255)
    found["individual"] = round(alike.mean, 7)
    for name in ("colour", "texture"):
        given = test.y, row["predictions"]
        for short, measure in MEASURES.items():
            about = {"sensitive_features": test.attributes[name]}
            chance = chance_level(measure, *given, **about, draws=50)
            found[f"{name} {short}"] = [round(value, 5) for value in (measure(*given, **about), *chance)]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--workers", type=at_least(1), default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="tiny images and one epoch, to check that it runs")
    parser.add_argument("--runs", default="build/distillation", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    store, seeds = Store(given.runs), range(FIRST, FIRST + given.seeds)
    chosen = {task: experiment(task, given.quick) for task in given.tasks}
    rows = {task: run(one, store, seeds=seeds, temperatures=TASKS[task][1][:2 if given.quick else None],
                      workers=given.workers) for task, one in chosen.items()}
    tasks = {task: {"settings": asdict(one), "rows": [
        measured(one, store, row) for row in progress(rows[task], f"measuring, {task}")]}
        for task, one in chosen.items()}
    command = "python benchmarks/distillation.py" + (f" --seeds {given.seeds}" if given.seeds != 10 else "")
    record = {"command": command, "commit": commit(), "versions": versions(),
              "device": f"{device_name('cpu')}, one thread a process", "tasks": tasks}
    written(given.result, record, indent=None)
    print(f"{sum(len(one['rows']) for one in tasks.values())} runs in {given.result}")


if __name__ == "__main__":
    main()
