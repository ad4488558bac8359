"""Lightning callbacks, thin: each says *when* a function of `depthlab` is called."""

from callbacks.schedule import CLR, SGD, SGDR, Constant, OneCycle, Schedule, Step

__all__ = ["CLR", "SGD", "SGDR", "Constant", "OneCycle", "Schedule", "Step"]
