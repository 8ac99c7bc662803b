"""Measure: a model and a task to numbers per document, head or FFN.

Here live the measurements that a study is made of: a task's metric under masks (evaluate), importance of heads and FFNs
(importance), induction scores (induction, copying), what other documents would have given (resampling), and the refusal
of results that are no numbers (finite).
A new measurement may come in; it asks tasks for prompts and the engine for log-likelihoods and gradients.
How prompts are laid out and batches run is the engine's; files, tables and figures are of the rooms above.
"""
