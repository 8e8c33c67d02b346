"""llama-export as a library, in five names; everything else may change between versions.

    from exporter import Plan, export, open_bundle, plan, validate

    made = plan("path/to/checkpoint", target="onnxruntime", precision="int4", out="bundles")
    (outcome,) = export(made)
    with open_bundle(outcome.folder) as bundle:
        print(bundle.generate("The people of the United States", max_tokens=20))

Names are imported when they are used, so that ``import exporter`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.library import export, open_bundle, validate
    from exporter.planning import plan
    from exporter.spec import Plan

__all__ = ["Plan", "export", "open_bundle", "plan", "validate"]

_HOMES = {"Plan": "exporter.spec", "plan": "exporter.planning"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "exporter.library")), name)
