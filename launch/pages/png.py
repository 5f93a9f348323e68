"""A canvas of pixels that becomes a PNG, with lines, boxes and small letters, by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

Colour = tuple[int, int, int]
# Letters of five columns, a byte a column, its lowest bit the top pixel; from the blank to the tilde.
FONT = bytes.fromhex(
    "0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000 001c224100 0041221c00"
    "14083e0814 08083e0808 0050300000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946 2141454b31"
    "1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0056360000 0814224100 1414141414"
    "0041221408 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090901 3e4149497a"
    "7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f020c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e"
    "7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 3f4038403f 6314081463 0708700807 6151494543 007f414100"
    "0204081020 0041417f00 0402010204 4040404040 0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418"
    "087e090102 0c5252523e 7f08040478 00447d4000 2040443d00 7f10284400 00417f4000 7c04180478 7c08040478 3844444438"
    "7c14141408 081414187c 7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 0c5050503c"
    "4464544c44 0008364100 00007f0000 0041360800 0804081008"
)
ADVANCE, COLUMNS, ROWS = 6, 5, 7


class Canvas:
    """Measures are in units, of `scale` pixels each; a letter is six units wide, and stands on its y."""

    def __init__(self, width: int, height: int, scale: int) -> None:
        self._scale, self._width, self._height = scale, width * scale, height * scale
        self._rows = [bytearray(b"\xff" * (3 * self._width)) for _ in range(self._height)]

    def rect(
        self, x: float, y: float, width: float, height: float, fill: Colour, edge: Colour, hatch: Colour | None
    ) -> None:
        left, right, top, bottom = (round(self._scale * value) for value in (x, x + width, y, y + height))
        self._fill(left, right, top, bottom, edge)
        self._fill(left + 1, right - 1, top + 1, bottom - 1, fill)
        if hatch:
            for row in range(top + 1, bottom - 1):
                period = 6 * self._scale
                for column in range(left + 1 + (-left - 1 - row) % period, right - 1, period):
                    self._fill(column, column + 1, row, row + 1, hatch)

    def path(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        """Through points of which each lies straight above, below or beside the one before."""
        pixels = [(round(self._scale * x), round(self._scale * y)) for x, y in points]
        for (x0, y0), (x1, y1) in pairwise(pixels):
            self._fill(min(x0, x1), max(x0, x1) + 2, min(y0, y1), max(y0, y1) + 2, colour)

    def text(self, x: float, y: float, text: str, colour: Colour, anchor: str) -> None:
        x -= ADVANCE * len(text) * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        left, top = round(self._scale * x), round(self._scale * (y - ROWS))
        for place, letter in enumerate(text):
            glyph = FONT[COLUMNS * (ord(letter) - 32) :][:COLUMNS] if " " <= letter <= "~" else b"\x7f\x41\x41\x41\x7f"
            for column, bits in enumerate(glyph):
                at = left + (ADVANCE * place + column) * self._scale
                for row in range(ROWS):
                    if bits >> row & 1:
                        down = top + row * self._scale
                        self._fill(at, at + self._scale, down, down + self._scale, colour)

    def _fill(self, left: int, right: int, top: int, bottom: int, colour: Colour) -> None:
        left, right = max(left, 0), min(right, self._width)
        for row in self._rows[max(top, 0) : max(bottom, 0)]:
            if right > left:
                row[3 * left : 3 * right] = bytes(colour) * (right - left)

    def encoded(self) -> bytes:
        lines = b"".join(b"\0" + bytes(row) for row in self._rows)
        header = struct.pack(">IIBBBBB", self._width, self._height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
