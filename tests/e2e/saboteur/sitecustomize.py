"""Python's own start-up hook, put on the pods' PYTHONPATH by the fault tests: does to one process of a job what no kill
can do to it from outside: ends it with a code of its own, breaks its weights, tears the file that it reads rows from.

What to do stands in `<this folder>/<job>.json`, written by the test while the job runs (see fault_kit). SABOTAGE_PACE
is a pause of so many seconds before each step, so that a tiny job can be hit in the middle; it changes no number.
"""

import errno
import importlib.util
import json
import os
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BEGUN = time.time()
ME = f"rank:{os.environ.get('RANK', '')}" if "posttrain_trainer.worker" in sys.orig_argv else ""
if ME == "" and sys.orig_argv[-1] == "posttrain_trainer":
    ME = "launcher:" + os.environ.get("POSTTRAIN_POD_NAME", "").removeprefix(os.environ.get("SABOTAGE", "") + "-")


def order():
    """What this process is to do now, None where it is nothing. An order is for those who ran when it was written,
    unless it is for all attempts."""
    path = os.path.join(HERE, os.environ["SABOTAGE"] + ".json")
    try:
        with open(path) as handle:
            found = json.load(handle)
        if found["who"] == ME and (found.get("always") or os.stat(path).st_mtime > BEGUN):
            return found
    except (OSError, ValueError):  # none yet, or half written
        pass
    return None


def watch():
    while True:
        found = order()
        if found and found["do"] == "exit":
            os._exit(found["code"])
        time.sleep(0.05)


def paced(train):
    done = []

    def _train(loop):
        time.sleep(float(os.environ.get("SABOTAGE_PACE", "0")))
        found = None if done else order()
        if found and loop.state.step >= found.get("step", 0):
            if found["do"] == "tear":
                TORN.append(True)
            if found["do"] == "nan":
                done.append(True)
                trained = [p for p in loop._parts.engine.module.parameters() if p.requires_grad]
                trained[0].data.view(-1)[0] = float("nan")
        return train(loop)

    return _train


def torn(read):
    def _read(flat, start, stop):
        if TORN:
            raise OSError(errno.EIO, "Input/output error", "tokens.bin")
        return read(flat, start, stop)

    return _read


def wrap_loop(module):
    module.Loop._train = paced(module.Loop._train)


def wrap_rows(module):
    module._Flat.read = torn(module._Flat.read)


TORN = []
WRAPPED = {"posttrain_trainer.loop": wrap_loop, "posttrain_trainer.tokenset": wrap_rows}


class Finder:
    """Wraps a module's function as soon as the module is there."""

    def find_spec(self, name, path, target=None):
        wrap = WRAPPED.pop(name, None)
        if wrap is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            wrap(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("SABOTAGE") and ME:
    sys.meta_path.insert(0, Finder())
    threading.Thread(target=watch, daemon=True).start()
