#!/usr/bin/env python3
"""Gives tokens to docker-registry's clients, as https://distribution.github.io/distribution/spec/auth/ says.

    GET  /token/SECONDS[/ANNOUNCED]   anonymous, or basic authentication
    POST /token/SECONDS[/ANNOUNCED]   grant_type=password or refresh_token

A token is good for SECONDS. The answer announces ANNOUNCED seconds instead, or nothing with `none`: so a client can be
made to meet a refused token. A refresh token is good for one use; its answer has the next one. One that is used again ends
the login that it came from.

Anonymous clients may pull below one namespace only.
"""

import argparse
import base64
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from urllib.parse import parse_qs, urlsplit

from unix_http import Handler, Server

# docker-registry accepts a token for so long after its end (registry/auth/token, `Leeway`).
REGISTRY_LEEWAY_S = 60
SECONDS_MAX = 3600
REFRESH_TOKENS_MAX = 1000
BODY_MAX = 64 << 10
SCOPE = re.compile(r"(?P<type>[a-z]+)(?:\([a-z]+\))?:(?P<name>[^:]+(?::[0-9]+/[^:]+)?):(?P<actions>[a-z,*]*)")
PATH = re.compile(r"/token/(?P<seconds>[0-9]{1,4})(?:/(?P<announced>[0-9]{1,4}|none))?")


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


class Refused(Exception):
    """What a client is told instead of a token."""

    def __init__(self, status, code):
        super().__init__(code)
        self.status = status
        self.code = code


class Signer:
    """Signs JSON Web Tokens (RFC 7519) with RS256, the certificate in `x5c`."""

    def __init__(self, key, certificate):
        self.key = key
        pem = open(certificate, encoding="ascii").read()
        der = "".join(pem.split("-----")[2].split())
        self.header = base64url(json.dumps({"typ": "JWT", "alg": "RS256", "x5c": [der]}).encode())

    def sign(self, claims):
        signed = self.header + b"." + base64url(json.dumps(claims).encode())
        command = ["openssl", "dgst", "-sha256", "-sign", self.key]
        signature = subprocess.run(command, input=signed, stdout=subprocess.PIPE, check=True).stdout
        return (signed + b"." + base64url(signature)).decode()


class Accounts:
    """One user with a password, and the refresh tokens given to it."""

    def __init__(self, user, password):
        self.login = f"{user}:{password}"
        self.user = user
        self.lock = threading.Lock()
        # Refresh token: the login it belongs to, and whether it was used.
        self.refresh_tokens = OrderedDict()

    def check(self, login):
        if not secrets.compare_digest(login.encode(), self.login.encode()):
            raise Refused(401, "invalid_client")
        return self.user

    def new_refresh_token(self, login=None):
        token = secrets.token_urlsafe(24)
        with self.lock:
            self.refresh_tokens[token] = [login or secrets.token_hex(8), False]
            while len(self.refresh_tokens) > REFRESH_TOKENS_MAX:
                self.refresh_tokens.popitem(last=False)
        return token

    def rotate(self, token):
        """The next refresh token of the same login."""
        with self.lock:
            login, used = self.refresh_tokens.get(token, (None, True))
            if used:
                if login:
                    for other in [t for t, known in self.refresh_tokens.items() if known[0] == login]:
                        del self.refresh_tokens[other]
                raise Refused(400, "invalid_grant")
            self.refresh_tokens[token][1] = True
        return self.new_refresh_token(login)


class TokenHandler(Handler):
    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        self.respond(lambda: self.get(query))

    def do_POST(self):
        self.respond(self.post)

    def respond(self, grant):
        path = PATH.fullmatch(urlsplit(self.path).path)
        try:
            if not path or int(path["seconds"]) > SECONDS_MAX:
                raise Refused(404, "not_found")
            user, scopes, refresh_token = grant()
            answer = self.token(path, user, scopes)
        except Refused as refused:
            body = {"error": refused.code, "errors": [{"code": "UNAUTHORIZED", "message": refused.code}]}
            self.answer(refused.status, json.dumps(body).encode(), Content_Type="application/json")
            return
        if refresh_token:
            answer["refresh_token"] = refresh_token
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json", Cache_Control="no-store")

    def get(self, query):
        scheme, _, credential = self.headers.get("Authorization", "").partition(" ")
        user = None
        if scheme:
            try:
                login = base64.b64decode(credential, validate=True).decode()
            except ValueError:
                raise Refused(400, "invalid_request") from None
            if scheme.lower() != "basic":
                raise Refused(400, "invalid_request")
            user = self.server.accounts.check(login)
        offline = query.get("offline_token") == ["true"] and user
        refresh_token = self.server.accounts.new_refresh_token() if offline else None
        return user, query.get("scope", []), refresh_token

    def post(self):
        length = int(self.headers.get("Content-Length", "0"))
        if length > BODY_MAX:
            self.close_connection = True
            raise Refused(413, "invalid_request")
        form = parse_qs(self.rfile.read(length).decode("utf-8", "replace"))
        field = lambda name: form.get(name, [""])[0]
        accounts = self.server.accounts
        if field("grant_type") == "refresh_token":
            refresh_token = accounts.rotate(field("refresh_token"))
        elif field("grant_type") == "password":
            accounts.check(f"{field('username')}:{field('password')}")
            refresh_token = accounts.new_refresh_token() if field("access_type") == "offline" else None
        else:
            raise Refused(400, "unsupported_grant_type")
        return accounts.user, field("scope").split(), refresh_token

    def token(self, path, user, scopes):
        seconds, now = int(path["seconds"]), int(time.time())
        claims = {
            "iss": self.server.issuer,
            "sub": user or "",
            "aud": self.server.service,
            "exp": now + seconds - REGISTRY_LEEWAY_S,
            "nbf": now - REGISTRY_LEEWAY_S,
            "iat": now,
            "jti": secrets.token_hex(8),
            "access": self.access(user, scopes),
        }
        token = self.server.signer.sign(claims)
        answer = {"token": token, "access_token": token}
        announced = path["announced"] or str(seconds)
        if announced != "none":
            answer["expires_in"] = int(announced)
            answer["issued_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        return answer

    def access(self, user, scopes):
        """What is granted of the scopes that were asked for (a part of them is no error)."""
        granted = []
        for scope in " ".join(scopes).split():
            asked = SCOPE.fullmatch(scope)
            if not asked:
                raise Refused(400, "invalid_scope")
            actions = asked["actions"].split(",")
            if not user:
                public = asked["type"] == "repository" and asked["name"].startswith(self.server.public)
                actions = [action for action in actions if public and action == "pull"]
            if actions:
                granted.append({"type": asked["type"], "name": asked["name"], "actions": actions})
        return granted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("socket", "key", "certificate", "issuer", "service", "user", "password"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--public", required=True, help="namespace that everyone may pull from")
    arguments = parser.parse_args()
    server = Server(arguments.socket, TokenHandler)
    server.signer = Signer(arguments.key, arguments.certificate)
    server.accounts = Accounts(arguments.user, arguments.password)
    server.issuer, server.service = arguments.issuer, arguments.service
    server.public = arguments.public + "/"
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
