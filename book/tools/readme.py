"""Bring the README's pictures and tables up to date: `make readme`.

The notebooks wrote the pictures and results to build/source/book/results. They are copied to book/readme, so that the
README shows the results of a build, with the numbers of every run, the versions and the commit in the same folder.
Times are those of benchmarks/fan_in_cpu.py and whole_networks.py. No number in the README's tables is typed by hand.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from permask_core.data.measured import measured_fan_in_speed, measured_whole_networks

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "book" / "readme"
SECTIONS = {"images": "fashion_mnist", "results": "permuted_masks", "findings": "findings"}  # of the README
SPARSITY, BATCHES = 0.9, (1, 8, 64, 256, 2048)
NETWORKS = {("gpt2", "blocks and output"): "GPT-2", ("bert", "blocks"): "BERT", ("vit_b_16", "blocks"): "ViT-B/16",
            ("resnet50", "1x1 and 3x3"): "ResNet50", ("mobilenet_v2", "1x1"): "MobileNetV2"}
WAYS = {"fan-in": "fan-in", "shared by 8": "shared by 8", "torch CSR": "torch CSR",
        "dense, compiled": "`torch.compile`", "dense, channels last": "channels last"}
PEERS = (("forward", "dense"), ("forward", "torch CSR"), ("forward", "shared by 8"), ("both", "dense"))


def with_table(readme: str, mark: str, table: str) -> str:
    """Return the text of the README with `table` between the two comments of the name `mark`.

    Raises
    ------
    ValueError
        If there are no such comments.
    """
    section = re.compile(rf"(<!-- {mark}:[^>]*-->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not section.search(readme):
        raise ValueError(f"README.md has no section between <!-- {mark}: ... --> and <!-- /{mark} -->")
    return section.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", readme)


def speed_table(records: dict) -> str:
    """Return a table of the times of other layers divided by that of the fan-in layer, by processor, from
    benchmarks/fan_in_cpu.py."""
    heads = ["processor", "in x out", "pass", "peer", *(f"batch {batch}" for batch in BATCHES)]
    lines, captions = [heads, ["---:"] * len(heads)], []
    for processor, record in records.items():
        rows = {(row["inputs"], row["outputs"], row["way"], row["batch"]): row["ratios"]
                for row in record["rows"] if row["sparsity"] == SPARSITY}
        for inputs, outputs in dict.fromkeys(place[:2] for place in rows):
            for way, peer in PEERS:
                found = [rows[inputs, outputs, way, batch][peer] for batch in BATCHES]
                lines.append([processor, f"{inputs} x {outputs}", way, peer, *(f"{ratio:.1f}" for ratio in found)])
        captions.append(f"{processor}: {record['threads']} threads, {record['device']}, `{record['command']}`, commit "
                        f"{record['commit']}, torch {record['versions']['torch']}.")
    caption = (f"Time of the other layer divided by that of `FanInLinear` at {100 * SPARSITY:.0f} % sparsity, medians, "
               "float32. *Both*: forward and backward. *Shared by 8*: a fan-in layer in which eight neighbouring "
               f"neurons have the same connections. {' '.join(captions)}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def networks_table(records: dict) -> str:
    """Return a table of how many times as fast as dense whole networks are, by processor, from
    benchmarks/whole_networks.py, for one thread and the most layers replaced."""
    heads = ["processor", "network", "replaced", "step", "batch", "bound", *WAYS.values()]
    lines, captions = [heads, ["---:"] * len(heads)], []
    for processor, record in records.items():
        for place, name in NETWORKS.items():
            for row in record["rows"]:
                if (row["network"], row["replaced"]) == place and row["threads"] == 1:
                    ratios = [f"{row['ratios'][way]:.1f}" if way in row["ratios"] else "" for way in WAYS]
                    lines.append([processor, name, row["replaced"], row["step"], str(row["batch"]),
                                  f"{row['bound']:.1f}", *ratios])
        captions.append(f"{processor}: {record['device']}, `python benchmarks/whole_networks.py`, commits "
                        f"{record['commit']}, torch {record['versions']['torch']}.")
    caption = ("Time of the dense network divided by that of others, 90 % sparsity in the replaced layers, one thread, "
               "medians, float32. *Bound*: what would be gained if the replaced layers took no time. "
               f"`torch.compile` and *channels last* are dense networks. {' '.join(captions)}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"


def main() -> None:
    """Copy the results and rewrite the tables of the README."""
    built = ROOT / "build" / "source" / "book" / "results"
    if not (built / "permuted_masks.md").exists():
        sys.exit(f"{built} has no results: run make first")
    KEPT.mkdir(exist_ok=True)
    for name in SECTIONS.values():
        for kind in ("svg", "md"):
            shutil.copy(built / f"{name}.{kind}", KEPT)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = json.loads((built / "permuted_masks.json").read_text(encoding="utf8"))
    record = {"command": "make readme", "commit": commit or "unknown", **record}
    (KEPT / "permuted_masks.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    for mark, name in SECTIONS.items():
        text = with_table(text, mark, (KEPT / f"{name}.md").read_text("utf8"))
    text = with_table(text, "speed", speed_table(measured_fan_in_speed()))
    readme.write_text(with_table(text, "networks", networks_table(measured_whole_networks())), encoding="utf8")


if __name__ == "__main__":
    main()
