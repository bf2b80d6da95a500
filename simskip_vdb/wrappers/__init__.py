"""Refiners in services: one module a framework, each loaded only when it is imported.

    onnx.py                   a graph that does to a query what the refiner does
    sentence_transformers.py  a module at the end of a SentenceTransformer
    langchain.py              an Embeddings around another
    llama_index.py            a BaseEmbedding around another

All of them refine queries and nothing else. Documents pass as they are: simskip starts from
originals, so it would take a refined vector that an application stores for an original, and
refine it once more. Its next run decides what becomes of rows that arrive.
"""

from __future__ import annotations

from simskip_vdb.wrappers.loading import Expected as Expected

__all__ = ["Expected"]
