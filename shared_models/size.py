"""How much an update weighs, said before a run starts, and where most of it is."""

from math import prod

from shared_models.weights import Schema, size_bytes

HEAVY_BYTES = 200_000_000  # of one update, from which on a hospital's line is worth a thought
BULK = 0.5


def size_in_words(schema: Schema) -> str:
    """Parameters and bytes of one update; a warning where the layers after the last convolution are the bulk."""
    count, size = sum(prod(spec.shape) for spec in schema.values()), size_bytes(schema)
    words = f"{_short(count).strip()} parameters; each site receives and sends {_short(size)}B a round"
    dense = {name: prod(spec.shape) for name, spec in schema.items() if len(spec.shape) == 2}
    convolves = any(len(spec.shape) > 2 for spec in schema.values())
    if convolves and sum(dense.values()) > BULK * count:
        most = max(dense, key=lambda name: dense[name])
        words += (
            f". Warning: {sum(dense.values()) / count:.0%} of that are fully connected layers (most of it {most!r}); "
            f'a VGG with head = "slim" has one small layer instead'
        )
    elif size > HEAVY_BYTES:
        words += ". Warning: that is much for a hospital's line; a smaller network, or fewer and longer rounds, is less"
    return words


def _short(count: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} "
