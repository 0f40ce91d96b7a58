"""Import of accounts from Tiger's files."""

import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from tests.support import factories
from tests.support.factories import plain
from tests.support.private_keys import FORMS, NO_PASSWORD, der, pem, short_pem
from tests.support.sdk_gateway import loaded
from tests.support.tiger_files import (
    EVERYTHING,
    NEW,
    NUMBER,
    OLD,
    OPTIONS,
    OTHER,
    PK1,
    PK8,
    REQUIRED,
    actions,
    config,
    token,
)
from tiger_db import (
    AccountStatus,
    AuditAction,
    Database,
    MarketPermission,
    PrivateKeyFormat,
    TigerLicense,
    crud,
)
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.redaction import MASK
from tiger_db.tiger import TOKEN_FILE, import_account


async def test_everything_in_the_files_is_stored(session: AsyncSession, tmp_path: Path) -> None:
    token_file = config(tmp_path, {"token": NEW}, TOKEN_FILE)
    done = await import_account(
        session, config(tmp_path, EVERYTHING), token_file=token_file, name="Main"
    )
    session.expunge_all()
    account = await crud.accounts.get_by_account_number(session, NUMBER)
    assert account is not None
    assert account.id == done.account.id
    assert (plain(account.private_key), account.private_key_format) == (PK8, "PK8")
    assert plain(account.tiger_id) == "20150001"
    assert plain(account.secret_key) == "s3cret=:#!"
    assert plain(account.access_token) == NEW
    assert account.token_expires_at == datetime(2026, 2, 16, tzinfo=UTC)
    assert account.model_dump(mode="json", include={*done.changed, "account_type"}) == {
        "account_name": "Main",
        "account_number": NUMBER,
        "account_type": "standard",
        "tiger_id": MASK,
        "private_key": MASK,
        "private_key_format": "PK8",
        "secret_key": MASK,
        "license": "TBHK",
        "environment": "PROD",
        "server_url": "https://openapi.example.com:8443/gateway",
        "access_token": MASK,
        "client_options": {name: EVERYTHING[name] for name in OPTIONS},
    }
    assert (done.created, done.token_kept, done.ignored) == (True, False, [])
    assert await actions(session) == [AuditAction.ACCOUNT_CREATE, AuditAction.ACCOUNT_IMPORT]
    event = (await factories.events(session))[1]
    assert event.tiger_account_id == account.id
    assert event.details == {"created": True, "changed": done.changed}


@pytest.mark.parametrize(
    ("number", "kind"), [(NUMBER, "standard"), ("U12300123", "global"), ("2" * 17, "paper")]
)
async def test_what_the_file_does_not_say_has_its_default(
    session: AsyncSession, tmp_path: Path, number: str, kind: str
) -> None:
    lines = REQUIRED | {"account": number, "license": "", "env": " ", "token": ""}
    account = (await import_account(session, config(tmp_path, lines))).account
    assert account.account_name == number
    assert account.account_type == kind
    assert (account.license, account.environment, account.secret_key) == (None, "PROD", None)
    assert (account.access_token, account.client_options) == (None, {})


@pytest.mark.parametrize("license", ["tbhk", "TbHk"])
async def test_a_license_may_be_written_in_any_case(
    session: AsyncSession,
    tmp_path: Path,
    license: str,  # noqa: A002  # the property's name
) -> None:
    path = config(tmp_path, REQUIRED | {"license": license})
    account = (await import_account(session, path)).account
    assert account.license == "TBHK"
    await crud.accounts.update(session, account.id, license=TigerLicense.TBSG)
    assert account.license == "TBSG"
    assert (await import_account(session, path)).changed == ["license"]


