"""Make a vector index better without re-embedding it.

    import simskip_vdb as ss

    store = ss.open_store("faiss:products.faiss")
    files = ss.JudgmentFiles(queries="q.npy", query_ids="q.txt", qrels="qrels.tsv")
    judgments = ss.read_judgments(files)
    report = ss.refine(store, judgments)

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simskip_vdb.config import FitSettings as FitSettings
    from simskip_vdb.connectors import open_store as open_store
    from simskip_vdb.judgments import JudgmentFiles as JudgmentFiles
    from simskip_vdb.judgments import Judgments as Judgments
    from simskip_vdb.judgments import read_judgments as read_judgments
    from simskip_vdb.pipeline import Settings as Settings
    from simskip_vdb.pipeline import evaluate as evaluate
    from simskip_vdb.pipeline import fit as fit
    from simskip_vdb.pipeline import refine as refine
    from simskip_vdb.provable import power as power
    from simskip_vdb.refiner import Refiner as Refiner
    from simskip_vdb.upkeep import prune as prune
    from simskip_vdb.upkeep import rollback as rollback
    from simskip_vdb.upkeep import status as status

_HOMES = {
    "open_store": "connectors",
    "FitSettings": "config",
    "JudgmentFiles": "judgments",
    "Judgments": "judgments",
    "read_judgments": "judgments",
    "Settings": "pipeline",
    "evaluate": "pipeline",
    "fit": "pipeline",
    "refine": "pipeline",
    "power": "provable",
    "Refiner": "refiner",
    "prune": "upkeep",
    "rollback": "upkeep",
    "status": "upkeep",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:  # noqa: ANN401 any public name
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
