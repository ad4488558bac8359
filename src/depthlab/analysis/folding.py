"""A network's evaluation-mode forward pass at any weights, as few operations as the processor allows.

The network is traced once per batch size into tensor operations; its modules and weights are never touched again.
Then each run of  convolution or linear layer -> BatchNorm -> + shortcut -> ReLU  becomes one step:

    BN(w * x + b) = (s w) * x + (b - mean) s + beta,   s = gamma / sqrt(var + eps)

so that BatchNorm costs nothing per image, and sum and ReLU happen while the convolution's result is in a register
(oneDNN's post-operations on CPUs; 3x3 convolutions of stride 1 by winograd.py where it is available). A BatchNorm that
follows no convolution (plain11's, pre-activation networks') stays as it is. Equal to the network's own forward up to
rounding; tests compare them for every architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from depthlab.analysis import evaluating, like
from depthlab.analysis.winograd import Winograd

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
    x: str = ""
    result: str = ""


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
        self.winograd = Winograd.load() if winograd and dtype == torch.float32 else None
        self.programs: dict[torch.Size, Program] = {}
        self.onednn = dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def program(self, state: Mapping[str, Tensor], x: Tensor) -> Program:
        """For batches of this shape; traced where there is none yet."""
        if x.shape not in self.programs:
            with evaluating(self.net):
                x = like(self.net, x)
                graph = make_fx(lambda state, x: torch.func.functional_call(self.net, state, (x,)), pre_dispatch=True)(
                    dict(state), x
                ).graph
            self.programs[x.shape] = fold(graph)
        return self.programs[x.shape]

    def prepare(self, state: Mapping[str, Tensor], x: Tensor) -> dict[str, Any]:
        """Folded weights by the name of a layer's last node, and what other operations need of the state.

        Args:
            state: parameters and buffers by name.
            x: a batch, for its shape.
        """
        program = self.program(state, x)
        values = dict(zip(program.inputs, state.values(), strict=True))
        ready: dict[str, Any] = {"": x.shape}
        for step in program.steps:
            if isinstance(step, Layer):
                ready[step.out] = self.folded(step, values, x.device)
            else:
                for node in step.all_input_nodes:
                    if node.name in values:
                        v = values[node.name]
                        ready[node.name] = v.to(self.dtype) if v.is_floating_point() else v
        return ready

    def folded(self, layer: Layer, values: Mapping[str, Tensor], device: torch.device) -> Any:
        args = layer.node.args
        w = values[args[1].name]
        b = values[args[2].name] if len(args) > 2 and args[2] is not None else None
        if layer.bn is not None:
            gamma, beta, mean, var = (None if node is None else values[node.name] for node in layer.bn[:4])
            s = (var.clamp_min(0) + layer.bn[4]).rsqrt()  # a point between two runs may have var < 0
            s = s if gamma is None else s * gamma
            b = (-mean if b is None else b - mean) * s
            b = b if beta is None else b + beta
            w = w * s.view(-1, *[1] * (w.ndim - 1))
        if layer.scale != 1.0:
            w, b = w * layer.scale, None if b is None else b * layer.scale
        w, b = w.to(self.dtype), None if b is None else b.to(self.dtype)
        if w.ndim == 2:
            return w, b
        if self.winograd is not None and device.type == "cpu" and self.winograd.takes(w, *layer.options()):
            return self.winograd.weight(w), b
        return w.contiguous(memory_format=torch.channels_last), b

    def __call__(self, prepared: Mapping[str, Any], x: Tensor) -> Tensor:
        """Logits (B, K). `x` (B, 3, H, W) in channels_last, of the shape it was prepared for."""
        program = self.programs[x.shape]
        env: dict[str, Any] = {program.x: x.to(self.dtype)}

        def value(node: Any) -> Any:
            return env[node.name] if node.name in env else prepared[node.name]

        for step, dead in zip(program.steps, program.dead):
            if isinstance(step, Layer):
                other = None if step.other is None else value(step.other)
                env[step.out] = self.layer(step, *prepared[step.out], value(step.node.args[0]), other)
            else:
                args, kwargs = (fx.node.map_arg(a, value) for a in (step.args, step.kwargs))
                env[step.name] = step.target(*args, **kwargs)
            for name in dead:
                env.pop(name, None)
        return env[program.result]

    def layer(self, layer: Layer, w: Any, b: Tensor | None, x: Tensor, other: Tensor | None) -> Tensor:
        if layer.node.target is aten.linear.default:
            y = F.linear(x, w, b)
        elif not isinstance(w, Tensor):
            return self.winograd(x, w, b, other, layer.relu)
        else:
            stride, padding, dilation, groups = layer.options()
            if self.onednn and x.device.type == "cpu":
                options = (w, b, padding, stride, dilation, groups)
                relu = "relu" if layer.relu else None
                if other is None:
                    return torch.ops.mkldnn._convolution_pointwise(x, *options, relu or "none", [], "")
                other = other.contiguous(memory_format=torch.channels_last)
                return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *options, "add", 1.0, relu, [], None)
            y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        y = y if other is None else y.add_(other)
        return y.relu_() if layer.relu else y


def fold(graph: fx.Graph) -> Program:
    """Which nodes become one step, and in what order the steps run: each at its last node's place."""
    nodes = list(graph.nodes)
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
    for node in nodes:
        if node in last:
            program.steps.append(last[node])
        elif node.op == "call_function" and node not in taken:
            program.steps.append(node)
        elif node.op == "output":
            program.result = fx.node.map_arg(node.args[0], lambda n: n.name)
            program.result = program.result[0] if isinstance(program.result, (list, tuple)) else program.result
        elif node.op not in ("placeholder", "call_function"):
            raise ValueError(f"cannot follow {node.op} {node.target} of this network")
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
    used.pop(program.result, None)
    dead: list[list[str]] = [[] for _ in program.steps]
    for name, i in used.items():
        dead[i].append(name)
    return dead
