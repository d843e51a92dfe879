"""Colour profiles made from numbers: ICC.1:2001-04, of display (a matrix) and printer (a table)."""

from __future__ import annotations

import struct

import numpy as np

#: What the primaries of Display P3 are as XYZ under D50 (columns), as Apple's profile has them.
P3 = np.array(
    [
        [0.515102, 0.291965, 0.157153],
        [0.241182, 0.692236, 0.066582],
        [-0.001050, 0.041882, 0.784378],
    ]
)
_WHITE = (0.9642, 1.0, 0.8249)


def display_profile(columns: np.ndarray = P3, gamma: float = 2.2) -> bytes:
    """A profile of RGB."""
    tags = {f"{name}XYZ".encode(): _xyz(columns[:, i]) for i, name in enumerate("rgb")} | {
        f"{name}TRC".encode(): _curve(gamma) for name in "rgb"
    }
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {b"wtpt": _xyz(_WHITE)})


def grey_profile(gamma: float) -> bytes:
    """A profile of grey."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma), b"wtpt": _xyz(_WHITE)})


def printer_profile(lab: np.ndarray) -> bytes:
    """A profile of CMYK.

    Args:
        lab: [2, 2, 2, 2, 3] L* a* b* of no and full ink of cyan, magenta, yellow, black.
    """
    identity = np.tile(np.arange(256, dtype=np.uint8), 4).tobytes()
    table = np.round(lab * (2.55, 1, 1) + (0, 128, 128)).astype(np.uint8).tobytes()
    matrix = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel())
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + identity + table + identity[: 3 * 256]
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut, b"wtpt": _xyz(_WHITE)})


def _xyz(values: object) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))  # type: ignore[attr-defined]


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    at, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        entries += name + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    whole = struct.pack(">I", len(tags)) + entries + body
    white = _xyz(_WHITE)[8:]
    head = struct.pack(">I", 128 + len(whole)) + b"lcms\x02\x40\0\0" + kind + space + connection
    head += bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + whole
