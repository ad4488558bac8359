"""A network's evaluation-mode forward pass at any weights, as few operations as the processor allows.

The network is traced once per batch size into tensor operations; its modules and weights are never touched again.
Then each run of  convolution or linear layer -> BatchNorm -> + shortcut -> ReLU  becomes one step:

    BN(w * x + b) = (s w) * x + (b - mean) s + beta,   s = gamma / sqrt(var + eps)

so that BatchNorm costs nothing per image, and sum and ReLU happen while the convolution's result is in a register
(oneDNN's post-operations on CPUs; 3x3 convolutions of stride 1 by winograd.py where it is available). A BatchNorm that
follows no convolution (plain11's, pre-activation networks') stays as it is. Equal to the network's own forward up to
rounding; tests compare them for every architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from depthlab.analysis import evaluating, like
from depthlab.analysis.winograd import Chain, Convolution
from depthlab.fused import winograd as kernels
from depthlab.fused.conv_bn import folded

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.linear.default)
RELU = (aten.relu.default, aten.relu_.default)
ADD = (aten.add.Tensor, aten.add_.Tensor)


@dataclass
class Layer:
    """A convolution or linear layer with what is folded into it. Names are those of the traced graph's nodes."""

    node: fx.Node
    out: str  # the last node folded in
    bn: tuple[Any, ...] | None = None  # gamma, beta, mean, var nodes and eps
    scale: float = 1.0  # of the branch in x + h F(x)
    other: fx.Node | None = None  # what is added
    relu: bool = False

    def options(self) -> tuple[Any, ...]:
        """stride, padding, dilation, groups."""
        rest = list(self.node.args[3:])
        default = [[1, 1], [0, 0], [1, 1], 1]
        return (*rest, *default[len(rest) :])


@dataclass
class Program:
    steps: list[Layer | fx.Node] = field(default_factory=list)
    dead: list[list[str]] = field(default_factory=list)  # by step: what nobody needs afterwards
    inputs: list[str] = field(default_factory=list)  # placeholders of the state, in order
    constants: dict[str, Tensor] = field(default_factory=dict)
    x: str = ""
    result: str = ""


class Step(NamedTuple):
    """A step at one point: env[outputs] = run(*env[inputs])."""

    run: Callable[..., Any]
    inputs: list[str]
    outputs: list[str]  # of several, run gives a tuple
    dead: list[str]


class Folded:
    """The forward pass of `net` as a function of (state, x).

        forward = Folded(net)
        prepared = forward.prepare(state, example)   # per point
        logits = forward(prepared, x)                # per batch

    Args:
        net: any module that maps one tensor to one tensor and whose evaluation mode has no control flow on values.
        dtype: of the arithmetic, float32, bfloat16 or float64.
        winograd: whether 3x3 convolutions may go that way, which changes rounding and nothing else.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float32, winograd: bool = True) -> None:
        self.net, self.dtype = net, dtype
        self.winograd = winograd and dtype == torch.float32 and kernels.library() is not None
        self.programs: dict[torch.Size, Program] = {}
        self.onednn = dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def program(self, state: Mapping[str, Tensor], x: Tensor) -> Program:
        """For batches of this shape; traced where there is none yet."""
        if x.shape not in self.programs:
            with evaluating(self.net):
                trace = make_fx(lambda state, x: torch.func.functional_call(self.net, state, (x,)), pre_dispatch=True)
                self.programs[x.shape] = fold(trace(dict(state), like(self.net, x)))
        return self.programs[x.shape]

    def prepare(self, state: Mapping[str, Tensor], x: Tensor) -> list[Step]:
        """The steps at these weights.

        Args:
            state: parameters and buffers by name, in the order of the network's state_dict.
            x: a batch, for its shape.
        """
        program = self.program(state, x)
        values = program.constants | dict(zip(program.inputs, state.values(), strict=True))
        steps: list[Step] = []
        chain: list[Convolution] = []
        gone: list[str] = []

        def close() -> None:
            if chain:
                inside = {layer.out for layer in chain}
                linked = Chain(list(chain), inside - set(gone))
                dead = [name for name in gone if name not in inside]
                steps.append(Step(linked, linked.inputs, linked.outputs, dead))
                chain.clear()
                gone.clear()

        on_cpu = x.device.type == "cpu"
        for step, dead in zip(program.steps, program.dead):
            if not isinstance(step, Layer):
                close()
                names = [node.name for node in step.all_input_nodes if node.name not in values]
                steps.append(Step(self.operation(step, names, values), names, [step.name], dead))
                continue
            w, b = self.folded(step, values)
            names = [node.name for node in (step.node.args[0], step.other) if node is not None]
            fits = w.ndim == 4 and step.options()[0] == [1, 1] and kernels.fits(w, *step.options())
            if self.winograd and on_cpu and fits:
                other = None if step.other is None else step.other.name
                chain.append(Convolution(names[0], w, b, other, step.relu, step.out))
                gone += dead
            else:
                close()
                steps.append(Step(self.layer(step, w, b, on_cpu), names, [step.out], dead))
        close()
        return steps

    def __call__(self, prepared: list[Step], x: Tensor) -> Tensor:
        """Logits (B, K). `x` (B, 3, H, W) in channels_last, of the shape it was prepared for."""
        program = self.programs[x.shape]
        env = {program.x: x.to(self.dtype)}
        for run, inputs, outputs, dead in prepared:
            made = run(*[env[name] for name in inputs])
            env.update(zip(outputs, made if isinstance(made, tuple) else (made,)))
            for name in dead:
                del env[name]
        return env[program.result]

    def folded(self, layer: Layer, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with BatchNorm and h in them."""
        args = layer.node.args
        w = values[args[1].name]
        b = values[args[2].name] if len(args) > 2 and args[2] is not None else None
        if layer.bn is not None:
            w, b = folded(w, b, *(None if node is None else values[node.name] for node in layer.bn[:4]), layer.bn[4])
        if layer.scale != 1.0:
            w, b = w * layer.scale, None if b is None else b * layer.scale
        return w.to(self.dtype), None if b is None else b.to(self.dtype)

    def layer(self, layer: Layer, w: Tensor, b: Tensor | None, on_cpu: bool) -> Callable[..., Tensor]:
        """The cheapest function of (x[, other]) there is."""

        def finish(y: Tensor, other: Tensor | None) -> Tensor:
            y = y if other is None else y.add_(other)
            return y.relu_() if layer.relu else y

        if w.ndim == 2:
            return lambda x, other=None: finish(F.linear(x, w, b), other)
        stride, padding, dilation, groups = layer.options()
        w = w.contiguous(memory_format=torch.channels_last)
        if not (self.onednn and on_cpu):
            return lambda x, other=None: finish(F.conv2d(x, w, b, stride, padding, dilation, groups), other)
        options, relu = (w, b, padding, stride, dilation, groups), "relu" if layer.relu else None
        if layer.other is None:
            return lambda x: torch.ops.mkldnn._convolution_pointwise.default(x, *options, relu or "none", [], "")
        add = torch.ops.mkldnn._convolution_pointwise.binary
        return lambda x, other: add(
            x, other.contiguous(memory_format=torch.channels_last), *options, "add", 1.0, relu, [], None
        )

    def operation(self, node: fx.Node, names: list[str], values: Mapping[str, Tensor]) -> Callable[..., Any]:
        """Any other node, as it was traced."""
        fixed = {n.name: values[n.name] for n in node.all_input_nodes if n.name in values}
        fixed = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in fixed.items()}

        def run(*inputs: Any) -> Any:
            there = fixed | dict(zip(names, inputs))
            args, kwargs = (fx.node.map_arg(a, lambda n: there[n.name]) for a in (node.args, node.kwargs))
            return node.target(*args, **kwargs)

        return run


