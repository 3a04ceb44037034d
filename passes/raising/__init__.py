"""Exporters' subgraphs to the standard's own operators."""
