"""Whether torch.compile can work on this machine's CPU: Inductor writes C++ and needs a compiler that takes it."""

import subprocess
import sysconfig

# What Inductor's code includes, and what an incomplete installation lacks.
_PROGRAM = b"#include <cmath>\n#include <Python.h>\n"


def cpp_problem() -> str | None:
    """Why Inductor cannot compile for a CPU; None if it can. Quick: two headers are read, nothing is built."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        return str(error)
    command = [compiler, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    done = subprocess.run(command, input=_PROGRAM, capture_output=True, check=False)
    if done.returncode:
        errors = done.stderr.decode(errors="replace").splitlines()
        return f"{compiler} fails: {next((line for line in errors if 'error' in line), f'code {done.returncode}')}"
    return None
