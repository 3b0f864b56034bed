"""Few files leave the machine that the GPU suite runs on: it writes elsewhere, and they are copied at every step."""

import io
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sora_fast.files import replacing

ARCHIVE = "logs.tar.gz"
# Of a log its end, which has the error.
_MOST_BYTES = 256 << 10


class Outbox:
    """work: a folder of this machine; logs: a folder in it. out: the one that is brought home, at most 8 files: the
    `files` of `work` that are there, and one archive of all that lies in `logs`."""

    def __init__(self, work: Path, out: Path, files: Sequence[str]) -> None:
        self.work, self.logs, self._out, self._files = work, work / "logs", out, files
        for folder in (self.logs, out):
            folder.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Copy all that is there by now; at any moment each file is the old one or the new one."""
        for name in self._files:
            if (self.work / name).exists():
                with replacing(self._out / name) as partial:
                    shutil.copyfile(self.work / name, partial)
        with replacing(self._out / ARCHIVE) as partial, tarfile.open(partial, "w:gz", compresslevel=6) as archive:
            for name, content in _logs(self.logs):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _logs(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        size = file.stat().st_size
        with file.open("rb") as log:
            log.seek(max(0, size - _MOST_BYTES))
            content = log.read()
        cut = f"({size - _MOST_BYTES} bytes before this are left out)\n".encode() if size > _MOST_BYTES else b""
        yield str(file.relative_to(folder)), cut + content
