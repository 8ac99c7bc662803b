"""Statistics of what was measured: numpy and scipy alone; every room may use this one, it uses none.

Here live `intervals` (of accuracies and differences, and the three verdicts), `paired` (tests of two models on the same
documents), `ranks` (rank correlations, and what noise does to them), `sets` (what two sets have in common by chance),
`resampling` (draws of documents, those of a passage together) and `baselines` (guessing, constant answers, results that
say little). What comes in is arrays and plain numbers: no table, no file, no model. To import `scipy.stats` takes half
a second: functions that need it do so themselves; of common distributions `scipy.special` has the same numbers.
"""
