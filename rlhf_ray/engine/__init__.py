"""The stage engine: one operation on one level from one model state, cached and deterministic."""
