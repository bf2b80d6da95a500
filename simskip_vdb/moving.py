"""Move vectors: three matrix products, and what is around them, on every core.

Rows go through in pieces that stay in a core's cache. BLAS works on one thread meanwhile, and our
own threads take one piece each: threads of BLAS would wait at the end of every product, and how
many there are would change last digits. A piece of `PIECE` rows, and a row's place in it, are all
that a result depends on: blocks that begin at a multiple of it may be cut as one likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simskip_vdb.datatypes import Mask, Positions, Vectors
from simskip_vdb.overlap import cores
from simskip_vdb.threads import blas_on_one_thread

PIECE = 512
"""Rows that go through the products at once."""
NEAREST = 1e-4
"""Distance from the origin below which a direction would be rounding: such rows do not move."""
_PLAIN = (1e-30, 1e30)
"""Numbers between which float32 adds, divides and multiplies without losing digits."""

Layer = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weight, shape (out, in), and bias, shape (out,), of a linear layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Formula:
    """x ↦ ‖x‖ · normalise(µ + ‖x̂ - µ‖ · normalise(c + f(c) + offset)).

    Where x̂ = x / ‖x‖ and c = (x̂ - µ) / ‖x̂ - µ‖, which is x̂ without an origin µ.

    Attributes:
        origin: µ, shape (d,); empty for none.
        layers: Of f, the factor of f folded into the last one; empty where f is not used.
        alpha: That factor.
        offsets: Shape (m, d), the factor of offsets not yet applied.
        beta: That factor.
    """

    origin: Vectors
    layers: tuple[Layer, ...]
    alpha: float
    offsets: Vectors
    beta: float

    @classmethod
    def of(
        cls,
        origin: Vectors,
        layers: tuple[Layer, ...],
        alpha: float,
        offsets: Vectors,
        beta: float,
    ) -> Formula:
        """Fold the factor of f into its last layer; leave out what has no effect."""
        if alpha == 0 or not layers:
            return cls(origin=origin, layers=(), alpha=0.0, offsets=offsets, beta=beta)
        factor = np.float32(alpha)
        *first, (weight, bias) = layers
        last = (factor * weight, factor * bias)
        return cls(origin=origin, layers=(*first, last), alpha=alpha, offsets=offsets, beta=beta)

    def apply(self, x: Vectors, slots: Positions, move: Mask, f: Vectors | None = None) -> Vectors:
        """Move rows.

        Args:
            x: Shape (n, d).
            slots: Each row's offset, -1 for none, shape (n,).
            move: Rows that move, shape (n,); the others are returned bit for bit.
            f: What `f` returned for these rows, shape (n, d); None to compute it.

        Returns:
            Shape (n, d).
        """

        def apply(room: _Room, piece: slice, out: Vectors) -> None:
            known = None if f is None else f[piece]
            room.apply(x[piece], slots[piece], move[piece], known, out)

        # Where f is known, what is left is little: whoever shares f has more threads to give.
        return self._by_pieces(x, apply, cores() if f is None else 1)

    def f(self, x: Vectors) -> Vectors:
        """Return what f makes of rows, without its factor, shape (n, d): others may share it."""
        found = self._by_pieces(x, lambda room, piece, out: room.f(x[piece], out), cores())
        found /= np.float32(self.alpha)
        return found

    def _by_pieces(
        self, x: Vectors, do: Callable[[_Room, slice, Vectors], None], threads: int
    ) -> Vectors:
        out = np.empty_like(x)
        starts = iter(range(0, len(x), PIECE))

        def work(starts: Iterator[int]) -> None:
            room = _Room(self, min(PIECE, len(x)))
            for start in starts:  # each thread takes the next piece
                piece = slice(start, start + PIECE)
                do(room, piece, out[piece])

        workers = min(threads, -(-len(x) // PIECE))
        with blas_on_one_thread():
            if workers < 2:
                work(starts)
            else:
                with ThreadPoolExecutor(workers) as pool:
                    list(pool.map(work, [starts] * workers))
        return out


class _Room:
    """Memory for what is between the layers, for one thread."""

    def __init__(self, formula: Formula, rows: int) -> None:
        self._formula = formula
        self._unit = np.empty((rows, formula.offsets.shape[1]), np.float32)
        self._hidden = [np.empty((rows, len(bias)), np.float32) for _, bias in formula.layers[:-1]]
        # Against an array NumPy takes a maximum four times as fast as against a number.
        self._zeros = [np.zeros_like(room) for room in self._hidden]

    def f(self, x: Vectors, out: Vectors) -> None:
        """Write what f makes of rows, with its factor, shape (b, d)."""
        norms = _norms(x)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            unit = self._unit_of(x, np.where(norms > 0, norms, 1.0))
            self._centre(unit)
            self._f(unit, out)

    def apply(
        self, x: Vectors, slots: Positions, move: Mask, f: Vectors | None, out: Vectors
    ) -> None:
        """Write the moved rows, shape (b, d)."""
        norms = _norms(x)
        move = move & (norms > 0)
        if not self._formula.layers:
            move &= slots >= 0
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            unit = self._unit_of(x, np.where(move, norms, 1.0))
            apart = self._centre(unit)
            if apart is not None:
                move &= apart > NEAREST
            if f is None:
                self._f(unit, out)
            else:
                np.multiply(f, np.float32(self._formula.alpha), out=out)
            out += unit
            offset = np.flatnonzero(slots >= 0)
            if self._formula.beta != 0 and len(offset):
                beta = np.float32(self._formula.beta)
                out[offset] += beta * self._formula.offsets[slots[offset]]
            lengths = _norms(out)
            if apart is not None:
                out *= (apart / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)[:, None]
                out += self._formula.origin
                move &= lengths > 0
                lengths = _norms(out)
            # A direction that vanished or a number that overflowed has no refined form.
            move &= (lengths > 0) & np.isfinite(lengths)
            scale = norms / np.where(move, lengths, 1.0)
            out *= scale.astype(np.float32)[:, None]
            if not ((norms < _PLAIN[1]) & (scale < _PLAIN[1])).all():  # which NaN is not either
                move &= np.isfinite(out).all(axis=1)
        if not move.all():
            out[~move] = x[~move]

    def _unit_of(self, x: Vectors, norms: NDArray[np.float64]) -> Vectors:
        unit = self._unit[: len(x)]
        np.divide(x, _divisors(norms), out=unit, casting="same_kind")
        return unit

    def _centre(self, unit: Vectors) -> NDArray[np.float64] | None:
        """Turn unit rows into their directions from the origin; return how far they were, (b,)."""
        if not len(self._formula.origin):
            return None
        unit -= self._formula.origin
        apart = _norms(unit)
        unit /= np.where(apart > NEAREST, apart, 1.0).astype(np.float32)[:, None]
        return apart

    def _f(self, unit: Vectors, out: Vectors) -> None:
        layers = self._formula.layers
        if not layers:
            out[:] = 0
            return
        h = unit
        for (weight, bias), room, zeros in zip(layers, self._hidden, self._zeros, strict=False):
            h = np.matmul(h, weight.T, out=room[: len(unit)])
            h += bias
            np.maximum(h, zeros[: len(unit)], out=h)
        weight, bias = layers[-1]
        np.matmul(h, weight.T, out=out)
        out += bias


def _norms(x: Vectors) -> NDArray[np.float64]:
    squares = np.einsum("ij,ij->i", x, x).astype(np.float64)
    # float32 squares of extreme numbers overflow or vanish although the numbers are fine.
    extreme = np.flatnonzero(~((squares > _PLAIN[0]) & (squares < _PLAIN[1])))
    squares[extreme] = np.einsum("ij,ij->i", x[extreme], x[extreme], dtype=np.float64)
    norms: NDArray[np.float64] = np.sqrt(squares)
    return norms


def _divisors(norms: NDArray[np.float64]) -> NDArray[Any]:
    """Return norms to divide rows by, shape (b, 1), as float32 where that loses nothing."""
    plain = ((norms > _PLAIN[0]) & (norms < _PLAIN[1])).all()
    return norms[:, None].astype(np.float32) if plain else norms[:, None]
