"""Rotated square windows in a photograph, and by how much two of them overlap, exactly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """An upright rectangle, in the photograph's pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def corners(self) -> list[Point]:
        return [
            (self.left, self.top),
            (self.right, self.top),
            (self.right, self.bottom),
            (self.left, self.bottom),
        ]

    def grown(self, by: float) -> "Box":
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)

    def holds(self, points: Sequence[Point]) -> bool:
        return all(self.left <= x <= self.right and self.top <= y <= self.bottom for x, y in points)


@dataclass(frozen=True)
class Window:
    """A square of `side` pixels around (x, y), turned by `angle` degrees."""

    x: float
    y: float
    side: float
    angle: float

    @property
    def corners(self) -> list[Point]:
        """In the order top left, top right, bottom right, bottom left, before turning."""
        half, turn = self.side / 2, math.radians(self.angle)
        cos, sin = math.cos(turn) * half, math.sin(turn) * half
        return [
            (self.x + dx * cos - dy * sin, self.y + dx * sin + dy * cos)
            for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]

    @property
    def reach(self) -> float:
        """Distance from the centre to a corner."""
        return self.side / math.sqrt(2)


def area(polygon: Sequence[Point]) -> float:
    """Of a simple polygon, by the shoelace formula; positive whichever way round it is given."""
    pairs = zip(polygon, [*polygon[1:], *polygon[:1]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


def intersection(polygon: Sequence[Point], convex: Sequence[Point]) -> list[Point]:
    """What two convex polygons share: `polygon` cut by each edge of `convex` in turn (Sutherland, Hodgman).

    `convex` goes round as `Window.corners` and `Box.corners` do (clockwise on the screen).
    """
    rest = list(polygon)
    for (ax, ay), (bx, by) in zip(convex, [*convex[1:], convex[0]], strict=True):
        inside = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in rest]
        cut: list[Point] = []
        for i, (x, y) in enumerate(rest):
            before, depth = inside[i - 1], inside[i]
            if (before < 0) != (depth < 0):
                part = before / (before - depth)
                (px, py) = rest[i - 1]
                cut.append((px + part * (x - px), py + part * (y - py)))
            if depth >= 0:
                cut.append((x, y))
        rest = cut
    return rest


def touches(window: Window, box: Box) -> bool:
    """Whether they share an area."""
    reached = box.grown(window.reach)
    if not (reached.left < window.x < reached.right and reached.top < window.y < reached.bottom):
        return False
    return area(intersection(window.corners, box.corners)) > 0


def overlap(one: Window, other: Window) -> float:
    """The shared area as a part of the smaller window's."""
    if math.hypot(one.x - other.x, one.y - other.y) >= (one.side + other.side) / math.sqrt(2):
        return 0.0
    shared = intersection(one.corners, other.corners)
    return area(shared) / min(one.side, other.side) ** 2 if len(shared) > 2 else 0.0
