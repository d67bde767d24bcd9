"""JSON web tokens: signed by a key of the issuer's, for us, not over yet.

Laws: the algorithm is one of the allowed ones and fits the kind of key, whatever the token says;
keys come from the configured place alone; no message holds a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jwt
import orjson
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from milvus_cdc.errors import UserError
from milvus_cdc.trust.caller import Caller, Role
from milvus_cdc.trust.refusal import Refusal, unauthenticated
from milvus_cdc.trust.settings import JwtSettings

log = structlog.get_logger(__name__)

NAME_CHARACTERS_MAX = 256
RSA_BITS_MIN = 2048
_TRIED_MAX = 8
"""Keys, for a token that does not name its own."""
_FIT = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", "")),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", ""),
}


@dataclass(frozen=True, slots=True)
class Key:
    """Of a JWKS."""

    id: str
    kind: str
    curve: str
    algorithm: str
    """The only one it is for; empty when the set does not say."""
    key: Any

    def fits(self, algorithm: str) -> bool:
        kind, curve = _FIT[algorithm]
        return self.kind == kind and curve in ("", self.curve) and self.algorithm in ("", algorithm)


def parse_keys(content: bytes, field: str) -> tuple[Key, ...]:
    """Public keys for signatures; others are left out with a warning. Raises UserError
    JWKS_INVALID when none is left.
    """
    try:
        body: Any = orjson.loads(content)
        entries = list(body["keys"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("JWKS_INVALID", f"{field}: is no JSON web key set", field=field) from error
    keys = [key for key in map(_parse_key, entries) if key is not None]
    if not keys:
        raise UserError(
            "JWKS_INVALID", f"{field}: holds no public key that tokens are signed with", field=field
        )
    return tuple(keys)


def _parse_key(entry: Any) -> Key | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    if entry.get("kty") not in ("RSA", "EC", "OKP"):
        log.warning("a key for tokens is left out: no public key", kid=str(entry.get("kid", "")))
        return None
    try:
        parsed = jwt.PyJWK({k: v for k, v in entry.items() if k != "d"})
    except (jwt.PyJWTError, ValueError, KeyError, TypeError) as error:
        log.warning("a key for tokens is left out", kid=str(entry.get("kid", "")), error=str(error))
        return None
    if isinstance(parsed.key, RSAPublicKey) and parsed.key.key_size < RSA_BITS_MIN:
        log.warning("a key for tokens is left out: too short", kid=str(entry.get("kid", "")))
        return None
    return Key(
        str(entry.get("kid", "")),
        entry["kty"],
        str(entry.get("crv", "")),
        str(entry.get("alg", "")),
        parsed.key,
    )


class WebTokens:
    """Checks tokens against keys that are given with each call."""

    def __init__(self, settings: JwtSettings) -> None:
        self._settings = settings
        self._subjects = {grant.name: grant for grant in settings.subjects}

    def key_known(self, token: str, keys: tuple[Key, ...]) -> bool:
        """False: perhaps newer keys know it. Raises Refusal as `caller` does."""
        algorithm, kid = self._header(token)
        return any(key.fits(algorithm) and kid in ("", key.id) for key in keys)

    def caller(self, token: str, keys: tuple[Key, ...]) -> Caller:
        """Raises Refusal UNAUTHENTICATED, saying what is wrong."""
        algorithm, kid = self._header(token)
        fitting = [key for key in keys if key.fits(algorithm) and kid in ("", key.id)]
        refusal = unauthenticated(
            "TOKEN_KEY_UNKNOWN", "The token is signed with a key that the issuer does not show."
        )
        for key in fitting[:_TRIED_MAX]:
            try:
                return self._said(self._claims(token, algorithm, key))
            except jwt.InvalidSignatureError:
                refusal = unauthenticated("TOKEN_INVALID", "The token's signature is wrong.")
        raise refusal

    def _header(self, token: str) -> tuple[str, str]:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise unauthenticated(
                "TOKEN_UNKNOWN", "The token is none that is known here, and no web token."
            ) from None
        algorithm = header.get("alg")
        if algorithm not in self._settings.algorithms:
            raise unauthenticated(
                "TOKEN_ALGORITHM",
                f"The token is signed with an algorithm that is not allowed; allowed are "
                f"{', '.join(self._settings.algorithms)}.",
            )
        return str(algorithm), str(header.get("kid", ""))

    def _claims(self, token: str, algorithm: str, key: Key) -> dict[str, Any]:
        settings = self._settings
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key=key.key,
                algorithms=[algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.InvalidSignatureError:
            raise
        except jwt.ExpiredSignatureError:
            raise unauthenticated("TOKEN_EXPIRED", "The token is over: get a new one.") from None
        except jwt.ImmatureSignatureError:
            raise unauthenticated(
                "TOKEN_TOO_EARLY", "The token is not valid yet: compare the clocks."
            ) from None
        except jwt.InvalidAudienceError:
            raise unauthenticated(
                "TOKEN_AUDIENCE", f"The token is not for {settings.audience!r}."
            ) from None
        except jwt.InvalidIssuerError:
            raise unauthenticated(
                "TOKEN_ISSUER", f"The token is not of {settings.issuer!r}."
            ) from None
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            missing = getattr(error, "claim", "")
            raise unauthenticated(
                "TOKEN_INVALID",
                f"The token lacks the claim {missing}." if missing else "The token is malformed.",
            ) from None
        return claims

    def _said(self, claims: dict[str, Any]) -> Caller:
        settings = self._settings
        name = claims.get(settings.principal_claim)
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
            raise unauthenticated(
                "TOKEN_INVALID", f"The token does not say who it is ({settings.principal_claim})."
            )
        given = claims.get(settings.roles_claim, ())
        words = given.split() if isinstance(given, str) else given
        words = words if isinstance(words, (list, tuple)) else ()
        roles = frozenset(Role(word) for word in words if _is_role(word))
        bound = claims.get(settings.replicator_claim, "") if settings.replicator_claim else ""
        if not isinstance(bound, str):
            raise unauthenticated(
                "TOKEN_INVALID", f"The token's claim {settings.replicator_claim} is no name."
            )
        grant = self._subjects.get(name)
        if grant is not None:
            roles |= frozenset(grant.roles)
            bound = grant.replicator or bound
        until = float(claims["exp"]) + settings.leeway_seconds
        return Caller(name, "jwt", roles, bound, until)


def _is_role(word: object) -> bool:
    return isinstance(word, str) and word in set(Role)


def unavailable() -> Refusal:
    return Refusal(
        "UNAVAILABLE",
        "JWKS_UNAVAILABLE",
        "The keys that tokens are checked with could not be read yet; try again in a moment.",
    )
