"""What a process that trains need not import.

Lightning imports torchmetrics, and that imports torchvision, scipy.signal and matplotlib where they are installed, for
metrics and plots that nothing here asks for. In src/, processor time of
`python -c "import lightning.pytorch"`: 3.4 s [3.3-3.5]; 2.4 s [2.3-2.9] with
`import quick_start; quick_start.import_torchmetrics()` before it (medians [range] of 3 in turn; AMD EPYC, Python 3.11,
torch 2.15, lightning 2.6.6).
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
