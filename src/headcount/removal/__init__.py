"""From a mask to a model that is really smaller: the room of what is removed for good.

`remove` is the way in. `layouts` knows what belongs to a head or an FFN, `slicing` makes smaller blocks and compares
them (`in_float32`), `save`, `shards` and `stock` write folders, `cost` and `speed` say what is saved, `confirm`,
`perplexity`, `writing` and `comparison` what is lost, `certificate` and `card` keep it. What comes in is a loaded model
and a mask; which mask, a study says (`headcount.analysis.removal`).
"""
