"""From a verdict to the status that is written. Pure.

The whole status that we own is built anew on each pass from the last one and the verdict: with server-side apply a
field left out is a field deleted. `status.progress` belongs to the status server and is never touched.
"""
