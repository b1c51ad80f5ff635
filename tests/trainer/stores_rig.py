"""Runs in .build/stores: an S3 server and a GCS server on loopback, both with doors that check credentials.

`python stores_rig.py FOLDER CERTIFICATE` uploads FOLDER/<bucket>/<key> to both, with an empty object `x/` for each
folder (as consoles make them), prints one JSON line with addresses and credentials, and serves until standard input
closes; the same over TLS, with a new certificate in the file CERTIFICATE. S3 is moto's server, which checks signatures
and policies; Google's emulator checks nothing, so a door before it checks the signature of the token that a service
account's key makes. The bucket `public` is open to everybody.

`/_log` of either: the requests so far, one a line. `/_fail/TEXT`: answer 500 where the path contains TEXT
(`/_fail/`: no more).
"""

from __future__ import annotations

import base64
import datetime as dt
import http.client
import ipaddress
import json
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from gcp_storage_emulator.server import create_server
from moto import settings
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

IDENTITY = "token-of-the-pods-identity"
ACCOUNT = "arn:aws:iam::123456789012"


class Door:
    """Before a store: logs, fails on demand, and lets through who may. `may` says so, `into` asks the store."""

    def __init__(self, may: Callable[[Request], bool], into: Callable[..., Any]) -> None:
        self.may, self.into = may, into
        self.log: list[str] = []
        self.failing = ""

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        answer: Callable[..., Any] = Response("no", 403)
        if request.path.startswith("/_"):
            answer = self.control(request.path)
        elif self.failing and self.failing in environ["RAW_URI"]:
            answer = Response("out of order", 500)
        elif self.may(request):
            answer = self.into
        if not request.path.startswith("/_"):
            self.log.append(f"{request.method} {environ['RAW_URI']}")
        return answer(environ, start_response)

    def control(self, path: str) -> Response:
        if path.startswith("/_fail/"):
            self.failing = path.removeprefix("/_fail/")
        return Response("\n".join(self.log))


class Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Silence."""


def serve(app: Any, certificate: Path | None = None) -> str:
    """Starts it in a thread; its address."""
    tls = (str(certificate), str(certificate)) if certificate else None
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet, ssl_context=tls)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"


def certificate(file: Path) -> Path:
    """Key and self-signed certificate for loopback, in one file."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stores")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(pem(key) + made.public_bytes(serialization.Encoding.PEM))
    return file


def pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def objects(seed: Path) -> list[tuple[str, str, bytes]]:
    """(bucket, key, content), folders as empty objects."""
    found = []
    for path in sorted(seed.rglob("*")):
        bucket, *rest = path.relative_to(seed).parts
        if rest:
            key = "/".join(rest)
            found.append((bucket, key, path.read_bytes()) if path.is_file() else (bucket, key + "/", b""))
    return found


def s3(seed: Path, ca: Path) -> dict[str, Any]:
    """moto, seeded, then with its checks on."""
    app = DomainDispatcherApplication(create_backend_app)
    alone = threading.Lock()

    def into(environ: Any, start_response: Any) -> Any:
        with alone:  # moto's switch is one for all requests
            settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf") if "HTTP_AUTHORIZATION" not in environ else 0
            return app(environ, start_response)

    door = Door(lambda _: True, app)
    url = serve(door)
    client = {
        name: boto3.client(
            name, endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
        )
        for name in ("s3", "iam", "sts")
    }
    for bucket in sorted(path.name for path in seed.iterdir()):
        client["s3"].create_bucket(Bucket=bucket)
    for bucket, key, content in objects(seed):
        acl = "public-read" if bucket == "public" else "private"
        client["s3"].put_object(Bucket=bucket, Key=key, Body=content, ACL=acl)
    users = {name: user(client["iam"], name, actions) for name, actions in (("all", "s3:*"), ("blind", "s3:GetObject"))}
    users["session"] = session(client)
    door.may = lambda request: "Authorization" in request.headers or request.path.startswith("/public")
    door.into = into
    door.log.clear()
    return {"url": url, "tls": serve(door, ca), "users": users}


def policy(actions: str) -> str:
    allow = {"Effect": "Allow", "Action": actions, "Resource": ["arn:aws:s3:::data", "arn:aws:s3:::data/*"]}
    return json.dumps({"Version": "2012-10-17", "Statement": [allow]})


def user(iam: Any, name: str, actions: str) -> dict[str, str]:
    """Keys of a new user who may do this with the bucket `data`."""
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy(actions))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def session(client: dict[str, Any]) -> dict[str, str]:
    """Keys of a role's session."""
    client["iam"].create_role(RoleName="role", AssumeRolePolicyDocument="{}")
    client["iam"].put_role_policy(RoleName="role", PolicyName="p", PolicyDocument=policy("s3:*"))
    made = client["sts"].assume_role(RoleArn=f"{ACCOUNT}:role/role", RoleSessionName="trainer")["Credentials"]
    return {
        "AWS_ACCESS_KEY_ID": made["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"],
        "AWS_SESSION_TOKEN": made["SessionToken"],
    }


def gs(seed: Path, ca: Path) -> dict[str, Any]:
    """Google's emulator behind a door that knows one service account, and a metadata server."""
    emulator = create_server("127.0.0.1", 0, in_memory=True)
    emulator._api.daemon = True
    emulator.start()
    inner = emulator._api._httpd.server_address[1]
    for bucket in sorted(path.name for path in seed.iterdir()):
        ask(inner, "POST", "/storage/v1/b?project=p", json.dumps({"name": bucket}).encode(), "application/json")
    for bucket, key, content in objects(seed):
        place = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}"
        # The emulator takes no empty upload of this kind: its folder objects hold a byte.
        ask(inner, "POST", place, content or b"-", "application/octet-stream")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def into(environ: Any, start_response: Any) -> Any:
        data = Request(environ).get_data()
        status, kind, body = ask(
            inner, environ["REQUEST_METHOD"], environ["RAW_URI"], data, environ.get("CONTENT_TYPE")
        )
        return Response(body, status, content_type=kind)(environ, start_response)

    door = Door(lambda request: "/b/public" in request.path or known(request, key), into)
    url = serve(door)
    credentials = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "kid",
        "private_key": pem(key).decode(),
        "client_email": "trainer@p.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{url}/token",
    }
    return {
        "url": url,
        "tls": serve(door, ca),
        "credentials": credentials,
        "metadata": serve(metadata).removeprefix("http://"),
    }


def ask(port: int, method: str, path: str, data: bytes, kind: str | None) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, data, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    return answer.status, answer.headers.get("Content-Type", ""), answer.read()


def known(request: Request, key: rsa.RSAPrivateKey) -> bool:
    """A token that this key signed, or the one of the pod's identity."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token == IDENTITY or token.count(".") != 2:
        return token == IDENTITY
    signed, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    try:
        key.public_key().verify(raw, signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def metadata(environ: Any, start_response: Any) -> Any:
    """The token endpoint that pods on Google's machines have."""
    if environ["PATH_INFO"].endswith("/token"):
        value = {"access_token": IDENTITY, "expires_in": 3600, "token_type": "Bearer"}
    else:
        value = {"email": "node@p.iam.gserviceaccount.com", "scopes": ["x"]}
    return Response(json.dumps(value), content_type="application/json")(environ, start_response)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    authority = certificate(Path(sys.argv[2]))
    print(json.dumps({"s3": s3(folder, authority), "gs": gs(folder, authority), "ca": sys.argv[2]}), flush=True)
    sys.stdin.read()
