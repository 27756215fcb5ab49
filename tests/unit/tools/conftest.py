"""The programs in ``tools/`` as modules: most have no ``.py``, and they import each other."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="session")
def load_tool():
    """Return a function that imports ``tools/NAME``."""
    sys.path.insert(0, str(TOOLS))

    def load(name: str) -> ModuleType:
        loader = SourceFileLoader(Path(name).stem, str(TOOLS / name))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[loader.name] = module  # dataclasses look their module up
        loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="session")
def wheelhouse(load_tool):
    return load_tool("wheelhouse")


@pytest.fixture(scope="session")
def metadata_wheel(load_tool):
    return load_tool("vllm_cpu_metadata_wheel.py")


@pytest.fixture(scope="session")
def lock(load_tool):
    return load_tool("lock")


@pytest.fixture(scope="session")
def tiny_gpt_oss(load_tool):
    return load_tool("tiny_gpt_oss.py")
