"""A compiled kernel as Triton keeps it."""

import json
from pathlib import Path


def keep(folder: Path, arch: int) -> None:
    """In a folder of its own, for a GPU of compute capability `arch` / 10."""
    folder.mkdir(parents=True)
    files = {f"k.{stage}": f"the {stage}" for stage in ("ttir", "ptx", "cubin")}
    files["k.json"] = json.dumps({"target": {"backend": "cuda", "arch": arch}})
    for name, content in files.items():
        (folder / name).write_text(content)
    paths = {name: str(folder / name) for name in files}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
