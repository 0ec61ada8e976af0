"""Facts that the kernels and all that is built on them share; what C needs too stands in csrc/ocs.h alone."""

from ocs import _C

CLIP_METHODS: tuple[str, ...] = _C.CLIP_METHODS
RELEASE_METHODS = tuple(method for method in CLIP_METHODS if method.endswith("-release"))  # which take the values
MIN_BITS, MAX_BITS = _C.MIN_BITS, _C.MAX_BITS  # of integers
MAX_BINS = _C.MAX_BINS  # of a histogram
OCTAVES, OCTAVE_BINS = _C.OCTAVES, _C.OCTAVE_BINS  # of a logarithmic histogram
BINS_PER_OCTAVE = OCTAVE_BINS // OCTAVES
MAX_DEPTH = _C.MAX_DEPTH  # how often one channel may be halved
MAX_PARTS = _C.MAX_PARTS  # of one channel
SQUANT_STEP = 2**24  # an error of one grid step, as a whole number
SQUANT_LIMIT = 64 * SQUANT_STEP  # errors beyond count as this
SMALLEST = 2.0**-149  # the smallest positive float32: a positive threshold never gives a scale of zero
TILE_OUTPUTS, TILE_CHANNELS = 16, 32  # of a tile of a packed weight (csrc/tiles.c)
SEGMENT = 32768  # channels whose products are added up as whole numbers before they are scaled
MOST_STEPS = 2**23 - 2**16  # of a float row's largest magnitude, once it is cut into three bytes
TINY = 2.0**-100  # largest magnitudes below are not clipped: float32 hardly tells such values apart


def qmax(bits: int) -> int:
    """Compute the largest integer of k signed bits, 2^(k - 1) - 1."""
    return 2 ** (bits - 1) - 1


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """Compute the smallest and largest integer of k bits: -qmax .. qmax, or 0 .. 2^k - 1 where not signed."""
    return (-qmax(bits), qmax(bits)) if signed else (0, 2**bits - 1)
