"""Lightning callbacks, thin: each says *when* a function of `depthlab` is called."""

from callbacks.grow_depth import GrowDepth
from callbacks.schedule import CLR, SGD, SGDR, Constant, MultilevelCosine, OneCycle, Schedule, Step

__all__ = ["CLR", "SGD", "SGDR", "Constant", "GrowDepth", "MultilevelCosine", "OneCycle", "Schedule", "Step"]
