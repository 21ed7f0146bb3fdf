"""How an image was taken, in numbers and in words of closed lists: what may stay with pixels once identifiers are gone.

Header texts are typed by people, and names, numbers and addresses are found in any of them. So no text is copied: a
word is kept if it stands in the lists here, the others are dropped.
"""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Provenance:
    """Facts of acquisition; None where a file does not say, or says it in words that are not known here.

    Attributes:
        rows, columns, slices: as stored, before the axes were turned.
        photometric, transfer_syntax: DICOM's own words (`MONOCHROME1`, `JPEG2000Lossless`).
        gantry_tilt_deg: as the header states it.
        lossy: the pixels went through a lossy compression once.
        inverted: grey levels were turned round (MONOCHROME1), so that dense is bright.
    """

    manufacturer: str | None = None
    model: str | None = None
    kernel: str | None = None
    body_part: str | None = None
    patient_position: str | None = None
    slice_thickness_mm: float | None = None
    tube_kv: float | None = None
    gantry_tilt_deg: float | None = None
    rows: int | None = None
    columns: int | None = None
    slices: int | None = None
    photometric: str | None = None
    transfer_syntax: str | None = None
    lossy: bool = False
    inverted: bool = False


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNKNOWN = Provenance()
MODALITIES = _words("CT MR PT NM CR DX MG RF RG XA PX IO US OCT OP XC ES GM SM OT")
MEASURED = _words("CT MR PT NM")  # planes in the patient; their numbers mean something, however displayed
POSITIONS = _words("HFS HFP HFDR HFDL FFS FFP FFDR FFDL LFS LFP RFS RFP AFDR AFDL PFDR PFDL SITTING")
PHOTOMETRICS = _words("MONOCHROME1 MONOCHROME2")
MANUFACTURERS = _words(
    """
    GE MEDICAL SYSTEMS HEALTHCARE SIEMENS HEALTHINEERS PHILIPS TOSHIBA CANON UIH UNITED IMAGING HITACHI FUJIFILM
    FUJI AGFA CARESTREAM HEALTH KODAK KONICA MINOLTA SAMSUNG ELECTRONICS HOLOGIC SHIMADZU NEUSOFT MINDRAY ESAOTE
    SONOSITE PLANMECA MARCONI PICKER ELSCINT VAREX VIEWORKS DRTECH ACCURAY VARIAN ELEKTA BRUKER SECTRA SWISSRAY ANKE
    WANDONG ALLENGERS OXFORD INSTRUMENTS CORPORATION MFG
    """
)
MODELS = _words(
    """
    LIGHTSPEED HISPEED BRIGHTSPEED PROSPEED PLUS ULTRA PRO VCT RT XT DUAL QX I NX DISCOVERY OPTIMA REVOLUTION
    FRONTIER APEX MAXIMA EVO ACT CT MR PET HD ST STE RX IQ MI SIGNA HDX HDXT EXCITE ARTIST PIONEER PREMIER ARCHITECT
    HERO SOMATOM SENSATION DEFINITION EMOTION BIOGRAPH MCT HORIZON VISION VISIO FLASH EDGE FORCE DRIVE CONFIDENCE
    SCOPE SPIRIT PERSPECTIVE AS GO TOP UP ALL NOW SIM OPEN X CITE ALPHA NAEOTOM VOLUME ZOOM MAGNETOM AVANTO FIT AERA
    SKYRA PRISMA PRISMAFIT VERIO TRIO TRIOTIM SYMPHONY SYMPHONYTIM SONATA ESPREE ESSENZA HARMONY ALLEGRA AMIRA SOLA
    VIDA LUMINA TERRA SEMPRA CONNECTOM ALTEA CIMA BRILLIANCE ICT SP INGENUITY TF GEMINI IQON ACCESS INCISIVE MX BIG
    BORE SPECTRAL VEREOS ACHIEVA DSTREAM INGENIA ELITION AMBITION INTERA PANORAMA MULTIVA PRODIVA ENTERPRISE
    AQUILION ONE PRIME PRIMESP LB CX CXL LIGHTNING PRECISION ASTEION ASTELION ACTIVION ALEXION CARTESION GENESIS
    VANTAGE TITAN GALAN ORIAN ELAN ATLAS FORTIAN EXCELART T UCT UMR UMI UPMR JUPITER OMEGA ECHELON OASIS AIRIS ELITE
    APERTO SUPRIA SCENARIA ECLOS PRESTO SYNERGY DIGITALDIAGNOST DIGITAL DIAGNOST ESSENTA EASY UPGRADE AXIOM
    ARISTOS MULTIX YSIO MOBILETT LUMINOS AGILE MAX DEFINIUM THUNDER PLATFORM DRX EVOLUTION ASCEND COMPASS REGIUS
    AERO FCR CAPSULA XL PROFECT CAPSULAX SELENIA DIMENSIONS LORAD SENOGRAPHE ESSENTIAL PRISTINA DS MAMMOMAT
    INSPIRATION MAMMODIAGNOST XA AMULET CR ADC SOLO RADNEXT MOBILEDART TRINIAS GC GM NEUVIZ SCINTCARE NEUSIGHT
    """
)
KERNELS = _words(
    """
    STANDARD LUNG BONE BONEPLUS SOFT DETAIL CHEST EDGE PLUS SMOOTH SHARP ULTRA STD ASIR STND B BR BF BL BV BP H HR
    HC HV HP QR I J FC FL U UB E D T S L A C V YA YB YC YD YE CB EB EC F G K BRAIN BODY
    """
)
BODY_PARTS = _words(
    """
    ABDOMEN ABDOMENPELVIS ABD ADRENAL ANKLE AORTA ARM BACK BLADDER BODY BRAIN BREAST CAROTID CERVIX CHEST
    CHESTABDOMEN CHESTABDPELVIS CSPINE LSPINE TSPINE CTSPINE TLSPINE LSSPINE SSPINE CLAVICLE COLON EAR ELBOW
    ESOPHAGUS EXTREMITY EYE FEMUR FINGER FOOT GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC JAW KIDNEY KNEE
    LARYNX LEG LIVER LUNG MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV ORBIT OVARY
    PANCREAS PARTIALBODY PELVIS PROSTATE RECTUM RIB SACRUM SCALP SCAPULA SELLA SHOULDER SKULL SPINE SPLEEN STERNUM
    STOMACH THIGH THORAX THYROID TOE TRACHEA UTERUS WHOLEBODY WRIST
    """
)
_TOKEN = re.compile(r"([A-Za-z]*)(\d{0,3})([A-Za-z]?)")
_WORDS = 6  # of one text


def known_words(text: str, words: frozenset[str]) -> str | None:
    """What is left of a text, in capitals, when only known words stay.

    A word may carry a number of up to three digits, and one such number may stand alone after a word:
    `Biograph40_mCT 4R, Dr. Doe` is `BIOGRAPH40 MCT`, `uMR 770` stays.
    """
    kept: list[str] = []
    for token in re.split(r"[^A-Za-z0-9]+", text[:256]):
        parts = _TOKEN.fullmatch(token)
        if not token or parts is None:
            continue
        known = parts[1].upper() in words if parts[1] else bool(kept) and not any(word[0].isdigit() for word in kept)
        if known:
            kept.append(token.upper())
    return " ".join(kept[:_WORDS]) or None


def one_of(text: str, words: frozenset[str]) -> str | None:
    """The text itself if it is one of `words`."""
    return text if text in words else None


def within(value: float | None, low: float, high: float) -> float | None:
    """The number if it is between two bounds: a header that says otherwise is not worth keeping."""
    return value if value is not None and math.isfinite(value) and low <= value <= high else None
