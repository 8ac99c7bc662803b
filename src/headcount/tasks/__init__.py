"""Tasks: names to documents, prompts, gold answers and metrics, which are lm-eval's own.

Here live: `catalog` (a name's definition), `load` (the door: `get_tasks`, `describe`), `task` (one task), `fewshot`
(how many documents and shots), `pool` (which shots), `local` (jsonl files), `origin` (a document's file and line),
`checks` (what is refused), `missing` (fields that a prompt needs), `answers` (that are no option), `templates` (of
prompts), `chat` (of conversations), `passages` (documents that belong together), `baseline` (one answer to all),
`fingerprint` (what identifies a task), `hub` (whether the network answers).
No other room imports lm_eval. What comes in knows of texts and options alone: nothing of models, tensors or masks.
"""
