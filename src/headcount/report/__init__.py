"""What a study's tables say, on one page: a file per question draws its figures and writes its sentences and tables.

`headline` says the answer, `cautions` what stands against it; `words` and `style` say how numbers and figures look,
`section` what a page is made of; what two questions share lies below them (`matrix`, `sets`, `curve_parts`,
`induction_heads`); `page` puts all together. Only tables of `analysis`, and `stats`, come in; only this room draws; no
question imports another.
"""
