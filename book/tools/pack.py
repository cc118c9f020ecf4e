"""Pack a folder into a zip archive, the same bytes for the same files: ``pack.py FOLDER ARCHIVE``."""

import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo


def pack(folder: Path, archive: Path) -> None:
    """Write every file of `folder` into `archive`, in sorted order and without times of day."""
    with ZipFile(archive, "w") as zipped:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = ZipInfo(f"{archive.stem}/{path.relative_to(folder).as_posix()}")
                zipped.writestr(entry, path.read_bytes(), compress_type=ZIP_DEFLATED)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
