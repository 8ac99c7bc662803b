"""From a mask to a model that is really smaller: the room of what is removed for good.

Here live `layouts` (which rows and columns of a family's tensors belong to a head or an FFN), `narrow` (a model without
them, proved equal to the masked one block by block), `save` (the formats it is written in), `certificate` (what was
removed, what it cost, what was proved) and `confirm` (full against removed, on documents that chose nothing). What
comes in is a loaded model and a mask; which mask, a study says (`headcount.analysis.removal`).
"""
