"""A thousand trainers that report: rank 0 of every running job, over a connection and with a token of its own.

A process of its own (`python -m benchmarks.operator_reports`), so that its work is not the benchmark's. The tokens are
real and bound to the jobs' pods; the reports are what the trainer's reporter sends while it trains.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks import operator_objects as objects
from benchmarks.operator_access import access
from benchmarks.operator_objects import Obj
from devcluster.api import Client
from posttrain_api import names
from posttrain_api.records import Report

_STEPS = 100_000


@dataclass
class Tally:
    """Answers by code (0: none), and the seconds until each."""

    codes: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


async def token_of(client: Client, pod: Obj) -> str:
    """A token that the pod would be given: our audience, bound to it."""
    meta = pod["metadata"]
    bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
    spec = {"audiences": [names.STATUS_AUDIENCE], "expirationSeconds": 3600, "boundObjectRef": bound}
    path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/default/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    return str((await client.post(path, body))["status"]["token"])


class Trainer:
    """Rank 0 of one job."""

    def __init__(self, job: str, namespace: str, token: str, url: str) -> None:
        self._url = url + names.STATUS_PATH.format(namespace=namespace, name=job)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    async def train(self, every: float, until: float, trust: ssl.SSLContext, tally: Tally) -> None:
        """Reports until that moment (time.monotonic); the first time anywhere within the first interval."""
        await asyncio.sleep(random.uniform(0, every))
        step = random.randrange(1, _STEPS // 2)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1, ssl=trust)) as session:
            while (begun := time.monotonic()) < until:
                code = await self._report(session, step)
                tally.codes[code] += 1
                tally.seconds.append(time.monotonic() - begun)
                step += 10
                await asyncio.sleep(max(0.0, every - (time.monotonic() - begun)))

    async def _report(self, session: aiohttp.ClientSession, step: int) -> int:
        metrics = {"loss": 2.0 + random.random(), "grad_norm": 0.5, "learning_rate": 1e-4, "tokens_per_second": 9000.0}
        moment = objects.now()
        report = Report(phase="Training", step=step, total_steps=_STEPS, metrics=metrics, last_advance_time=moment)
        try:
            async with session.post(self._url, data=report.to_json(), headers=self._headers) as answer:
                await answer.read()
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return 0


async def _main(options: argparse.Namespace) -> None:
    client = access(options.state)
    pods = (await client.get(objects.PODS.format(options.namespace), **objects.MANAGED))["items"]
    masters = [pod for pod in pods if pod["metadata"]["name"].endswith("-master-0")][: options.jobs]
    limit = asyncio.Semaphore(16)

    async def trainer(pod: Obj) -> Trainer:
        async with limit:
            token = await token_of(client, pod)
        job = pod["metadata"]["labels"][names.LABEL_JOB_NAME]
        return Trainer(job, options.namespace, token, options.url)

    trainers = await asyncio.gather(*(trainer(pod) for pod in masters))
    await client.close()
    # What is measured is the server; that its certificate is right, the tests of the status server show.
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    tally, end = Tally(), time.monotonic() + options.seconds
    print("begun", flush=True)
    await asyncio.gather(*(each.train(options.every, end, trust, tally) for each in trainers))
    print(json.dumps({"codes": tally.codes, "seconds": sorted(tally.seconds)}), flush=True)


def main() -> None:
    """Prints `begun` once every trainer has its token, and one JSON object at the end."""
    parser = argparse.ArgumentParser("python -m benchmarks.operator_reports", description=__doc__)
    parser.add_argument("state", type=Path, help="state folder of the devcluster")
    parser.add_argument("namespace", help="of the running jobs")
    parser.add_argument("url", help="of the status server")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between two reports of one job")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
