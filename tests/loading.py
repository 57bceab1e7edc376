"""The programs of `examples/` and `benchmarks/`, which are no packages, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, folder: str = 'examples') -> ModuleType:
    """Run a program's file, but for its `main`, and return it as the module of that name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f'{name}.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
