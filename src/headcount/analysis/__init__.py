"""Tables of a study folder, with pandas: what was measured as numbers that can be read.

`study` is the way in. Each question has a file: importance, curves, grid, transfer, correlations, top_sets,
prediction, induction, and documents; below them lie what they share: schema, rows, points, scores, frames. Of the
other rooms only stats, masks, errors and what reads a study's folder (ledger, codec, described, shown, jobs, masksets,
spec) may come in: no torch, no altair.
"""
