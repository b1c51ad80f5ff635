"""From files of rows to token sets: readers → rows → tokenise → report. Used by `prepare` alone, before any rank
starts.
"""
