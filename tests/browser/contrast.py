"""How well two colours of a page can be told apart."""

from __future__ import annotations

from typing import Any

_CONTRAST = """([front, back]) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (colour) => {
    const it = document.createElement('i');
    document.body.append(it);
    it.style.color = colour;
    canvas.fillStyle = getComputedStyle(it).color;
    canvas.fillRect(0, 0, 1, 1);
    it.remove();
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = [light(front), light(back)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def contrast(page: Any, front: str, back: str) -> float:
    """WCAG 2.2's contrast ratio, 1 to 21, of two colours written as in the page's CSS."""
    ratio: float = page.evaluate(_CONTRAST, [front, back])
    return ratio