def fold(module: fx.GraphModule) -> Program:
    """Which nodes become one step, and in what order the steps run: each at its last node's place."""
    nodes = list(module.graph.nodes)
    *state, x = [node for node in nodes if node.op == "placeholder"]
    taken: dict[fx.Node, Layer] = {}  # by any node folded in
    last: dict[fx.Node, Layer] = {}
    for node in nodes:
        if node.target not in LAYERS or node.args[1] not in state:
            continue
        layer, here = Layer(node, node.name), node
        members = [node]
        while (nxt := follower(here, layer, taken)) is not None:
            members.append(nxt)
            here = nxt
        layer.out = here.name
        taken |= dict.fromkeys(members, layer)
        last[here] = layer
    program = Program(inputs=[node.name for node in state], x=x.name)
    program.constants = {node.name: getattr(module, node.target) for node in nodes if node.op == "get_attr"}
    for node in nodes:
        if node in last:
            program.steps.append(last[node])
        elif node.op == "call_function" and node not in taken:
            program.steps.append(node)
        elif node.op == "output":
            program.result = fx.node.map_arg(node.args[0], lambda n: n.name)
            program.result = program.result[0] if isinstance(program.result, (list, tuple)) else program.result
    program.dead = last_uses(program)
    return program


def follower(node: fx.Node, layer: Layer, taken: Mapping[fx.Node, Layer]) -> fx.Node | None:
    """The next node if it can be folded into `layer`, which then has it; None where the run ends."""
    if len(node.users) != 1 or layer.relu:
        return None
    (nxt,) = node.users
    if nxt in taken:  # both branches of a sum come from layers, and the other one has it
        return None
    is_input = bool(nxt.args) and nxt.args[0] is node
    if nxt.target is aten.batch_norm.default and is_input and layer.bn is None and layer.other is None:
        gamma, beta, mean, var, training, _, eps, *_ = nxt.args[1:]
        if training or mean is None or layer.scale != 1.0:
            return None
        layer.bn = (gamma, beta, mean, var, eps)
        return nxt
    if nxt.target in RELU and is_input:
        layer.relu = True
        return nxt
    if nxt.target in ADD and layer.other is None and layer.node.target is aten.conv2d.default:
        first, second = nxt.args[:2]
        other = second if first is node else first
        alpha = nxt.kwargs.get("alpha", 1)
        if not isinstance(other, fx.Node) or other is node or (first is node and alpha != 1):
            return None
        if same_shape(other, node):
            layer.other, layer.scale = other, float(alpha)
            return nxt
    return None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [getattr(node.meta.get("val"), "shape", None) for node in (a, b)]
    return shapes[0] is not None and shapes[0] == shapes[1]


def last_uses(program: Program) -> list[list[str]]:
    used: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        nodes = step.all_input_nodes if isinstance(step, fx.Node) else [step.node.args[0], step.other]
        for node in nodes:
            if node is not None:
                used[node.name] = i
    for name in (program.result, *program.inputs, *program.constants):
        used.pop(name, None)
    dead: list[list[str]] = [[] for _ in program.steps]
    for name, i in used.items():
        dead[i].append(name)
    return dead