async def test_a_file_as_people_leave_it(session: AsyncSession, tmp_path: Path) -> None:
    path = tmp_path / "mine.properties"
    path.write_bytes(
        f"\ufeff# Tiger\r\n! notes\r\n tiger_id : 20150001 \r\naccount\t{NUMBER}  \r\n\r\n"
        f"secret_key = \\u00e9é \\\r\n   more\t\r\nprivate_key_pk1= {PK1} \r\nenv=prod".encode()
    )
    done = await import_account(session, path)
    assert plain(done.account.tiger_id) == "20150001"
    assert done.account.account_number == NUMBER
    assert plain(done.account.secret_key) == "éé more"
    assert done.ignored == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("line", "spelling"),
    [
        ("private_key", der),
        ("private_key_pk1", pem),
        ("private_key_pk8", der),
        ("private_key_pk8", lambda form: "\\\n".join(textwrap.wrap(der(form), 64))),
        ("private_key_pk8", pem),
        ("private_key_pk8", lambda form: pem(form).replace("\n", "\r\n")),
        ("private_key_pk8", lambda form: pem(form).strip().replace("\n", "\\n")),
        ("private_key_pk8", lambda form: pem(form).strip().replace("\n", "\\\n  ")),
        ("private_key_pk8", lambda form: pem(form).strip().replace("\n", "\\n\\\n")),
        ("private_key_pk8", lambda form: pem(form).strip().replace("\n", " ")),
    ],
)
async def test_every_spelling_of_a_key_is_read(
    session: AsyncSession, tmp_path: Path, form: PrivateKeyFormat, line: str, spelling: Any
) -> None:
    lines = {"account": NUMBER, line: spelling(form), "tiger_id": "20150001"}
    done = await import_account(session, config(tmp_path, lines))
    assert (plain(done.account.private_key), done.account.private_key_format) == (der(form), form)
    assert plain(done.account.tiger_id) == "20150001"
    assert done.ignored == []


@pytest.mark.parametrize(
    ("lines", "stored"),
    [
        ({"private_key": PK1, "private_key_pk8": PK8, "private_key_pk1": PK1}, "PK1"),
        ({"private_key_pk8": PK8, "private_key_pk1": PK1}, "PK8"),
        ({"private_key_pk8": "", "private_key_pk1": PK1}, "PK1"),
    ],
)
async def test_of_several_lines_the_one_that_the_sdk_takes_is_stored(
    session: AsyncSession, tmp_path: Path, lines: dict[str, str], stored: str
) -> None:
    done = await import_account(session, config(tmp_path, REQUIRED | lines))
    assert done.account.private_key_format == stored


@pytest.mark.parametrize(
    ("env", "stored"),
    [("PROD", "PROD"), ("prod", "PROD"), ("SANDBOX", "SANDBOX"), ("Test", "SANDBOX")],
)
async def test_environments(session: AsyncSession, tmp_path: Path, env: str, stored: str) -> None:
    done = await import_account(session, config(tmp_path, REQUIRED | {"env": env}))
    assert done.account.environment == stored


async def test_a_short_rsa_key_is_refused(session: AsyncSession, tmp_path: Path) -> None:
    path = config(tmp_path, REQUIRED | {"private_key_pk8": short_pem().strip()})
    with pytest.raises(InvalidValue, match="private_key: an RSA key must have 1024 bits or more"):
        await import_account(session, path)


async def test_a_file_with_another_spelling_updates_the_account(
    session: AsyncSession, tmp_path: Path
) -> None:
    first = await import_account(session, config(tmp_path, REQUIRED | {"account": "u1\\u200b"}))
    assert (first.account.account_number, first.account.account_name) == ("U1", "U1")
    for spelling in ("U1", "\\uff35\\uff11"):
        again = await import_account(session, config(tmp_path, REQUIRED | {"account": spelling}))
        assert (again.account.id, again.changed) == (first.account.id, [])


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"tiger_id": None}, "tiger_id is missing"),
        ({"tiger_id": " "}, "tiger_id is missing"),
        ({"account": None}, "account is missing"),
        ({"private_key_pk8": None}, "private_key_pk1 or private_key_pk8 is missing"),
        ({"private_key_pk8": PK8[:-9]}, "private_key_pk8: the private key is not an RSA key"),
        ({"private_key_pk1": OTHER}, "private_key_pk8 and private_key_pk1 are different keys"),
        ({"private_key": OTHER}, "private_key and private_key_pk8 are different keys"),
        ({"env": "STAGING"}, "env: Input should be 'PROD' or 'SANDBOX'"),
        ({"license": "TBXX"}, "license: Input should be 'TBNZ'"),
        (
            {"account": "9" * 51},
            "account: an account number must be U and digits, 5 to 10 digits, or 17 or more digits",
        ),
        ({"account": "5123\\u00000321"}, "account: an account number must be U and digits"),
        ({"account": "5123\\udead0321"}, "account: an account number must be U and digits"),
        ({"server_url": "x" * 501}, "server_url: Value should have at most 500 "),
        ({"secret_key": MASK}, "secret_key: Input should be the secret, not its mask"),
        ({"tiger_id": "\\udead"}, "tiger_id: a Tiger id must be printable ASCII without spaces"),
        ({"timeout": "\\u0000"}, "client_options: text in JSON must not contain a NUL character"),
        ({"server_url": "\\u00zz"}, "malformed \\u escape"),
    ],
)
async def test_a_refused_file_is_named_with_its_line_and_shows_nothing(
    session: AsyncSession, tmp_path: Path, lines: dict[str, str | None], reason: str
) -> None:
    path = config(tmp_path, REQUIRED | lines)
    with pytest.raises(InvalidValue) as caught:
        await import_account(session, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    for value in (PK8, *lines.values()):
        assert value is None or len(value.strip()) < 8 or value[:8] not in message.replace(MASK, "")
    assert (await crud.accounts.list_accounts(session)).items == []
    assert await actions(session) == []


async def test_keys_that_are_not_rsa(session: AsyncSession, tmp_path: Path) -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    text = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NO_PASSWORD).decode()
    path = config(tmp_path, REQUIRED | {"private_key_pk8": text})
    with pytest.raises(InvalidValue, match="private_key_pk8: the private key is not an RSA key"):
        await import_account(session, path)


