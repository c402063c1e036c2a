"""The kernels: plain functions over raw tensors, one file per kernel, `reference` the same in plain torch.

Knows no model, format object or backend: nothing here imports from the rest of qrun.
"""

if __name__ != "qrun.kernels":
    raise ImportError(
        f"qrun's kernels were imported as {__name__!r}: import them as 'qrun.kernels' "
        "(a top-level package of that name is another project's)"
    )
