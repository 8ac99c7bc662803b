"""Engine: requests under masks to log-likelihoods, and to gradient scores.

Here live how prompts become tokens, trees, rows and batches (encode, pack, treemask, layout, budget), how batches run
(forward, blocks, step, sweep, gradients), what proves it (proof), and the one object that owns this for a loaded model
(engine); beside them how busy the machine is and how threads wait (neighbours, waiting).
What computes with a model's tensors may come in. Tasks, metrics, files of a study and averages over documents may not.
"""
