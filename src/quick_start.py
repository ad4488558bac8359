"""What a process that trains need not import.

Lightning imports torchmetrics, and that imports torchvision, scipy.signal and matplotlib where they are installed, for
metrics and plots that nothing here asks for: 1.0 of 3.9 s of processor time that pass before the first step.
They stay available to whoever imports them; only torchmetrics is told that they are not there. (The rest of Lightning's
imports are torch itself and torch._dynamo, which it wants for an isinstance.)
"""

import sys

UNWANTED = ("torchvision", "scipy", "matplotlib", "transformers")


def import_torchmetrics() -> None:
    """Import torchmetrics without what it does not need; to be called before Lightning is imported."""
    if "torchmetrics" in sys.modules:
        return
    from lightning_utilities.core import imports

    installed, met = imports.package_available, imports.RequirementCache.__bool__
    # no public way to say so; lightning-utilities 0.15, torchmetrics 1.9
    imports.package_available = lambda name: not name.startswith(UNWANTED) and installed(name)
    imports.RequirementCache.__bool__ = lambda it: not str(it.requirement).startswith(UNWANTED) and met(it)
    try:
        import torchmetrics  # noqa: F401
    finally:
        imports.package_available, imports.RequirementCache.__bool__ = installed, met
