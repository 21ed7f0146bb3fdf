"""A human chest as formulas: where everything lies in any axial plane, and where exactly the lungs end.

Everything is a signed distance in mm, negative inside. The reference chest stands in LPS mm (x to the patient's
left, y to the back, z to the head) with the carina at z = 0; a body is that chest scaled, bent a little and varied.
The wall (pleura, ribs, shoulder blades, muscle, skin) is star-shaped about the middle: a radius over the angle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Point = tuple[float, float, float]
Chain = tuple[tuple[float, float, float, float], ...]  # x, y, z, radius of each joint of a tube
Ellipsoid = tuple[Point, Point, float]  # centre, half-axes, degrees about z

ANGLES = 1440
ALPHA = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)  # 0 at the spine, positive to the left
TURN = np.abs(ALPHA) / np.pi  # 0 at the spine, 1 at the sternum
TALL_MM = 1e4  # an ellipsoid so tall is a cylinder
LUNG_SPAN_MM = (-85.0, 80.0)  # heights of the reference chest between which every plane shows plenty of lung

# heights, and what the reference chest measures there
LEVELS = (-140.0, -100.0, -60.0, -20.0, 20.0, 50.0, 75.0, 95.0, 112.0)
PLEURA_SIDE = (134.0, 136.0, 134.0, 129.0, 119.0, 105.0, 88.0, 67.0, 30.0)
PLEURA_FRONT = (66.0, 78.0, 84.0, 85.0, 80.0, 71.0, 59.0, 42.0, 14.0)
PLEURA_BACK = (84.0, 84.0, 83.0, 81.0, 77.0, 71.0, 63.0, 54.0, 40.0)
SPINE_Y = (38.0, 39.0, 38.0, 34.0, 28.0, 22.0, 15.0, 10.0, 6.0)
CORE_Y = (14.0, 10.0, 4.0, -8.0, -12.0, -12.0, -8.0, -4.0, 0.0)  # what fills the mediastinum between the organs
CORE_WIDTH = (22.0, 22.0, 24.0, 27.0, 26.0, 28.0, 32.0, 36.0, 40.0)
CORE_DEPTH = (22.0, 24.0, 30.0, 36.0, 38.0, 38.0, 38.0, 38.0, 38.0)
STERNUM_WIDTH = (5.0, 7.0, 16.0, 17.0, 16.0, 22.0, 28.0, 26.0, 5.0)
# shares of the way from spine to sternum, and how thick the wall is there
TURNS = (0.0, 0.05, 0.12, 0.22, 0.35, 0.5, 0.63, 0.75, 0.88, 1.0)
MUSCLE_LOW = (11.0, 18.0, 27.0, 21.0, 13.0, 12.0, 9.0, 7.0, 6.0, 3.0)
MUSCLE_HIGH = (20.0, 27.0, 33.0, 38.0, 50.0, 58.0, 42.0, 24.0, 12.0, 4.0)  # shoulder girdle, arms raised
FAT_SHARE = (1.1, 1.2, 1.2, 1.1, 1.0, 1.0, 0.95, 0.9, 0.75, 0.6)
# ribs 1 to 12: the height of each on its way round, and the turn at which it ends
VERTEBRA_MM = 23.5
RIB_WAY = np.clip(TURN / 0.82, 0, 1)
RIB_DROP = np.interp(np.arange(12), (0, 5, 11), (34.0, 92.0, 84.0))
RIB_Z = 108.0 - VERTEBRA_MM * np.arange(12)[:, None] - RIB_DROP[:, None] * (RIB_WAY**2 * (3 - 2 * RIB_WAY))
RIB_END = np.array([0.95] * 7 + [0.86, 0.84, 0.8, 0.55, 0.4])

# great vessels and airways; a vessel's share of the contrast agent stands beside it
AORTA: Chain = (
    (-4, -20, -36, 13), (-16, -28, -5, 15), (-14, -28, 18, 15), (-4, -20, 32, 14), (12, 0, 36, 13),
    (22, 18, 30, 13), (25, 24, 14, 12.5), (25, 25, -20, 12), (22, 22, -70, 11.5), (14, 18, -140, 11),
)  # fmt: skip
VESSELS: tuple[tuple[Chain, float], ...] = (
    (AORTA, 1.0),
    (((-27, -28, 70, 7), (-30, -24, 40, 9), (-32, -18, 0, 9.5), (-30, -18, -34, 10)), 0.95),  # upper caval vein
    (((22, -51, 82, 6), (10, -44, 50, 7), (-26, -28, 42, 8)), 0.7),  # left brachiocephalic vein
    (((-22, -4, -92, 12), (-26, 0, -140, 13)), 0.4),  # lower caval vein
    (((18, -46, -34, 13), (19, -40, -12, 13.5), (17, -24, -6, 12)), 1.0),  # pulmonary trunk, right, left
    (((15, -22, -9, 11), (-14, -6, -13, 10), (-40, 0, -16, 8)), 1.0),
    (((18, -24, -5, 11), (34, -4, -2, 10), (42, 8, -10, 8)), 1.0),
    (((-12, -16, 36, 7), (-20, -16, 70, 6), (-34, -12, 110, 5)), 1.0),  # branches of the arch
    (((6, -8, 40, 5), (12, -8, 80, 4), (16, -10, 110, 4)), 1.0),
    (((20, 4, 38, 6), (24, 2, 75, 5), (40, 0, 108, 5)), 1.0),
    (((4, -10, 112, 5), (4, -3, 75, 5), (4, 8, 30, 5.5), (5, 14, -20, 7), (10, 12, -110, 7.5)), 0.1),  # oesophagus
)
AIRWAYS: tuple[Chain, ...] = (
    ((0, -22, 125, 9), (0, -13, 75, 9), (-1, -1, 8, 9.5)),
    ((-3, -1, 3, 8), (-18, 3, -12, 7), (-41, 8, -26, 5)),
    ((3, -1, 3, 7.5), (22, 5, -18, 6.5), (42, 13, -30, 4.5)),
)
CLAVICLE: Chain = ((18, -63, 74, 8), (60, -62, 86, 6), (112, -30, 98, 6))
HEART: Ellipsoid = ((16, -29, -58), (62, 43, 48), -35)
CHAMBERS: tuple[tuple[Ellipsoid, float], ...] = (
    (((31, -21, -64), (31, 17, 25), -38), 0.9),  # left ventricle
    (((15, -50, -62), (34, 13, 27), -28), 0.8),  # right ventricle
    (((-25, -27, -54), (15, 20, 26), -20), 0.8),  # right atrium
    (((2, 0, -42), (30, 14, 18), 5), 0.95),  # left atrium
)
HILA: tuple[Ellipsoid, ...] = (((-40, 3, -20), (12, 15, 22), 0), ((40, 7, -16), (10, 15, 20), 0))
LIVER_LEFT: Ellipsoid = ((-5, -38, -128), (75, 40, 44), 0)
SPLEEN: Ellipsoid = ((92, 30, -122), (34, 40, 52), 25)
STOMACH: Ellipsoid = ((58, -16, -126), (40, 46, 54), 0)


@dataclass(frozen=True, slots=True)
class Nodule:
    """A ball whose surface is moved in and out by its lobulation and spiculation (shares of the radius)."""

    centre_mm: Point
    diameter_mm: float
    kind: str
    malignant: bool
    lobulation: float
    spiculation: float
    phase: float


@dataclass(frozen=True, slots=True)
class Body:
    """One person, in mm of the body: LPS, carina near 0, not yet laid into a scanner.

    Attributes:
        scale: mm of this body per mm of the reference chest along x, y, z.
        waves: float32[n, 5]; per mm along x, per mm along y, phase, mm to the left, mm to the back: bends the chest.
        dome_mm: tops of the right and the left diaphragm in the reference chest.
        muscle, heart, aorta, bone: factors; the last one on the HU of marrow.
        gravity_hu: lung at the back above lung at the front; atelectasis_hu: more of it along the back wall.
        vessels, bronchi: float32[n, 7]; short tubes inside the lungs: both ends in mm, and the radius.
    """

    female: bool
    age: int
    scale: Point
    waves: Field
    dome_mm: tuple[float, float]
    fat_mm: float
    muscle: float
    heart: float
    aorta: float
    bone: float
    lung_hu: float
    gravity_hu: float
    atelectasis_hu: float
    emphysema_hu: float
    vessels: Field
    bronchi: Field
    nodules: tuple[Nodule, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """The pixels that all planes of one body share, float32[rows, columns].

    Attributes:
        body_x, body_y: mm of the body; x, y: where that lies in the reference chest.
        radius, angle: x and y in polar form; `angle` indexes ALPHA.
        dome_mm, dome_slope: height of the diaphragm over each pixel in the reference chest, and its steepness.
        middle: rows and columns that hold the mediastinum.
    """

    pixel_mm: float
    body_x: Field
    body_y: Field
    x: Field
    y: Field
    radius: Field
    angle: NDArray[np.intp]
    dome_mm: Field
    dome_slope: Field
    middle: tuple[slice, slice]


def grid(body: Body, body_x: Field, body_y: Field, pixel_mm: float) -> Grid:
    """Pixels at `body_x`, `body_y` (float32[rows, columns], mm of the body), at least 2 by 2 of them."""
    x, y = body_x / np.float32(body.scale[0]), body_y / np.float32(body.scale[1])
    waves = [(np.sin(w[0] * x + w[1] * y + w[2]), w) for w in body.waves]
    x = x + sum(wave * w[3] for wave, w in waves)
    y = y + sum(wave * w[4] for wave, w in waves)
    turn = (np.arctan2(x, y) + np.float32(np.pi)) * np.float32(ANGLES / (2 * np.pi))
    right = x < 0
    u, v = (x - np.where(right, np.float32(-66), np.float32(66))) / 72, (y + 14) / 82
    top = np.where(right, np.float32(body.dome_mm[0]), np.float32(body.dome_mm[1]))
    dome, slope = top - 70 * (u * u + v * v) - 22 * v, np.hypot(140 / 72 * u, (140 * v + 22) / 82)
    inner = (np.abs(x) < 105) & (np.abs(y) < 100)
    rows, columns = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
    middle = (_span(rows), _span(columns))
    return Grid(pixel_mm, body_x, body_y, x, y, np.hypot(x, y), turn.astype(np.intp) % ANGLES, dome, slope, middle)


def _span(indices: NDArray[np.intp]) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1) if indices.size else slice(0, 0)


def at_level(measures: Sequence[float], z: float) -> float:
    return float(np.interp(z, LEVELS, measures))


def _pleura(z: float) -> NDArray[np.float64]:
    """The pleura of the reference chest at height `z` as a radius over ALPHA."""
    sine, cosine = np.abs(np.sin(ALPHA)), np.cos(ALPHA)
    depth = np.where(cosine > 0, at_level(PLEURA_BACK, z), at_level(PLEURA_FRONT, z))
    radius: NDArray[np.float64] = ((sine / at_level(PLEURA_SIDE, z)) ** 2.4 + (np.abs(cosine) / depth) ** 2.4) ** (
        -1 / 2.4
    )
    return radius


def _pleura_mm(g: Grid, pleura: NDArray[np.float64]) -> Field:
    lean = np.gradient(pleura, ALPHA[1] - ALPHA[0]) / pleura
    flat = (1 / np.hypot(1, lean)).astype(np.float32)  # a slanted wall is nearer than along the ray
    distance: Field = (g.radius - pleura.astype(np.float32)[g.angle]) * flat[g.angle]
    return distance


def ellipsoid_mm(shape: Ellipsoid, x: Field, y: Field, z: float, grown: float = 1.0) -> Field:
    """Signed distance to first order: value over gradient of the implicit form."""
    (cx, cy, cz), (ax, ay, az), degrees = shape
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    u = ((x - cx) * float(c) + (y - cy) * float(s)) / (ax * grown)
    v = ((y - cy) * float(c) - (x - cx) * float(s)) / (ay * grown)
    w = (z - cz) / (az * grown)
    level = np.sqrt(u * u + v * v + w * w)
    steep = np.sqrt((u / (ax * grown)) ** 2 + (v / (ay * grown)) ** 2 + (w / (az * grown)) ** 2) + 1e-4
    distance: Field = level * (level - 1) / steep
    return distance


def chain_mm(chain: Chain, x: Field, y: Field, z: float, grown: float = 1.0) -> Field | None:
    """Signed distance to a tube; None where the plane passes it by."""
    nearest: Field | None = None
    for (ax, ay, az, ar), (bx, by, bz, br) in pairwise(chain):
        reach = grown * max(ar, br) + 14
        if not min(az, bz) - reach < z < max(az, bz) + reach:
            continue
        dx, dy, dz = bx - ax, by - ay, bz - az
        px, py, pz = x - ax, y - ay, z - az
        t = np.clip((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        away: Field = np.sqrt((px - t * dx) ** 2 + (py - t * dy) ** 2 + (pz - t * dz) ** 2)
        away -= grown * (ar + t * (br - ar))
        nearest = away if nearest is None else np.minimum(nearest, away)
    return nearest


def _blend_min(a: Field, b: Field, round_mm: float) -> Field:
    """Minimum with its crease rounded off: two organs that lie together, wrapped in one sheet of pleura."""
    h = np.maximum(round_mm - np.abs(a - b), 0)
    joined: Field = np.minimum(a, b) - h * h * (0.25 / round_mm)
    return joined


def _mediastinum_mm(body: Body, x: Field, y: Field, z: float, tubes: Sequence[Field]) -> Field:
    """Signed distance to all that lies between the lungs, `tubes` among it."""
    spine = at_level(SPINE_Y, z)
    solids: list[tuple[Ellipsoid, float]] = [
        (((0, at_level(CORE_Y, z), z), (at_level(CORE_WIDTH, z), at_level(CORE_DEPTH, z), TALL_MM), 0), 1.0),
        (((0, spine, z), (23, 21, TALL_MM), 0), 1.0),
        (((0, spine + 34, z), (33, 25, TALL_MM), 0), 1.0),
        *((hilum, 1.0) for hilum in HILA),
        (HEART, body.heart * 1.07),
    ]
    whole: Field = np.abs(x - 2) - np.float32(3.5)  # the two lungs never touch
    for shape, grown in solids:
        whole = _blend_min(whole, ellipsoid_mm(shape, x, y, z, grown), 9)
    for tube in tubes:
        whole = _blend_min(whole, tube, 9)
    return whole


@dataclass(frozen=True, slots=True)
class Cut:
    """The outlines in one plane, as signed mm; those of vessels and airways cover the middle of the grid alone.

    Attributes:
        z: height in the reference chest.
        pleura: float64[ANGLES]; radius of the inner wall of the chest.
        abdomen_mm: below the diaphragm; vessels: with the share of the contrast agent that each takes.
    """

    z: float
    pleura: NDArray[np.float64]
    pleura_mm: Field
    lung_mm: Field
    abdomen_mm: Field
    vessels: list[tuple[Field, float]]
    airways: list[Field]


def cut(body: Body, g: Grid, z_mm: float) -> Cut:
    """Cuts the body at the height `z_mm` of its own."""
    z = z_mm / body.scale[2]
    x, y = g.x[g.middle], g.y[g.middle]
    chains = ((chain_mm(chain, x, y, z, body.aorta if chain is AORTA else 1.0), share) for chain, share in VESSELS)
    vessels = [(distance, share) for distance, share in chains if distance is not None]
    airways = [distance for chain in AIRWAYS if (distance := chain_mm(chain, x, y, z)) is not None]
    between = _mediastinum_mm(body, x, y, z, [*(d - 3 for d, _ in vessels), *(d - 4 for d in airways)])
    pleura = _pleura(z)
    pleura_mm = _pleura_mm(g, pleura)
    lung_mm = pleura_mm.copy()
    lung_mm[g.middle] = -_blend_min(-lung_mm[g.middle], between, 6)
    abdomen_mm = np.asarray((z - g.dome_mm) / np.hypot(1, g.dome_slope), np.float32)
    if z < max(body.dome_mm) + 10:
        lung_mm = -_blend_min(-lung_mm, abdomen_mm, 5)
    return Cut(z, pleura, pleura_mm, lung_mm, abdomen_mm, vessels, airways)


def nodule_mm(nodule: Nodule, x: Field, y: Field, z_mm: float) -> Field | None:
    """Distance along the ray from the nodule's centre to its surface; None where the plane passes it by."""
    cx, cy, cz = nodule.centre_mm
    radius, dz = nodule.diameter_mm / 2, z_mm - cz
    if abs(dz) > radius * (1 + nodule.lobulation + nodule.spiculation):
        return None
    dx, dy = x - np.float32(cx), y - np.float32(cy)
    flat = np.hypot(dx, dy)
    round_, up = np.arctan2(dy, dx), np.arctan2(np.float32(dz), flat)
    lobes = 0.6 * np.sin(3 * round_ + nodule.phase) * np.cos(2 * up + nodule.phase)
    lobes = nodule.lobulation * (lobes + 0.4 * np.sin(5 * round_ - 2 * nodule.phase) * np.cos(3 * up))
    spikes = nodule.spiculation * np.maximum(np.cos(7 * round_ + nodule.phase) * np.cos(5 * up), 0) ** 4
    distance: Field = np.hypot(flat, np.float32(dz)) - radius * (1 + lobes + spikes)
    return distance


