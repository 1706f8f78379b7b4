"""Registers the model with transformers' Auto classes, without importing transformers.

Each of this package's modules below registers its class when it is imported. An import hook imports the module right
after the module of its Auto class. (The modules' dependencies must not import these Auto classes at the top level.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto."
_REGISTERS = {
    _AUTO + "configuration_auto": "lotlip.models.configuration",
    _AUTO + "modeling_auto": "lotlip.models.lotlip",
    _AUTO + "image_processing_auto": "lotlip.models.image_processing",
    _AUTO + "processing_auto": "lotlip.models.processing",
}


class _AfterImport(MetaPathFinder):
    """Import hook that imports this package's module after the module of an Auto class."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            import_module(_REGISTERS[name])

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterImport())
for _theirs, _ours in _REGISTERS.items():
    if _theirs in sys.modules:  # transformers is already imported
        import_module(_ours)
