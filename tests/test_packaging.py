"""The package as a user gets it: a light import, a complete wheel, and both ways to install it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("sora_fast", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "SORA_FAST_SKIP_CUDA": "1"}  # nvcc would take half a minute
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is shipped: building in place would leave its traces in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "built.txt"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The python of an empty virtual environment that borrows the installed packages, sora_fast excepted."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # Its path is searched, but .pth files found there, such as an editable install's, are not read.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_import_is_light(tmp_path: Path) -> None:
    report = _run(
        sys.executable,
        "-c",
        textwrap.dedent("""
            import time, sys, torch
            start = time.process_time()
            import sora_fast
            print(time.process_time() - start)
            print(*({"transformers", "av", "sklearn", "matplotlib", "diffusers"} & set(sys.modules)))
        """),
        cwd=ROOT,
    ).splitlines()
    seconds, heavy = float(report[0]), report[1]
    assert not heavy, f"importing sora_fast also imports {heavy}"
    assert seconds < 2, f"importing sora_fast takes {seconds:.1f} s beyond torch"


def test_what_is_imported_is_declared_and_what_must_be_installed_is_imported() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        "pillow": "PIL",
        "pillow-heif": "pillow_heif",
        "scikit-learn": "sklearn",
        "flash-attn": "flash_attn",
        "nvidia-ml-py": "pynvml",
    }  # modules that are not called like their packages

    def modules(requirements: list[str]) -> set[str]:
        packages = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
        return {names.get(package, package) for package in packages}

    needed = modules(project["dependencies"])
    chosen = ("text", "diffusers", "video", "demo", "log", "flash-attn", "xformers")
    extras = modules([item for extra in chosen for item in project["optional-dependencies"][extra]])
    imported = set()
    for folder in ("sora_fast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported.add(node.module.split(".")[0])
    assert needed <= imported
    assert imported - sys.stdlib_module_names - {"sora_fast"} <= needed | extras


@pytest.mark.slow
def test_wheel_is_complete(source: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    _run(*command, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        entry_points = archive.read("sora_fast-0.1.0.dist-info/entry_points.txt").decode()
    wanted = {f"sora_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "sora_fast").rglob("*.py")}
    assert wanted - shipped == set()
    assert {name.split("/")[0] for name in shipped} == {"sora_fast", "sora_fast-0.1.0.dist-info"}
    assert "-cp310-abi3-" in wheel.name, "one wheel serves every later Python"
    assert {"sora_fast/built.txt"} | ({"sora_fast/_cpu.abi3.so"} if shutil.which("g++") else set()) <= shipped
    assert "sora-fast = sora_fast.cli:main" in entry_points


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_both_installs_bring_the_kernels(source: Path, environment: Path, tmp_path: Path, editable: bool) -> None:
    command = (sys.executable, "-m", "pip", "--python", environment, "install", "--no-build-isolation")
    mode = ("--editable",) if editable else ()
    _run(*command, "--no-deps", "--no-index", *mode, source, cwd=tmp_path)
    script = (
        "import sora_fast as a, sora_fast.kernels._launch as b, sora_fast.ops._library as c; print(a.__file__); "
        "print(b.__file__); print(c.missing('cpu') or '')"
    )
    package, kernels, missing = _run(environment, "-c", script, cwd=tmp_path).splitlines()
    package, kernels = Path(package), Path(kernels)
    assert bool(missing) == (shutil.which("g++") is None), missing
    if editable:
        assert package.parent == source / "sora_fast"
        assert kernels.parent == source / "kernels"
    else:
        assert package.is_relative_to(tmp_path / "venv")
        assert kernels.parent == package.parent / "kernels"
