"""The decision: from one observation of a job to what is done about it. Pure, total, idempotent.

`core.reconcile` is the door. Its steps are tried in order and the first that has a verdict wins: `intake` before
there is a child, then `endings` (success, failures for good, deadlines), `revision`, `holding`, `suspension`,
`restarts`, `placement`, `hangs`, `following`.

Executing the actions and asking again gives none; from any prefix of them it converges. What exists only in the
status is written there before the object it came from is deleted.
"""
