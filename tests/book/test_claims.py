"""The list of claims, how many may fail, and the repetitions that give them their rates."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest

from book.tools import claims, replicate
from permask_core.runs.notebooks import KEY, notebook_version, read_claims

CLAIMS = """import os
from permask_core.display import claim
claim("The seed is even.", first_seed % 2 == 0, f"seed {first_seed}")
claim("There are two threads.", os.environ["OMP_NUM_THREADS"] == "2", "as the environment has it")"""


def write_notebook(path, *sources, title="A page"):
    """A notebook whose first code cell has the parameters."""
    cells = [nbformat.v4.new_markdown_cell(f"# {title}"), *map(nbformat.v4.new_code_cell, sources)]
    if sources:
        cells[1].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A book of two notebooks, of which one draws random numbers."""
    write_notebook(tmp_path / "notebooks" / "chance.ipynb", "first_seed: int = 4  # of all", CLAIMS)
    write_notebook(tmp_path / "notebooks" / "sure.ipynb", "width: int = 1  # of all", "assert width")
    chapters = "".join(f"      - file: notebooks/{name}\n" for name in ("sure", "chance"))
    parts = f"parts:\n  - caption: Part one\n    chapters:\n      - file: book/x\n{chapters}"
    (tmp_path / "_toc.yml").write_text(parts)
    for module in (claims, replicate):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "BUILT", tmp_path / "built")
    monkeypatch.setattr(replicate, "WORK", tmp_path / "work")
    monkeypatch.setattr(replicate, "RATES", tmp_path / "claims.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_without_kernel(source, target, parameters):
    """What papermill does with a small notebook, in this process."""
    book, names, claimed = nbformat.read(source, as_version=4), {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("permask_core.display.claims.display", lambda one: claimed.append(one._repr_mimebundle_()))
        try:
            for cell in (cell for cell in book.cells if cell.cell_type == "code"):
                exec(cell.source, names)
                names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
        except AssertionError as error:
            return f"AssertionError: {error}"
    book.cells[-1].outputs = [nbformat.v4.new_output("display_data", data, metadata=found) for data, found in claimed]
    nbformat.write(book, target)
    return ""


@pytest.fixture
def in_this_process(monkeypatch):
    """Repetitions without a process or a kernel of their own; returns the names of those that were started."""
    names = []
    monkeypatch.setattr(replicate, "run", run_without_kernel)

    def started(name, settings, source):
        names.append(name)
        replicate.result_path(name, source.stem).parent.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {"OMP_NUM_THREADS": "1", **settings["environment"]}.items():
                patch.setenv(key, value)
            patch.setenv("PERMASK_REPETITION", json.dumps(settings))
            try:
                replicate.repeat(name, source)
            except SystemExit:
                return False
        return True

    monkeypatch.setattr(replicate, "started", started)
    return names


def test_repetitions_have_other_seeds_or_other_arithmetic():
    named = replicate.repetitions(2)
    assert [one["seeds"] for one in named.values()] == [1000, 2000, 0, 0, 0]
    assert [bool(one["environment"]) for one in named.values()] == [False, False, True, True, True]


def test_rates_are_those_of_the_repetitions(project, in_this_process, capsys):
    assert replicate.main(1, [], jobs=1) == 0
    record = json.loads((project / "claims.json").read_text())
    page = record["pages"]["chance"]
    assert list(record["pages"]) == ["chance"]
    assert page["version"] == notebook_version(project / "notebooks" / "chance.ipynb")
    even, threads = (page["claims"][sentence] for sentence in ("The seed is even.", "There are two threads."))
    assert {name: one["evidence"] for name, one in even.items()} == {
        "seeds + 1000": "seed 1004", "avx2": "seed 4", "default": "seed 4", "two threads": "seed 4"}
    assert [name for name, one in threads.items() if one["holds"]] == ["two threads"]
    (machine,) = record["repetitions"]["avx2"]["machines"]
    assert machine["processor"] and machine["commit"] and machine["versions"]["torch"]
    assert "0 of 4 repetitions of notebooks are finished" in capsys.readouterr().out


def test_what_was_repeated_is_not_repeated_again_unless_the_notebook_changed(project, in_this_process):
    replicate.main(1, [], jobs=1)
    replicate.result_path("avx2", "chance").unlink()  # as if it had been interrupted there
    del in_this_process[:]
    replicate.main(2, [], jobs=1)
    assert in_this_process == ["seeds + 2000", "avx2"]
    changed = CLAIMS.replace("even", "odd")
    write_notebook(project / "notebooks" / "chance.ipynb", "first_seed: int = 4  # of all", changed)
    assert replicate.gather(replicate.repetitions(2), [project / "notebooks/chance.ipynb"])["pages"] == {}
    del in_this_process[:]
    replicate.main(2, [], jobs=1)
    assert len(in_this_process) == 5


def test_rates_from_elsewhere_are_kept_until_their_notebook_changes(project, in_this_process, monkeypatch):
    write_notebook(project / "notebooks" / "luck.ipynb", "first_seed: int = 7  # of all", CLAIMS)
    replicate.main(2, [], jobs=1)
    before = json.loads((project / "claims.json").read_text())
    monkeypatch.setattr(replicate, "WORK", project / "another checkout")
    replicate.main(1, ["luck"], jobs=1)
    after = json.loads((project / "claims.json").read_text())
    assert after["pages"]["chance"] == before["pages"]["chance"]
    assert after["repetitions"].keys() == before["repetitions"].keys()
    assert after["pages"]["luck"]["claims"].keys() == before["pages"]["luck"]["claims"].keys()
    assert all(len(one) == 5 for page in after["pages"].values() for one in page["claims"].values())
    changed = CLAIMS.replace("even", "odd")
    write_notebook(project / "notebooks" / "chance.ipynb", "first_seed: int = 4  # of all", changed)
    replicate.main(1, ["luck"], jobs=1)
    assert list(json.loads((project / "claims.json").read_text())["pages"]) == ["luck"]


def test_notebook_that_fails_is_named_and_leaves_the_others_their_rates(project, in_this_process, capsys):
    write_notebook(project / "notebooks" / "broken.ipynb", "first_seed: int = 4  # of all", "assert first_seed < 1000")
    assert replicate.main(1, [], jobs=1) == 1
    assert "broken, seeds + 1000: failed" in capsys.readouterr().out
    assert "chance" in json.loads((project / "claims.json").read_text())["pages"]


def test_unknown_notebook_is_refused_before_anything_runs(project, in_this_process):
    with pytest.raises(SystemExit, match="unknown notebooks chanse: expected some of chance, sure"):
        replicate.main(1, ["chanse"], jobs=1)
    assert not in_this_process


def test_a_repetition_runs_in_its_environment_with_a_store_of_its_own(project, monkeypatch):
    seen = {}
    monkeypatch.setattr(replicate.subprocess, "run",
                        lambda command, env, cwd: seen.update(env) or type("Done", (), {"returncode": 3})())
    assert not replicate.started("avx2", replicate.repetitions(1)["avx2"], Path("notebooks/chance.ipynb"))
    assert seen["ATEN_CPU_CAPABILITY"] == "avx2" and seen["OMP_NUM_THREADS"] == "1"
    assert seen["PERMASK_RUNS"] == str(project / "work" / "avx2")


# The list


def build(project, holds=(True, True), failed=""):
    """Executed notebooks as the book has them."""
    claimed = [{"output_type": "display_data", "data": {},
                "metadata": {KEY: {"sentence": f"Sentence {k}.", "holds": one, "evidence": "n = <3>"}}}
               for k, one in enumerate(holds)]
    for name, outputs in (("sure", []), ("chance", claimed)):
        path = project / "built" / f"{name}.ipynb"
        write_notebook(path, "1", title=f"The title of {name}")
        book = nbformat.read(path, as_version=4)
        book.cells[1].outputs = [nbformat.from_dict(output) for output in outputs]
        book.metadata.update({claims.PARTIAL: failed} if failed and name == "chance" else {})
        nbformat.write(book, path)
    return claims.read_book()


def rates_of(monkeypatch, project, made, **changes):
    """Rates of the page "chance": by sentence, whether it held in each repetition."""
    record = {"version": notebook_version(project / "notebooks/chance.ipynb"), "claims": {
        sentence: {f"seeds + {k}": {"holds": one, "evidence": "n = 3"} for k, one in enumerate(each)}
        for sentence, each in made.items()}, **changes}
    machines = [{"processor": "P", "commit": "C"}]
    stored = {"command": "make replicate", "pages": {"chance": record}, "repetitions": {
        f"seeds + {k}": {"seeds": k, "environment": {}, "machines": machines} for k in range(3)}}
    for module in ("book.tools.claims", "permask_core.display.claims"):
        monkeypatch.setattr(f"{module}.measured_claims", lambda: stored)
    return stored


def test_summary_lists_what_does_not_hold_and_is_no_failure(project, monkeypatch, capsys):
    rates_of(monkeypatch, project, {"Sentence 1.": [True, False, True]})
    assert claims.summary(build(project, holds=(True, False))) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 hold in this build; these do not:" in printed
    assert 'chance: "Sentence 1." (n = <3>; held in 2 of 3 repetitions)' in printed and "Sentence 0" not in printed


def test_summary_names_a_notebook_that_failed_and_is_one_then(project, capsys):
    assert claims.summary(build(project, failed="code cell 7 failed: AssertionError: ")) == 1
    assert "Failed: chance, code cell 7 failed: AssertionError" in capsys.readouterr().out


def test_page_has_every_claim_by_chapter_with_its_rate(project, monkeypatch):
    rates_of(monkeypatch, project, {"Sentence 0.": [True, True, True], "Sentence 1.": [True, False, True]})
    text = claims.write_page(build(project, holds=(True, False)))
    assert "**1 of 2 claims hold in this build.**" in text and "## Part one" in text
    assert "{doc}`The title of chance </notebooks/chance>`" in text and "/notebooks/sure" not in text  # no claims there
    assert "held in 3 of 3 repetitions" in text and "n = &lt;3&gt;; held in 2 of 3 repetitions" in text
    assert [f"{held} of 2</td><td>P" in text for held in (0, 1, 2)] == [False, True, True]  # by repetition


def test_rates_of_another_version_are_no_rates(project, monkeypatch):
    rates_of(monkeypatch, project, {"Sentence 0.": [True] * 3}, version="another")
    pages = build(project)
    text = claims.write_page(pages)
    assert "of 3 repetitions" not in text and text.count("not yet repeated") == 2 and "Of one page the code has" in text
    assert claims.allowed(pages, {}) == 2


# The bound


def some_page(name, rates, n_claims):
    return claims.Page(name, name, "part", "", [{"sentence": str(k), "holds": True} for k in range(n_claims)], rates)


def repeated(pages):
    """The stored form of rates by page, sentence and repetition."""
    return {name: {"claims": {str(k): {str(i): {"holds": bool(one)} for i, one in enumerate(row)}
                              for k, row in enumerate(rows)}} for name, rows in pages.items()}


def test_bound_is_the_quantile_of_what_repetitions_lost():
    rng = np.random.default_rng(0)
    held = {f"p{i}": rng.random((4, 13)) > 0.05 for i in range(20)}
    bound = claims.allowed([some_page(name, {"0": (1, 1)}, 4) for name in held], repeated(held))
    lost = {name: np.append((~rows).sum(0), (~rows).sum(0).max() + 1) for name, rows in held.items()}
    drawn = sum(rng.choice(one, 20_000) for one in lost.values())
    assert (drawn > bound).mean() < 0.002 < (drawn > bound - 2).mean()


def test_bound_is_tight_where_every_claim_held():
    held = {f"p{i}": np.ones((5, 13)) for i in range(20)}
    assert 3 <= claims.allowed([some_page(name, {"0": (1, 1)}, 5) for name in held], repeated(held)) <= 7


def test_page_that_was_not_repeated_constrains_nothing():
    held = {"p": np.ones((1, 13))}
    known = some_page("p", {"0": (1, 1)}, 1)
    assert claims.allowed([known, some_page("q", {}, 6)], repeated(held)) == claims.allowed([known], repeated(held)) + 6


@pytest.mark.parametrize("made, holds, status", [
    ([True] * 13, (True, True), 0),
    ([True] * 12 + [False], (True, False), 0),  # a rate below 1: by chance
    ([True] * 13, (False, True), 0),  # not yet repeated
])
def test_chance_does_not_fail_the_check(project, monkeypatch, made, holds, status):
    rates_of(monkeypatch, project, {"Sentence 1.": made})
    assert claims.check(build(project, holds=holds)) == status


def test_more_than_chance_fails_the_check(project, monkeypatch):
    rates_of(monkeypatch, project, {f"Sentence {k}.": [True] * 12 + [False] for k in range(9)})
    pages = build(project, holds=[False] * 9)  # the worst repetition lost all of them: chance
    assert claims.check(pages) == 0
    rates_of(monkeypatch, project, {f"Sentence {k}.": [i != k for i in range(13)] for k in range(9)})
    assert claims.check(pages) == 1


@pytest.mark.parametrize("seed, status", [(4, 0), (5, 1)])
def test_claim_that_always_held_has_a_second_try_with_other_seeds(project, monkeypatch, capsys, seed, status):
    monkeypatch.setattr(claims, "run", run_without_kernel)
    source = f"first_seed: int = {seed}  # of all"
    found = 'from permask_core.display import claim\nclaim("Sentence 0.", first_seed % 2 == 0, f"seed {first_seed}")'
    write_notebook(project / "notebooks" / "chance.ipynb", source, found)
    rates_of(monkeypatch, project, {"Sentence 0.": [True] * 13})
    assert claims.check(build(project, holds=(False,))) == status
    assert ("fails again" if status else "with other seeds it holds") in capsys.readouterr().out
    (again,) = read_claims(project / "build" / "again" / "chance.ipynb")
    assert again["evidence"] == f"seed {seed + claims.OTHER_SEEDS}"
