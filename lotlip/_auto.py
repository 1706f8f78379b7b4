"""Makes transformers' Auto classes know the model, without importing transformers before somebody else does.

Each of our modules below registers its class at its end. Here it is only seen to that the module is imported as soon as
the Auto class that would look for it is. (What those modules import must not import these Auto classes at its top.)
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
    """Finds the Auto classes' modules as ever, and has ours imported when they have run."""

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
    if _theirs in sys.modules:  # somebody has been quicker
        import_module(_ours)
