"""Images of Trifeature drawn per second, compared with decoding JPEG files of the same size with PIL.

Both run in one process, in turns; medians are printed. Drawing uses torch's threads, decoding one thread, as in
practice: a data set is drawn by one process, and files are read by workers. Raw times are written to
benchmarks/results/trifeature.json. Run it with `python benchmarks/trifeature.py --threads 2`; it takes a few seconds.
"""

import argparse
import io
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _machine import at_least, timed, written
from PIL import Image

from permask_core.data.trifeature import attributes, draw
from permask_core.runs.store import commit, device_name, versions

RESULT = Path(__file__).parent / "results" / "trifeature.json"


def jpeg(image):
    written = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(written, "JPEG", quality=95)
    return written.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--sizes", type=at_least(16), nargs="+", default=[16, 32, 64, 224])
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    rows = []
    for size in given.sizes:
        n = max(100, 2_000_000 // size ** 2)
        kinds, index = attributes(n), torch.arange(n)
        files = [jpeg(image) for image in draw(*kinds, index, 0, size)]
        ways = {"drawn": lambda kinds=kinds, index=index, size=size: draw(*kinds, index, 0, size),
                "decoded": lambda files=files: [np.asarray(Image.open(io.BytesIO(file))) for file in files]}
        seconds = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way, "cpu")[0])
        speed = {name: n / median(found) for name, found in seconds.items()}
        rows.append({"image_size": size, "images": n, "seconds": seconds, "images_per_second": speed})
        print(f"{size:3d} px: {speed['drawn']:8,.0f} drawn a second, {speed['decoded']:8,.0f} decoded, "
              f"ratio {speed['drawn'] / speed['decoded']:.2f}")
    record = {"command": f"python benchmarks/trifeature.py --threads {given.threads}", "commit": commit(),
              "versions": versions(), "device": device_name("cpu"), "threads": given.threads, "rows": rows}
    written(given.result, record)


if __name__ == "__main__":
    main()
