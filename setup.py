"""What pyproject.toml cannot say: the Triton kernels live in kernels/, installed as sora_fast.kernels, and csrc/ is
compiled where there are compilers for it."""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))
from csrc import build

kernels = ["sora_fast.kernels", *(f"sora_fast.kernels.{name}" for name in find_packages("kernels"))]
# What was built, and why the rest was not; `sora-fast doctor` shows it.
RECORD = Path("sora_fast", "built.txt")


class BuildLibraries(build_ext):
    """Builds each library, or says in one line why it is left out and what that costs."""

    def run(self) -> None:
        self.said: list[str] = []
        super().run()

    def build_extensions(self) -> None:
        super().build_extensions()
        record = Path(self.build_lib, RECORD)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("".join(f"{line}\n" for line in self.said))

    def build_extension(self, extension: Extension) -> None:
        (library,) = (library for library in build.INSTALLED if extension.name == f"sora_fast.{library.name}")
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            said = f"built by {build.build(library, target, Path('build', 'csrc'))}"
        except build.Unavailable as reason:
            if build.is_required(library):
                raise SystemExit(f"{extension.name}: {reason}; but SORA_FAST_REQUIRE_CUDA is set") from reason
            target.unlink(missing_ok=True)
            said = f"not built: {reason}; so {library.cost}"
        self.said.append(f"{library.name}: {said}")
        print(f"sora_fast.{self.said[-1]}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        for library in build.INSTALLED:  # an older one, which may not fit the source any more
            Path(RECORD.parent, f"{library.name}.abi3.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, RECORD), RECORD)


setup(
    packages=find_packages(include=["sora_fast", "sora_fast.*"]) + kernels,
    package_dir={"sora_fast.kernels": "kernels"},
    package_data={"sora_fast.ops": ["*.json"]},
    # Optional: what could not be built is not missed when the others are copied.
    ext_modules=[
        Extension(f"sora_fast.{library.name}", [], optional=True, py_limited_api=True) for library in build.INSTALLED
    ],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