async def test_files_that_cannot_be_read(session: AsyncSession, tmp_path: Path) -> None:
    for name, content in (("latin", b"account=\xe9"), ("large", b"#" * 1_000_001)):
        (tmp_path / name).write_bytes(content)
    good = config(tmp_path, REQUIRED)
    config(tmp_path, {"tokens": NEW}, "tokenless")
    for name, reason in (
        ("none", "No such file or directory"),
        (".", "Is a directory"),
        ("latin", "the file is not UTF-8 text"),
        ("large", "the file is too large"),
        ("tokenless", "the property `token` is missing"),
    ):
        path = tmp_path / name
        with pytest.raises(InvalidValue, match=f"^{path}: {reason}"):
            await import_account(session, good, token_file=path)
        if name != "tokenless":
            with pytest.raises(InvalidValue, match=f"^{path}: {reason}"):
                await import_account(session, path)
    assert await actions(session) == []


async def test_a_name_that_is_refused(session: AsyncSession, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"^name: String should"):
        await import_account(session, config(tmp_path, REQUIRED), name="x" * 101)


@pytest.mark.parametrize("lines", [EVERYTHING | {"token": NEW}, REQUIRED])
async def test_a_second_import_changes_nothing(
    session: AsyncSession, tmp_path: Path, lines: dict[str, str]
) -> None:
    path = config(tmp_path, lines)
    first = await import_account(session, path, name="Main")
    before, written = await factories.everything(session), await actions(session)
    again = await import_account(session, path, name="Main")
    assert (again.created, again.changed, again.token_kept) == (False, [], False)
    assert again.account.id == first.account.id
    assert await factories.everything(session) == before
    assert await actions(session) == written


@pytest.mark.parametrize("form", FORMS)
async def test_another_format_of_the_same_key_is_no_change(
    session: AsyncSession, tmp_path: Path, form: PrivateKeyFormat
) -> None:
    one, other = (PK1, PK8) if form == PrivateKeyFormat.PK1 else (PK8, PK1)
    await import_account(session, config(tmp_path, REQUIRED | {"private_key_pk8": one}))
    again = await import_account(session, config(tmp_path, REQUIRED | {"private_key_pk8": other}))
    assert again.changed == []
    assert plain(again.account.private_key) == one
    assert again.account.private_key_format == form


async def test_what_differs_is_changed_and_the_rest_stays(
    session: AsyncSession, tmp_path: Path
) -> None:
    path = config(tmp_path, EVERYTHING | {"private_key_pk8": ""})
    account = (await import_account(session, path, name="Main")).account
    await crud.accounts.update(
        session, account.id, market_permissions=[MarketPermission.US], status=AccountStatus.INACTIVE
    )
    written = len(await actions(session))
    lines = REQUIRED | {"private_key_pk8": OTHER, "license": "TBSG", "timeout": "30"}
    done = await import_account(session, config(tmp_path, lines))
    assert not done.created
    wanted = {"private_key", "private_key_format", "license", "client_options"}
    assert {*done.changed} == wanted
    assert plain(account.private_key) == OTHER
    assert (account.private_key_format, account.license) == ("PK8", "TBSG")
    assert account.client_options["timeout"] == "30"
    assert account.client_options["timezone"] == "Asia/Hong_Kong"
    assert plain(account.secret_key) == "s3cret=:#!"
    assert account.server_url == "https://openapi.example.com:8443/gateway"
    assert (account.account_name, account.market_permissions) == ("Main", ["US"])
    assert account.status == "inactive"
    update, imported = (await factories.events(session))[written:]
    assert (update.action, {*(update.new_values or {})}) == (AuditAction.ACCOUNT_UPDATE, wanted)
    assert imported.action == AuditAction.ACCOUNT_IMPORT
    assert imported.details == {"created": False, "changed": done.changed}


