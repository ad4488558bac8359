"""Chains of 3x3 convolutions by winograd.cpp (depthlab/fused), a few images at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthlab.fused import cpu, winograd

M = 4  # side of the output tiles: a quarter of the multiplications
BUFFER = 256 << 10  # bytes of a layer's output that the second-level cache has room for, thrice


@dataclass
class Convolution:
    """out = [relu](conv(x) + bias [+ other]) by name."""

    x: str
    w: Tensor  # (K, C, 3, 3)
    bias: Tensor | None
    other: str | None
    relu: bool
    out: str


class Chain:
    """Convolutions one after the other, a few images at a time, so that what lies between them stays in the cache.

    `chain(*inputs)` takes the tensors named by `inputs` and returns those named by `outputs`, (B, K, H, W) float32 in
    channels_last.

    Args:
        layers: in order; each takes what is given or what an earlier one made.
        wanted: names of outputs that are needed afterwards.
    """

    def __init__(self, layers: Sequence[Convolution], wanted: set[str]) -> None:
        self.layers = layers
        made = {layer.out for layer in layers}
        used = [name for layer in layers for name in (layer.x, layer.other) if name is not None]
        self.inputs = list(dict.fromkeys(name for name in used if name not in made))
        self.outputs = [layer.out for layer in layers if layer.out in wanted]
        self.slot = self.slots()

    def slots(self) -> dict[str, int]:
        """Which buffer each inner result lies in; one is used again as soon as nobody needs what it holds."""
        last = {name: i for i, layer in enumerate(self.layers) for name in (layer.x, layer.other)}
        slot: dict[str, int] = {}
        free: list[int] = []
        for i, layer in enumerate(self.layers):
            if layer.out not in self.outputs:
                slot[layer.out] = free.pop() if free else len(set(slot.values()))
            free += [slot[name] for name in {layer.x, layer.other} if name in slot and last[name] == i]
        return slot

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {n: t.contiguous(memory_format=torch.channels_last) for n, t in zip(self.inputs, tensors)}
        B, _, H, W = given[self.layers[0].x].shape
        threads, most = torch.get_num_threads(), max(layer.w.shape[0] for layer in self.layers)
        batch = -(-B // threads)
        if len(self.layers) > 1 and most <= 64:  # more channels: the kernels would leave the cache instead
            batch = min(batch, max(1, BUFFER // (4 * H * W * most)))
        inner = [torch.empty(threads * batch * H * W * most, dtype=torch.float32) for _ in set(self.slot.values())]
        for layer in self.layers:
            if layer.out in self.outputs:
                given[layer.out] = torch.empty(
                    (B, layer.w.shape[0], H, W), dtype=torch.float32, memory_format=torch.channels_last
                )

        def pointer(name: str | None) -> int | None:
            if name is None:
                return None
            return (given[name] if name in given else inner[self.slot[name]]).data_ptr()

        raw = []
        for layer in self.layers:
            pointers = [pointer(name) for name in (layer.x, layer.other, layer.out)]
            shared = [name in given for name in (layer.x, layer.other, layer.out)]
            sizes = (H, W, H, W, *layer.w.shape[1::-1], M, False, False, False, layer.relu)
            raw.append(
                winograd.Layer(*pointers, *cpu.pointers(layer.w, layer.bias), *sizes, tuple(shared), layer.w.stride())
            )
        winograd.run(raw, B, batch)
        return tuple(given[name] for name in self.outputs)
