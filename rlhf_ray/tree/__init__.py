"""The tree of stages: each is carried out once for all who ask, here or by Ray actors."""