async def test_a_name_is_changed_where_one_is_given(session: AsyncSession, tmp_path: Path) -> None:
    path = config(tmp_path, REQUIRED)
    await import_account(session, path, name="One")
    assert (await import_account(session, path)).changed == []
    done = await import_account(session, path, name="Two")
    assert (done.changed, done.account.account_name) == (["account_name"], "Two")


async def test_a_newer_token_replaces_the_stored_one(session: AsyncSession, tmp_path: Path) -> None:
    await import_account(session, config(tmp_path, REQUIRED | {"token": OLD}))
    done = await import_account(session, config(tmp_path, REQUIRED | {"token": NEW}))
    assert (done.changed, done.token_kept) == (["access_token"], False)
    assert plain(done.account.access_token) == NEW
    assert done.account.token_expires_at == datetime(2026, 2, 16, tzinfo=UTC)
    assert (await actions(session))[2:] == [AuditAction.TOKEN_UPDATE, AuditAction.ACCOUNT_IMPORT]


async def test_an_older_token_does_not_and_the_rest_is_imported(
    session: AsyncSession, tmp_path: Path
) -> None:
    await import_account(session, config(tmp_path, REQUIRED | {"token": NEW}))
    done = await import_account(session, config(tmp_path, REQUIRED | {"token": OLD}))
    assert (done.changed, done.token_kept) == ([], True)
    assert len(await actions(session)) == 2
    lines = REQUIRED | {"token": OLD, "license": "TBHK"}
    done = await import_account(session, config(tmp_path, lines))
    assert (done.changed, done.token_kept) == (["license"], True)
    assert plain(done.account.access_token) == NEW
    assert done.account.token_expires_at == datetime(2026, 2, 16, tzinfo=UTC)


def sdk_token(folder: Path) -> str:
    """The token that Tiger's SDK takes from the files of a folder."""
    return str(loaded(folder).token or "")


@pytest.mark.parametrize(
    ("inside", "beside"),
    [(None, NEW), (NEW, OLD), (OLD, NEW), (None, None), (None, ""), (NEW, None)],
)
async def test_the_token_file_beside_is_taken_as_tiger_s_sdk_does(
    session: AsyncSession, tmp_path: Path, inside: str | None, beside: str | None
) -> None:
    path = config(tmp_path, REQUIRED | {"license": "TBHK", "token": inside})
    if beside is not None:
        config(tmp_path, {"token": beside}, TOKEN_FILE)
    done = await import_account(session, path)
    stored = "" if done.account.access_token is None else plain(done.account.access_token)
    assert stored == sdk_token(tmp_path)
    assert done.token_file == (tmp_path / TOKEN_FILE if not inside and beside else None)


async def test_a_token_file_beside_that_cannot_be_read_is_named(
    session: AsyncSession, tmp_path: Path
) -> None:
    (tmp_path / TOKEN_FILE).mkdir()
    with pytest.raises(InvalidValue, match=f"{TOKEN_FILE}: Is a directory"):
        await import_account(session, config(tmp_path, REQUIRED))


@pytest.mark.parametrize("place", ["in the configuration file", "in the token file", "later"])
async def test_text_that_is_no_token_is_refused_where_the_license_needs_a_token(
    session: AsyncSession, tmp_path: Path, place: str
) -> None:
    """Its expiry would be unknown, so that the account would serve requests with it for ever."""
    lines = REQUIRED | {"license": "TBHK"}
    path = config(tmp_path, lines | ({"token": "abc"} if "conf" in place else {}))
    if place == "later":  # the stored license counts
        await import_account(session, path)
        config(tmp_path, REQUIRED)
    named = path if "conf" in place else config(tmp_path, {"token": "abc"}, TOKEN_FILE)
    with pytest.raises(InvalidValue) as refused:
        await import_account(session, path)
    assert str(refused.value) == f"{named}: token: the value is not an access token of Tiger"


