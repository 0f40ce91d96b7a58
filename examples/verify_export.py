"""Verify an export of the audit trail without tiger_db, as docs/audit-format.md specifies it.

    python verify_export.py trail.jsonl PUBLIC_KEY [checkpoint.json]

PUBLIC_KEY is the field `key` of the first seal (32 bytes in base64), from a source that you trust.
"""

import base64
import json
import sys
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def merkle_root(leaves: list[bytes]) -> bytes:
    if len(leaves) < 2:  # as in RFC 6962, section 2.1
        return sha256(b"\0" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1  # the largest power of 2 below the number
    return sha256(b"\1" + merkle_root(leaves[:half]) + merkle_root(leaves[half:])).digest()


def check(is_valid: object, message: str) -> None:
    if not is_valid:
        sys.exit(message)


def verify(export: Path, key: str, checkpoint: Path | None) -> str:
    number, previous, upto, origin, events, unsealed = 0, "0" * 64, 0, None, 0, 0
    missing: dict[int, bytes] = {}  # digests of sealed events that did not appear yet
    expected = json.loads(checkpoint.read_bytes())["statement"] if checkpoint else None
    for line in export.read_bytes().splitlines():
        if not line.startswith(b'{"seal":'):
            check(line.startswith(b'{"position":'), f"neither a seal nor an event: {line[:40]!r}")
            head, _, rest = line.partition(b",")
            position, content = int(head.removeprefix(b'{"position":')), b"{" + rest
            valid = position > upto or missing.pop(position, None) == sha256(content).digest()
            check(valid, f"the event at position {position} was changed or inserted")
            events, unsealed = events + 1, unsealed + (position > upto)
            continue
        seal, last = json.loads(line)["seal"], number
        text, digests = seal["statement"], base64.b64decode(seal["digests"])
        payload = json.loads(text)
        number = payload["number"] if "lost" in payload else last + 1  # a restore lost seals
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
        public.verify(base64.b64decode(seal["signature"]), text.encode())  # or InvalidSignature
        links = (payload["number"], payload["previous"], payload["after"], number > last, unsealed)
        check(links == (number, previous, upto, True, 0), f"seal {number} breaks the chain")
        check(origin in (None, payload.get("origin")), f"seal {number} is of another trail")
        places = [at for first, last in payload["positions"] for at in range(first, last + 1)]
        if "retired" in payload:
            gone = [missing.pop(at, None) for at in places]  # archived events may be in the export
            check("archive" in payload or all(gone), f"seal {number}: events reappeared")
        else:
            sealed = {at: digests[32 * i : 32 * i + 32] for i, at in enumerate(places)}
            leaves = [at.to_bytes(8, "big", signed=True) + d for at, d in sealed.items()]
            check(merkle_root(leaves).hex() == payload["root"], f"seal {number}: wrong Merkle root")
            missing |= sealed
        previous, upto = sha256(text.encode()).hexdigest(), payload["upto"]
        if expected and last < (at := json.loads(expected)["number"]) <= number:
            valid = sha256(expected.encode()).hexdigest() in (previous, payload.get("lost"))
            check(valid or at < number - 1, f"seal {at} differs from the checkpoint")
            expected = None
        origin, key = payload.get("origin"), payload.get("next_key", key)
    check(not missing, f"events are missing at the positions {[*missing][:9]}")
    check(expected is None and number, "seals are missing")
    return f"sound: {number} seals, {events} events, {unsealed} of them not sealed yet"


if __name__ == "__main__":
    print(verify(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if sys.argv[3:] else None))
