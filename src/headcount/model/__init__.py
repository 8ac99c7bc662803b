"""Model: a transformers model as heads and FFNs.

Here live how a model is found and loaded (load, gguf, gguf_proof), what identifies it (fingerprint), where its heads,
FFNs and norms are and the proof of that (anatomy, norms, contracts), how they are switched off and watched (hooks,
attention), and what heads read and write (circuits); devices puts arrays where a model is.
What is true of a model without any prompt may come in. Batches, masks' order, tasks and files of results may not.
"""
