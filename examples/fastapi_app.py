"""A web server whose routes require API keys. Run `PORT=8000 python examples/fastapi_app.py`.

Try it with `curl -H "Authorization: Bearer tdb_test_..." http://127.0.0.1:8000/accounts`.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import ceil
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from tiger_db import APIKey, APIKeyScope, Database, KeyVerifier, crud, errors

bearer = HTTPBearer(auto_error=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with Database() as database, KeyVerifier(database) as verifier:
        app.state.database, app.state.verifier = database, verifier
        yield


app = FastAPI(lifespan=lifespan)


def require(scope: APIKeyScope) -> Callable[..., Awaitable[APIKey]]:
    """Return a dependency that authorizes the caller's API key for the scope."""

    async def authorized(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> APIKey:
        try:
            return await request.app.state.verifier.authorize(
                credentials.credentials if credentials else "",
                scopes=[scope],
                ip_address=request.client.host if request.client else None,
                user_agent=request.headers.get("user-agent"),
            )
        except errors.RateLimited as error:
            wait = ceil(error.retry_after.total_seconds())
            raise HTTPException(429, "too many requests", {"Retry-After": str(wait)}) from None
        except (errors.ScopeMissing, errors.AccountNotAllowed, errors.TradingPaused) as error:
            raise HTTPException(403, str(error)) from None
        except errors.AccessDenied:  # the audit event has the reason, the caller gets no details
            raise HTTPException(401, "invalid API key", {"WWW-Authenticate": "Bearer"}) from None
        except errors.DatabaseUnavailable:
            raise HTTPException(503, "try again later") from None

    return authorized


@app.get("/accounts")
async def accounts(
    request: Request, key: Annotated[APIKey, Depends(require(APIKeyScope.ACCOUNT_READ))]
) -> list[str]:
    async with request.app.state.database.session() as session:
        page = await crud.accounts.list_accounts(session)
    return [account.account_name for account in page if key.can_access_account(account.id)]


@app.post("/orders", dependencies=[Depends(require(APIKeyScope.TRADE_WRITE))])
async def order() -> str:
    return "accepted"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