def tubes_share(pieces: Field, g: Grid, z_mm: float, grown_mm: float = 0.0) -> Field:
    """Share of each pixel that lies in one of the short tubes; tubes under a quarter of a pixel are left out.

    Each tube is compared with the square of pixels about its middle alone: a pixel of width p at the distance d from
    the axis of a tube of radius r holds the overlap of [d - p/2, d + p/2] and [-r, r].
    """
    share: Field = np.zeros(g.x.shape, np.float32)
    px, radius = g.pixel_mm, pieces[:, 6] + np.float32(grown_mm)
    met = np.abs((pieces[:, 2] + pieces[:, 5]) / 2 - z_mm) < np.abs(pieces[:, 2] - pieces[:, 5]) / 2 + radius
    met &= radius > px / 8
    if not met.any():
        return share
    start, run, radius = pieces[met, :3], pieces[met, 3:6] - pieces[met, :3], radius[met]
    reach = int(np.ceil(float((np.hypot(run[:, 0], run[:, 1]) / 2 + radius).max()) / px + 0.5))
    first = np.array([g.body_x[0, 0], g.body_y[0, 0]])
    steps = np.array([[g.body_x[0, 1], g.body_x[1, 0]], [g.body_y[0, 1], g.body_y[1, 0]]]) - first[:, None]
    column, row = np.rint(np.linalg.inv(steps) @ (start[:, :2] + run[:, :2] / 2 - first).T).astype(np.intp)
    square = np.arange(-reach, reach + 1)
    columns = np.clip(column[:, None, None] + square[None, None], 0, share.shape[1] - 1)
    rows = np.clip(row[:, None, None] + square[None, :, None], 0, share.shape[0] - 1)
    at = rows * share.shape[1] + columns
    (ax, ay, az), (dx, dy, dz) = start.T.reshape(3, -1, 1, 1), run.T.reshape(3, -1, 1, 1)
    radius = radius.reshape(-1, 1, 1)
    x, y, z = g.body_x.ravel()[at] - ax, g.body_y.ravel()[at] - ay, z_mm - az
    t = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
    away = np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2 + (z - t * dz) ** 2)
    overlap = (np.minimum(away + px / 2, radius) - np.maximum(away - px / 2, -radius)) / px
    np.maximum.at(share.reshape(-1), at, np.clip(overlap, 0, 1).astype(np.float32))
    return share
