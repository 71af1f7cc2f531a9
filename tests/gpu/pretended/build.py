"""Builds the pretended GPU for the torch that is installed: `python build.py LIBRARY`."""

import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension


def main() -> None:
    (library,) = sys.argv[1:]
    (folder, *_) = cpp_extension.library_paths()
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [*map(str, sorted(Path(__file__).parent.glob("*.cpp"))), "-o", library]
    command += ["-Wl,--no-as-needed", f"-Wl,-rpath,{folder}", f"-L{folder}", "-ltorch_cpu", "-lc10"]
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