async def test_a_missing_token_is_a_warning_where_the_license_needs_one(
    session: AsyncSession, tmp_path: Path
) -> None:
    path = config(tmp_path, REQUIRED | {"license": "TBHK"})
    missing = await import_account(session, path)
    (warning,) = missing.warnings
    assert warning == (
        "the account serves no requests, because the license TBHK needs a valid access token:"
        f" import the account again with its file {TOKEN_FILE}"
    )
    assert await crud.accounts.find_for_operation(session) == []
    config(tmp_path, {"token": OLD}, TOKEN_FILE)
    assert (await import_account(session, path)).warnings == missing.warnings, "it has expired"
    config(tmp_path, {"token": token(datetime.now(UTC))}, TOKEN_FILE)
    assert (await import_account(session, path)).warnings == []
    assert await crud.accounts.find_for_operation(session) == [missing.account]
    other = config(tmp_path, REQUIRED | {"account": "U1", "license": "TBNZ"}, "other.properties")
    (tmp_path / TOKEN_FILE).unlink()
    assert (await import_account(session, other)).warnings == []


@pytest.mark.parametrize(
    ("inside", "beside", "wanted"),
    [
        (OLD, NEW, NEW),
        (NEW, OLD, NEW),
        (None, OLD, OLD),
        ("opaque", NEW, "opaque"),
        (NEW, "x", NEW),
    ],
    ids=["newer beside", "older beside", "none inside", "opaque inside", "opaque beside"],
)
async def test_of_two_tokens_the_newer_one_counts(
    session: AsyncSession, tmp_path: Path, inside: str | None, beside: str, wanted: str
) -> None:
    lines: dict[str, str | None] = {**REQUIRED, "token": inside}
    token_file = config(tmp_path, {"token": f"{beside} "}, TOKEN_FILE)
    done = await import_account(session, config(tmp_path, lines), token_file=token_file)
    assert plain(done.account.access_token) == wanted


async def test_a_closed_account_must_be_reopened_first(
    session: AsyncSession, tmp_path: Path
) -> None:
    path = config(tmp_path, EVERYTHING)
    account = (await import_account(session, path)).account
    await crud.accounts.close(session, account.id)
    written = await actions(session)
    with pytest.raises(InvalidState, match=r"^account \*\*\*\*0321 is closed: .*reopen-account"):
        await import_account(session, path)
    assert await actions(session) == written
    await crud.accounts.reopen(session, account.id, private_key="lost")
    done = await import_account(session, path)
    assert done.changed == ["secret_key", "private_key", "private_key_format"]


async def test_unknown_lines_are_named_but_torn_keys_are_not(
    session: AsyncSession, tmp_path: Path
) -> None:
    torn = "\n".join(f"{piece}=" for piece in textwrap.wrap(OTHER, 60))
    path = config(tmp_path, REQUIRED | {"colour": "red", "proxy.host": "x", "empty": ""})
    with path.open("a") as file:
        file.write(f"{torn}=\nab==\n{OTHER[30:70]} {OTHER[70:]}\n{OTHER[8:40]}={OTHER[40:90]}\n")
    done = await import_account(session, path)
    assert done.ignored == [MASK, "colour", "proxy.host"]


async def test_an_import_is_not_committed(clone: Database, tmp_path: Path) -> None:
    async with clone.sessions() as session:
        await import_account(session, config(tmp_path, REQUIRED))
    async with clone.session() as session:
        assert (await crud.accounts.list_accounts(session)).items == []


async def test_a_secret_that_nobody_can_read_any_more_is_replaced(
    clone: Database, tmp_path: Path
) -> None:
    path = config(tmp_path, EVERYTHING | {"token": NEW})
    async with clone.session() as session:
        await import_account(session, path)
    async with Database(clone.settings, key_provider=KeyRing.parse(generate_key("new"))) as other:
        async with other.session() as session:
            done = await import_account(session, path)
        assert {*done.changed} == {
            "tiger_id",
            "secret_key",
            "private_key",
            "access_token",
        }
        async with other.session() as session:
            account = await crud.accounts.get(session, done.account.id)
    assert account is not None
    assert plain(account.private_key) == PK8
