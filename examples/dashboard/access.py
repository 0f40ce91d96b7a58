"""Access control: a cookie with an API key authorizes each request, and opens its session."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from tiger_db import APIKey, APIKeyScope, AsyncSession, Database, KeyVerifier, crud, errors
from tiger_db.integrations.fastapi import actor_of

COOKIE = "tiger_db_dashboard"


def database_of(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def authorize(request: Request, raw_key: str, scope: APIKeyScope) -> APIKey:
    """Authorize an API key for the dashboard, and store the actor in `request.state.actor`."""
    verifier: KeyVerifier = request.app.state.verifier
    actor = actor_of(request)
    address, agent = actor.ip_address, request.headers.get("user-agent")
    key = await verifier.authorize(raw_key, scopes=[scope], ip_address=address, user_agent=agent)
    if key.tiger_account_id is not None:  # the pages show all accounts
        raise errors.AccountNotAllowed("an API key that is bound to an account is not accepted")
    request.state.key = key
    request.state.actor = actor_of(request, user_id=key.key_prefix, user_type="api_key")
    return key


def check_origin(request: Request) -> None:
    """Refuse a form that another site submits.

    The cookie is SameSite=Strict, so a browser does not send the cookie with forms of other sites.
    Other ports of the same host belong to the same site, so the origin is compared as well.
    """
    if request.headers.get("origin") != f"{request.url.scheme}://{request.url.netloc}":
        raise HTTPException(403, "The form was submitted by another site.")


@asynccontextmanager
async def _session(request: Request, scope: APIKeyScope) -> AsyncIterator[AsyncSession]:
    await authorize(request, request.cookies.get(COOKIE, ""), scope)
    async with database_of(request).session(actor=request.state.actor) as session:
        request.state.pause = await crud.api_keys.current_pause(session)
        yield session


async def _reading(request: Request) -> AsyncIterator[AsyncSession]:
    async with _session(request, APIKeyScope.DASHBOARD_READ) as session:
        yield session


async def _changing(request: Request) -> AsyncIterator[AsyncSession]:
    check_origin(request)
    async with _session(request, APIKeyScope.DASHBOARD_WRITE) as session:
        yield session


# With the scope "function", the session commits before the response is sent.
Reading = Annotated[AsyncSession, Depends(_reading, scope="function")]
Changing = Annotated[AsyncSession, Depends(_changing, scope="function")]
