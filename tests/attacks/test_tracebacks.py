"""A tool such as Sentry stores the local variables of tracebacks (attack A26).

An exception is raised in each function of tiger_db that has a plain secret in a local variable.
Afterwards, no frame of tiger_db in the traceback may have one.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest

from tests.support import factories
from tests.support.encryption_keys import secret_account
from tests.support.private_keys import der
from tests.support.tiger_tokens import tiger_token
from tests.support.tracebacks import Injection, leaks
from tiger_db import (
    APIKey,
    APIKeyScope,
    Database,
    KeyVerifier,
    PrivateKeyFormat,
    RefreshTrigger,
    Settings,
    TigerAccount,
    TokenStatus,
    crud,
    encryption_key_rotation,
)
from tiger_db.connections import connect
from tiger_db.connections.passfile import find_password
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing
from tiger_db.errors import TigerDBError
from tiger_db.keys_in_force import API_KEY_PEPPERS, AUDIT_SIGNING_KEY, ENCRYPTION_KEYS, configured
from tiger_db.tiger import client_config, export_account, import_account, parse_private_key

PASSWORD, SEED = "plain-password-1", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
KEY, TOKEN = der(PrivateKeyFormat.PK8), tiger_token()
TEXTS = {
    name: f"plain-{name}-of-nobody"
    for name in ("tiger_id", "secret_key", "access_token", "refresh_token")
}
VALUES: dict[str, Any] = {**TEXTS, "private_key": KEY}
FIELDS = {"account_name": "a", **VALUES}
CONFIG = f"""
tiger_id={TEXTS["tiger_id"]}
account=51230321
private_key_pk8={KEY}
secret_key={TEXTS["secret_key"]}
token={TOKEN}
"""
Scenario = Callable[["Scene"], Awaitable[object]]


class Scene:
    """A database with an account, a claimed refresh and an API key, and a session for changes."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.session: AsyncSession
        self.account: TigerAccount
        self.claim: TokenStatus
        self.key: APIKey
        self.raw_key: str

    async def prepare(self) -> None:
        async with self.database.session() as session:
            self.account = await secret_account(session, **VALUES)
            self.key, self.raw_key = await factories.api_key(session)
            await crud.token_status.create_refresh_operation(
                session, tiger_account_id=self.account.id, trigger=RefreshTrigger.MANUAL
            )
        async with self.database.session() as session:
            (self.claim,) = await crud.token_status.claim_due(session, worker="w")
        (self.folder / "tiger_openapi_config.properties").write_text(CONFIG)
        (self.folder / "seed").write_text(SEED)
        (self.folder / "passfile").write_text(f"*:*:*:*:{PASSWORD}\n")
        (self.folder / "passfile").chmod(0o600)

    async def run(self, scenario: Scenario) -> None:
        async with self.database.session() as self.session:
            await scenario(self)
            await self.session.rollback()


async def settings_of_parts(scene: Scene) -> None:
    keys = f"test:{SEED}"
    settings = Settings(
        db_host="localhost",
        db_password=PASSWORD,
        encryption_keys=keys,
        api_key_peppers=keys,
        audit_signing_key_file=scene.folder / "seed",
    )
    settings.connect_args()
    configured(settings, ENCRYPTION_KEYS)
    configured(settings, API_KEY_PEPPERS)
    configured(settings, AUDIT_SIGNING_KEY)


async def settings_of_url(_: Scene) -> None:
    url = f"postgresql://u:{PASSWORD}@localhost/d"
    settings = Settings(database_url=url, db_direct_host="h")
    settings.connect_args()
    settings.without_pooler()


async def connecting(_: Scene) -> None:
    await connect(Settings(db_host="localhost", db_port=1, db_password=PASSWORD))


async def verifying(scene: Scene) -> None:
    async with KeyVerifier(scene.database, memory=True) as verifier:
        for raw_key in (scene.raw_key, scene.raw_key, scene.raw_key[:-1]):
            with suppress(TigerDBError):
                await verifier.authorize(raw_key)


