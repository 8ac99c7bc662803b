"""Model: a transformers model as heads and FFNs.

Here live the door (load; source, checkpoint, gguf, gguf_proof and adapters for files, wrappers for a model in memory),
what identifies a model (fingerprint, earlier_fingerprint), where its heads, FFNs and norms are and the proof of that
(anatomy, norms, contracts), how they are switched off and watched (hooks, attention), where a pass gives no numbers
(finite, damage), and what heads read and write (circuits); devices puts arrays where a model is.
What is true of a model without any prompt may come in. Batches, masks' order, tasks and files of results may not.
"""
