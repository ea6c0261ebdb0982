"""What makers say of their chips."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU."""

    cores: int
    """Cores of one device, which share out the programs of a kernel that may run in any order."""
    memory: float
    """Bytes."""
    flops: float
    """Operations a second of bfloat16 products."""
    bandwidth: float
    """Bytes a second from and to its memory."""
    links: float
    """Bytes a second to other chips, all links together."""
    clock: float
    """Cycles a second, from its operations and those of its matrix units a cycle."""
    largest: tuple[int, ...]
    """Shape of the largest slice."""


CHIPS = {
    "v4": Chip(2, 32 * 2**30, 275e12, 1228e9, 300e9, 1.05e9, (16, 16, 16)),
    "v5e": Chip(1, 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9, (16, 16)),
    "v5p": Chip(2, 95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9, (16, 16, 24)),
    "v6e": Chip(1, 32 * 2**30, 918e12, 1640e9, 448e9, 1.75e9, (16, 16)),
}
"""TPUs, by the names of topologies. Source: cloud.google.com/tpu/docs/system-architecture-tpu-vm."""
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
_GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # of the SXM boards, without sparsity; source: NVIDIA's data sheets


def peak_flops(kind: str) -> float | None:
    """Operations a second of a device's bfloat16 products; None where they are not known.

    Args:
        kind: the device's `device_kind`.

    >>> peak_flops("TPU v5 lite"), peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("cpu")
    (197000000000000.0, 989000000000000.0, None)
    """
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]].flops
    return next((flops for name, flops in _GPUS.items() if name in kind), None)