async def wrong_key(scene: Scene) -> None:
    await crud.api_keys.verify_api_key(scene.session, scene.raw_key[:-2])
    await crud.api_keys.authorize_api_key(
        scene.session, scene.raw_key, scopes=[APIKeyScope.TRADE_ADMIN]
    )


async def assigning(scene: Scene) -> None:
    account = await scene.session.get_one(TigerAccount, scene.account.id)
    account.secret_key = "plain-secret_key-of-nobody"
    account.sqlmodel_update({"access_token": TOKEN})
    await scene.session.flush()


async def rotating(scene: Scene) -> None:
    keys = KeyRing({"new": bytes(32), "test": bytes(range(32))})
    async with Database(scene.database.settings, key_provider=keys) as database:
        await encryption_key_rotation.rotate(database, dry_run=True)


SCENARIOS: dict[str, Scenario] = {
    "a new account": lambda s: secret_account(s.session, **VALUES),
    "an invalid account": lambda s: secret_account(s.session, **VALUES, account_type="x"),
    "a mask": lambda s: secret_account(s.session, **VALUES | {"secret_key": "*" * 10}),
    "validation": lambda _: _async(TigerAccount.model_validate, {**FIELDS, "account_number": "x"}),
    "JSON": lambda _: _async(
        TigerAccount.model_validate_json, f'{{"tiger_id": "{TEXTS["tiger_id"]}"}}'
    ),
    "update": lambda s: crud.accounts.update(
        s.session, s.account.id, **VALUES, server_url="https://b"
    ),
    "an invalid update": lambda s: crud.accounts.update(s.session, s.account.id, **VALUES, tags=3),  # type: ignore[arg-type]
    "a changed URL": lambda s: crud.accounts.update(
        s.session, s.account.id, server_url="https://b"
    ),
    "tokens": lambda s: crud.accounts.update_tokens(
        s.session, s.account.id, access_token=TOKEN, refresh_token=TEXTS["refresh_token"]
    ),
    "an argument of a wrong type": lambda s: crud.accounts.update_tokens(
        s.session,
        cast("UUID", "x"),
        access_token=TOKEN,
    ),
    "complete": lambda s: crud.token_status.complete(
        s.session, s.claim, access_token=TOKEN, refresh_token=TEXTS["refresh_token"]
    ),
    "fail": lambda s: crud.token_status.fail(s.session, s.claim, message="x"),
    "an error": lambda s: crud.accounts.record_error(s.session, s.account.id, message="x"),
    "reading": lambda s: _async(s.account.private_key.get_secret_value),
    "search": lambda s: crud.accounts.list_by_tiger_id(s.session, TEXTS["tiger_id"]),
    "authorization": lambda s: crud.api_keys.authorize_api_key(s.session, s.raw_key),
    "a wrong key": wrong_key,
    "KeyVerifier": verifying,
    "settings": settings_of_parts,
    "DATABASE_URL": settings_of_url,
    "a malformed key": lambda _: _async(KeyRing.parse, f"k1:{SEED},k2:{SEED}x"),
    "passfile": lambda s: _async(find_password, s.folder / "passfile", "h", 1, "d", "u"),
    "connect": connecting,
    "Tiger's SDK": lambda s: _async(client_config, s.account),
    "a private key": lambda _: _async(parse_private_key, KEY),
    "a damaged private key": lambda _: _async(parse_private_key, f"{KEY}x"),
    "import": lambda s: import_account(s.session, s.folder / "tiger_openapi_config.properties"),
    "export": lambda s: export_account(s.database, s.account.id, folder=s.folder / "out"),
    "assignment": assigning,
    "rotation": rotating,
}


async def _async(function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
async def test_no_frame_of_ours_shows_a_plain_secret(
    clone: Database, tmp_path: Path, name: str
) -> None:
    scene = Scene(clone, tmp_path)
    await scene.prepare()
    secrets = [*VALUES.values(), TOKEN, PASSWORD, SEED.rstrip("="), scene.raw_key[22:]]
    injection, found = Injection(secrets), list[str]()
    while True:
        error = await injection.run(lambda: scene.run(SCENARIOS[name]))
        if error is not None:
            found += leaks(error, secrets)
        if not injection.injected:
            break
    assert injection.done
    assert sorted({*found}) == []
