"""What a hospital makes of a body: tissues in Hounsfield units, its scanner's picture of them, its readers' labels."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import binary_dilation, gaussian_filter, gaussian_filter1d

from simulations import anatomy
from simulations.anatomy import TURN, Body, Cut, Field, Grid, Nodule, Point, at_level, chain_mm, ellipsoid_mm

Mask = NDArray[np.bool_]
Style = Literal["tight", "loose", "smoothed", "vessels-excluded", "exact"]
STYLES: tuple[Style, ...] = get_args(Style)[:4]  # of readers; nobody draws the exact one
Table = Literal["flat", "curved", "none"]
NODULE_HU = {"solid": 35.0, "part-solid": -600.0, "ground-glass": -640.0, "calcified": 380.0}


@dataclass(frozen=True, slots=True)
class Site:
    """How one hospital's images and labels come about.

    Attributes:
        psf_mm: full width at half maximum of the in-plane blur; `edge`: share of edge enhancement on top.
        noise_hu: standard deviation in the middle of a body of average girth.
        noise_cutoff_per_mm: c in the spectrum k exp(-(k / c)^2) that filtered back-projection gives its noise.
        bone_factor: HU of bone beside those at 120 kV.
        padding_hu: what stands outside the circle of reconstruction.
        lung_hu: how deep its patients breathe in; atelectasis_hu, emphysema_hu: what their lungs suffer from.
        shift_mm, turn_deg: standard deviations of how patients lie on the couch.
    """

    name: str
    fov_mm: float
    thickness_mm: float
    psf_mm: float
    edge: float
    noise_hu: float
    noise_cutoff_per_mm: float
    offset_hu: float
    gain: float
    contrast_hu: float
    bone_factor: float
    table: Table
    padding_hu: int
    style: Style
    lung_hu: float
    atelectasis_hu: float
    emphysema_hu: float
    shift_mm: float = 7.0
    turn_deg: float = 3.0


SITES = {
    site.name: site
    for site in (
        Site("north", 370, 1.25, 1.6, 0, 14, 0.3, 0, 1, 0, 1, "flat", -1024, "tight", -872, 0, 0),
        Site("south", 340, 5, 1, 1.2, 55, 0.55, 12, 1.015, 0, 1, "curved", -2048, "loose", -790, 250, 0),
        Site("east", 430, 2.5, 2.4, 0, 9, 0.18, -10, 0.985, 250, 1.2, "curved", -3024, "vessels-excluded", -850, 0, 60),
        Site("west", 390, 3, 1.3, 0.5, 30, 0.4, 5, 1, 90, 0.95, "none", -1024, "smoothed", -835, 60, 0),
    )
}


def site_named(name: str, seed: int) -> Site:
    """One of the four built-in sites, or for any other name one that follows from the name and the seed."""
    if name in SITES:
        return SITES[name]
    rng = np.random.default_rng([seed, crc32(name.encode())])
    sharp = rng.uniform()
    return Site(
        name=name,
        fov_mm=float(rng.uniform(345, 430)),
        thickness_mm=float(rng.choice([1.0, 1.25, 2.0, 2.5, 3.0, 5.0])),
        psf_mm=float(2.3 - 1.2 * sharp),
        edge=float(max(0, 1.6 * (sharp - 0.4))),
        noise_hu=float(np.exp(rng.uniform(np.log(9), np.log(50)))),
        noise_cutoff_per_mm=float(0.2 + 0.35 * sharp),
        offset_hu=float(rng.uniform(-12, 12)),
        gain=float(rng.uniform(0.985, 1.015)),
        contrast_hu=float(rng.choice([0.0, rng.uniform(60, 280)])),
        bone_factor=float(rng.choice([0.95, 1.0, 1.2])),
        table=get_args(Table)[rng.integers(3)],
        padding_hu=int(rng.choice([-1000, -1024, -2048, -3024])),
        style=STYLES[rng.integers(4)],
        lung_hu=float(rng.uniform(-875, -790)),
        atelectasis_hu=float(max(0, rng.uniform(-150, 250))),
        emphysema_hu=float(max(0, rng.uniform(-60, 60))),
    )


@dataclass(frozen=True, slots=True)
class Scan:
    """One study as it leaves the hospital.

    Attributes:
        hu: int16[I, J, K]; mask (the site's own label), truth (exact): uint8[I, J, K], 1 is lung.
        lesion: uint8[I, J, K], 1 in a nodule, exact.
        affine_ras: float64[4, 4]; voxel index -> mm, RAS+.
        nodules: their centres now in LPS mm of the scanner: the frame of `affine_ras`, x and y the other way.
    """

    hu: NDArray[np.int16]
    mask: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    lesion: NDArray[np.uint8]
    affine_ras: NDArray[np.float64]
    nodules: tuple[Nodule, ...]


def acquire(body: Body, site: Site, planes_mm: NDArray[np.float64], size: int, rng: np.random.Generator) -> Scan:
    """Lays the body on the couch and reads the planes at these heights (mm of the body, upwards in even steps)."""
    px = site.fov_mm / size
    shift = np.append(rng.normal(0, site.shift_mm, 2), np.round(rng.uniform(-260, -60), 1))
    turn = np.deg2rad(rng.normal(0, site.turn_deg))
    cosine, sine = float(np.cos(turn)), float(np.sin(turn))
    line = ((np.arange(size) - (size - 1) / 2) * px).astype(np.float32)
    x, y = np.meshgrid(line, line)
    dx, dy = x - np.float32(shift[0]), y - np.float32(shift[1])
    pixels = anatomy.grid(body, cosine * dx + sine * dy, cosine * dy - sine * dx, px)
    couch = _couch(site.table, x, y, float(shift[1]) + _back_mm(body), px)
    unseen = np.hypot(x, y) > site.fov_mm / 2
    loud = (0.6 + 0.4 * np.exp(-(dx * dx + dy * dy) / 120**2)) * (site.noise_hu * _attenuation(body))
    hu = np.empty((len(planes_mm), size, size), np.int16)
    mask, truth, lesion = (np.empty(hu.shape, np.uint8) for _ in range(3))
    for k, plane in enumerate(planes_mm):
        clean, middle = _slab(body, pixels, float(plane), site)
        clean = gaussian_filter(np.where(clean < -990, np.maximum(clean, couch), clean), site.psf_mm / 2.355 / px)
        grain = noise(size, px, site.noise_cutoff_per_mm, rng) * loud
        image = clean + site.edge * (clean - gaussian_filter(clean, max(1.2 / px, 0.8))) if site.edge else clean
        image = (image + 1000) * site.gain - 1000 + site.offset_hu
        image += grain * (1 + 0.6 * float(np.clip((plane - 40) / 40, 0, 1)))  # shoulders let little through
        image = np.where(unseen, site.padding_hu, np.maximum(image, -1024))
        hu[k] = np.clip(np.rint(image), -3024, 3071)
        mask[k] = annotate(site.style, middle, clean, px) & ~unseen
        truth[k] = (middle.lung_mm < 0) & ~unseen
        lesion[k] = middle.nodule & ~unseen
    step = planes_mm[1] - planes_mm[0] if len(planes_mm) > 1 else site.thickness_mm
    affine = affine_ras(px, float(step), (float(line[0]), float(line[0]), float(planes_mm[0] + shift[2])))

    def laid(centre: Point) -> Point:
        x, y, z = cosine * centre[0] - sine * centre[1], sine * centre[0] + cosine * centre[1], centre[2]
        return x + float(shift[0]), y + float(shift[1]), z + float(shift[2])

    nodules = tuple(replace(nodule, centre_mm=laid(nodule.centre_mm)) for nodule in body.nodules)
    # planes, rows, columns -> i to the left, j to the back, k to the head
    mask, truth, lesion = (voxels.transpose(2, 1, 0) for voxels in (mask, truth, lesion))
    return Scan(hu.transpose(2, 1, 0), mask, truth, lesion, affine, nodules)


def affine_ras(pixel_mm: float, step_mm: float, first_lps: Point) -> NDArray[np.float64]:
    """Index (i to the left, j to the back, k to the head) -> RAS+: LPS with its first two axes turned round."""
    lps = np.diag([pixel_mm, pixel_mm, step_mm, 1.0])
    lps[:3, 3] = first_lps
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def annotate(style: Style, middle: "Section", clean_hu: Field, pixel_mm: float) -> Mask:
    """The lungs as this site's readers draw them in the blurred image without noise; nodules always belong to them."""
    if style == "loose":
        return middle.lung_mm < 3.0
    truth = middle.lung_mm < 0
    if style == "exact":
        return truth
    if style == "tight":
        drawn = middle.lung_mm < -1.5
    elif style == "smoothed":
        drawn = gaussian_filter(truth.astype(np.float32), 6 / pixel_mm) > 0.5
    else:
        drawn = truth & ((clean_hu < -550) | binary_dilation(middle.nodule))  # its blurred edge is no vessel
    return drawn | middle.nodule


def noise(size: int, pixel_mm: float, cutoff_per_mm: float, rng: np.random.Generator) -> Field:
    """float32[size, size] of unit variance with the spectrum of filtered back-projection."""
    white = rng.standard_normal((size, size), np.float32)
    coloured: Field = fft.irfft2(fft.rfft2(white) * _spectrum(size, pixel_mm, cutoff_per_mm), s=white.shape)
    return coloured


@cache
def _spectrum(size: int, pixel_mm: float, cutoff_per_mm: float) -> Field:
    ky, kx = np.fft.fftfreq(size, pixel_mm)[:, None], np.fft.fftfreq(size, pixel_mm)[None]
    k = np.hypot(ky, kx)
    shape = k * np.exp(-((k / cutoff_per_mm) ** 2))
    shape /= np.sqrt((shape**2).mean())
    half: Field = shape[:, : size // 2 + 1].astype(np.float32)
    return half


def _back_mm(body: Body) -> float:
    return (84 + 10 + 24 * body.muscle + 1.15 * body.fat_mm) * body.scale[1]


def _attenuation(body: Body) -> float:
    """Noise grows with the girth of the body; 1 for the average one."""
    return ((148 + body.fat_mm) * body.scale[0] / 162) ** 2


def _couch(table: Table, x: Field, y: Field, back_mm: float, pixel_mm: float) -> Field:
    """Foam between two sheets of carbon fibre, in the frame of the scanner."""
    hu = np.full(x.shape, -1000, np.float32)
    if table == "none":
        return hu
    middle = back_mm + 16 - (0.0011 * x * x if table == "curved" else 0)
    half = np.abs(y - middle)
    _paint(hu, np.maximum(half - 14, np.abs(x) - 220), -940, pixel_mm)
    _paint(hu, np.maximum(np.abs(half - 13) - 1, np.abs(x) - 220), 50, pixel_mm)
    return hu


@dataclass(frozen=True, slots=True)
class Section:
    """One plane without blur or noise: HU, mm to the surface of the lungs (negative inside), pixels in a nodule."""

    hu: Field
    lung_mm: Field
    nodule: Mask


def _slab(body: Body, g: Grid, z_mm: float, site: Site) -> tuple[Field, Section]:
    """Mean HU over the thickness of a slice, and its middle plane."""
    middle = section(body, g, z_mm, site)
    if site.thickness_mm <= 1.5:
        return middle.hu, middle
    third = site.thickness_mm / 3
    planes = [middle.hu, section(body, g, z_mm - third, site).hu, section(body, g, z_mm + third, site).hu]
    return np.mean(planes, axis=0, dtype=np.float32), middle


def section(body: Body, g: Grid, z_mm: float, site: Site) -> Section:
    """Draws the plane `z_mm` of the body from the skin inwards, as the site's tube voltage and contrast show it."""
    outlines = anatomy.cut(body, g, z_mm)
    hu = np.full(g.x.shape, -1000, np.float32)
    _draw_wall(hu, body, g, outlines, site)
    if outlines.z < max(body.dome_mm) + 10:
        _draw_abdomen(hu, g, outlines, site)
    _draw_mediastinum(hu, body, g, outlines, site)
    _draw_bones(hu, body, g, outlines.z, site)
    return Section(hu, outlines.lung_mm, _draw_lungs(hu, body, g, z_mm, outlines, site))


def _share(distance: Field, pixel_mm: float) -> Field:
    """How much of each pixel lies inside, for an edge at this signed distance."""
    share: Field = np.clip(0.5 - distance / pixel_mm, 0, 1)
    return share


def _paint(hu: Field, distance: Field, value: float | Field, pixel_mm: float) -> None:
    hu += _share(distance, pixel_mm) * (value - hu)


def _draw_wall(hu: Field, body: Body, g: Grid, outlines: Cut, site: Site) -> None:
    """Skin, fat, breasts, muscle, shoulder blades and ribs: whatever is a radius over the angle."""
    px, z, pleura = g.pixel_mm, outlines.z, outlines.pleura
    raised = float(np.clip(z / 75, 0, 1)) ** 1.5
    low, high = (np.interp(TURN, anatomy.TURNS, m) for m in (anatomy.MUSCLE_LOW, anatomy.MUSCLE_HIGH))
    thick = gaussian_filter1d((low + raised * (high - low)) * body.muscle, 22, mode="wrap")
    fat = np.interp(TURN, anatomy.TURNS, anatomy.FAT_SHARE) * body.fat_mm
    bust = np.exp(-(((TURN - 0.74) / 0.1) ** 2) - ((z + 40) / 42) ** 2) * (16 + 1.1 * body.fat_mm) * body.female
    chest = pleura + 10
    meat = chest + thick

    def over(angles: NDArray[np.float64]) -> Field:
        spread: Field = angles.astype(np.float32)[g.angle]
        return spread

    skin = g.radius - over(gaussian_filter1d(meat + fat, 30, mode="wrap") + bust)
    _paint(hu, skin, 20, px)
    _paint(hu, skin + 2, -105, px)
    if bust.max() > 8:
        _paint(hu, np.abs(g.radius - over(meat + 4 + 0.5 * bust)) - over(0.28 * bust - 3), -10, px)
    _paint(hu, g.radius - over(meat), 54, px)
    cleft = np.where(thick > 8, 1.2 * np.clip((TURN - 0.1) / 0.1, 0, 1), 0) - 0.2
    _paint(hu, np.abs(g.radius - over(chest + 0.42 * thick)) - over(cleft), -80, px)
    if raised > 0.1:
        _draw_armpits(hu, g, z, raised, body.muscle, site)
    if z > -45:
        rise = min((z + 45) / 100, 1.0)
        inner, outer = 0.33 - 0.19 * rise, 0.33 + 0.12 * rise
        blade = 1.3 + 2.6 * np.clip((TURN - outer + 0.06) / 0.06, 0, 1)
        along = over(np.maximum(inner - TURN, TURN - outer) * np.pi * chest)
        flat = np.abs(g.radius - over(chest + 4 + 0.22 * thick)) - over(blade)
        _paint(hu, np.maximum(flat, along), 480 * body.bone**0.5 * site.bone_factor, px)
    _paint(hu, g.radius - over(chest), 46, px)
    _paint(hu, outlines.pleura_mm - 1.2, -95, px)
    _draw_ribs(hu, body, g, z, g.radius - over(pleura + 5.5), site)


def _draw_armpits(hu: Field, g: Grid, z: float, raised: float, muscle: float, site: Site) -> None:
    """Fat with an artery and a vein."""
    for side in (-1, 1):
        x = g.x - side * (at_level(anatomy.PLEURA_SIDE, z) + 12 + 30 * raised * muscle)
        hollow = ((0.0, -14.0, z), (5 + 12 * raised, 8 + 20 * raised, anatomy.TALL_MM), -12.0 * side)
        _paint(hu, ellipsoid_mm(hollow, x, g.y, z), -95, g.pixel_mm)
        for dx, dy, share in ((-3, -18, 1.0), (3, -13, 0.3)):
            _paint(hu, np.hypot(x - dx, g.y - dy) - 3.5 * raised, 42 + share * site.contrast_hu, g.pixel_mm)


def _draw_ribs(hu: Field, body: Body, g: Grid, z: float, ring: Field, site: Site) -> None:
    """Ribs that slope down as they run round; `ring`: mm outwards from the middle of their course."""
    beside = np.where((TURN > 0.085) & (anatomy.RIB_END[:, None] > TURN), z - anatomy.RIB_Z, 99.0)
    nearest = np.take_along_axis(beside, np.abs(beside).argmin(0)[None], 0)[0].astype(np.float32)
    near = np.flatnonzero(np.abs(ring) < 8)
    angle = g.angle.ravel()[near]
    inside = (np.hypot(nearest[angle] / 6.4, ring.ravel()[near] / 3.9) - 1) * 3.9
    cartilage = TURN[angle] > 0.78
    band = hu.ravel()[near]
    _paint(band, inside, np.where(cartilage, np.float32(95), np.float32(640 * site.bone_factor)), g.pixel_mm)
    marrow = np.where(cartilage, np.float32(85), np.float32(230 * body.bone * site.bone_factor))
    _paint(band, inside + 1.3, marrow, g.pixel_mm)
    hu.reshape(-1)[near] = band


def _draw_abdomen(hu: Field, g: Grid, outlines: Cut, site: Site) -> None:
    """Diaphragm, liver, spleen, and a stomach with its air at the front."""
    px, x, y, z = g.pixel_mm, g.x, g.y, outlines.z
    below = np.maximum(outlines.abdomen_mm, outlines.pleura_mm)
    _paint(hu, below, 48, px)
    below = below + 3
    _paint(hu, below, -100, px)
    stomach = ellipsoid_mm(anatomy.STOMACH, x, y, z)
    _paint(hu, np.maximum(below, stomach), 40, px)
    _paint(hu, np.maximum(np.maximum(below, stomach) + 3, y + 38), -980, px)
    liver = np.minimum(x + 4 + 0.25 * y, ellipsoid_mm(anatomy.LIVER_LEFT, x, y, z))
    _paint(hu, np.maximum(below, liver), 57 + 0.25 * site.contrast_hu, px)
    _paint(hu, np.maximum(below, ellipsoid_mm(anatomy.SPLEEN, x, y, z)), 48 + 0.35 * site.contrast_hu, px)


def _draw_mediastinum(hu: Field, body: Body, g: Grid, outlines: Cut, site: Site) -> None:
    """Heart with its chambers, great vessels, oesophagus, trachea and main bronchi."""
    px, x, y, z, crop = g.pixel_mm, g.x[g.middle], g.y[g.middle], outlines.z, hu[g.middle]
    _paint(crop, ellipsoid_mm(anatomy.HEART, x, y, z, body.heart), 46 + 0.4 * site.contrast_hu, px)
    for chamber, share in anatomy.CHAMBERS:
        _paint(crop, ellipsoid_mm(chamber, x, y, z, body.heart), 40 + share * site.contrast_hu, px)
    for hilum in anatomy.HILA:
        _paint(crop, ellipsoid_mm(hilum, x, y, z), 20 + 0.3 * site.contrast_hu, px)
    for distance, share in outlines.vessels:
        _paint(crop, distance, 42 + share * site.contrast_hu, px)
    for distance in outlines.airways:
        _paint(crop, distance - 1.6, 30, px)
    for distance in outlines.airways:
        _paint(crop, distance, -990, px)


def _draw_bones(hu: Field, body: Body, g: Grid, z: float, site: Site) -> None:
    """Spine with its discs, processes and canal; sternum; collar bones."""
    px, x, y, crop = g.pixel_mm, g.x[g.middle], g.y[g.middle], hu[g.middle]
    across, spine, tall = np.abs(x), at_level(anatomy.SPINE_Y, z), anatomy.TALL_MM
    level = (z - 4) % anatomy.VERTEBRA_MM - anatomy.VERTEBRA_MM / 2  # 0 in the middle of a vertebra
    disc = abs(level) > 9.5
    arch = 380 * body.bone**0.5 * site.bone_factor
    _paint(crop, ellipsoid_mm(((0, spine + 34, z), (31, 22, tall), 0), x, y, z), 50, px)  # muscle about the arch
    vertebra = ellipsoid_mm(((0, spine, z), (17, 14, tall), 0), x, y, z)
    _paint(crop, vertebra, 85 if disc else 430 * site.bone_factor, px)
    _paint(crop, vertebra + 1.8, 85 if disc else 175 * body.bone * site.bone_factor, px)
    canal = np.hypot(x, y - spine - 22.5)
    _paint(crop, canal - 12.5, arch, px)
    _paint(crop, canal - 8.5, 22, px)
    bars: list[anatomy.Chain] = [((0, spine + 36, z, 3.4), (0, spine + 62, z, 3.0))]  # spinous process
    if abs(level - 4) < 6:
        bars.append(((11, spine + 24, z, 4.5), (33, spine + 36, z, 4.0)))  # transverse processes
    if disc:
        bars.append(((19, spine + 7, z, 3.5), (37, spine + 34, z, 3.5)))  # necks of the ribs
    for bar in bars:
        bone = chain_mm(bar, across, y, z)
        if bone is not None:
            _paint(crop, bone, arch, px)
    front = -at_level(anatomy.PLEURA_FRONT, z) - 7
    plate = np.maximum(across - at_level(anatomy.STERNUM_WIDTH, z), np.abs(y - front - 0.004 * x * x) - 5)
    _paint(crop, plate, 330 * site.bone_factor, px)
    _paint(crop, plate + 1.8, 110 * body.bone * site.bone_factor, px)
    collar = chain_mm(anatomy.CLAVICLE, np.abs(g.x), g.y, z)
    if collar is not None:
        _paint(hu, collar, 520 * site.bone_factor, px)
        _paint(hu, collar + 2, 260 * body.bone * site.bone_factor, px)


def _draw_lungs(hu: Field, body: Body, g: Grid, z_mm: float, outlines: Cut, site: Site) -> Mask:
    """Air, vessels, bronchi and nodules; returns where the nodules are."""
    px, x, y, z = g.pixel_mm, g.x, g.y, outlines.z
    lung = _share(outlines.lung_mm, px)
    air = body.lung_hu + (body.gravity_hu / 80) * y
    if body.emphysema_hu:
        bent_x, bent_y = 1.8 * np.sin(0.13 * y + 0.1 * z), 1.8 * np.sin(0.12 * x - 0.11 * z)
        holes = np.maximum(np.sin(0.3 * x + bent_x) * np.sin(0.27 * y + bent_y) + 0.2, 0)
        air -= body.emphysema_hu * float(np.clip((z + 60) / 120, 0, 1)) * holes  # upper lobes most
    if body.atelectasis_hu:
        air += body.atelectasis_hu * np.clip((y - 5) / 45, 0, 1) * np.exp(np.minimum(outlines.lung_mm, 0) / 9)
    hu += lung * (np.maximum(air, -985) - hu)
    hu += lung * anatomy.tubes_share(body.vessels, g, z_mm) * (42 + 0.9 * site.contrast_hu - hu)
    hu += lung * anatomy.tubes_share(body.bronchi, g, z_mm, grown_mm=0.7) * (-200 - hu)
    hu += lung * anatomy.tubes_share(body.bronchi, g, z_mm) * (-970 - hu)
    found = np.zeros(hu.shape, bool)
    for nodule in body.nodules:
        distance = anatomy.nodule_mm(nodule, g.body_x, g.body_y, z_mm)
        if distance is not None:
            value = NODULE_HU[nodule.kind] + (0.1 * site.contrast_hu if nodule.kind == "solid" else 0)
            hu += lung * _share(distance, px) * np.maximum(value - hu, 0)  # vessels shine through ground glass
            if nodule.kind == "part-solid":
                hu += lung * _share(distance + 0.45 * nodule.diameter_mm / 2, px) * (30 - hu)
            found |= (distance < 0) & (outlines.lung_mm < 0)
    return found
