"""A study: what was asked, the jobs that answer it, and the folder that keeps what was measured.

Here live `spec` (options), `masksets` and `jobs` (what is measured, typed), `plan` (which jobs, at what cost),
`prepare` (everything that must be known first), `worker` (one job done), `runner` (all of them, saved) by `executors`
(this process, or several by Ray: `queue`, `member`, `cluster`), and of the folder `ledger` (with `seal`, `plausible`),
`codec`, `described`, `folder`, `shown` and `check`. Measure and engine do the computing, and only `prepare`, `worker`,
`runner`, `executors` and `member` call them: the rest is read without torch.
"""
