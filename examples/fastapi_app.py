"""A web server whose routes require API keys. Run `PORT=8000 python examples/fastapi_app.py`.

Try it with `curl -H "Authorization: Bearer tdb_test_..." http://127.0.0.1:8000/accounts`.
"""

import os
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI

from tiger_db import APIKey, APIKeyScope, crud
from tiger_db.integrations.fastapi import SessionDep, install, lifespan, require_api_key

app = FastAPI(lifespan=lifespan)
install(app)
Reader = Annotated[APIKey, Depends(require_api_key(APIKeyScope.ACCOUNT_READ))]


@app.get("/accounts")
async def accounts(session: SessionDep, key: Reader) -> list[str]:
    page = await crud.accounts.list_accounts(session)
    return [account.account_name for account in page if key.can_access_account(account.id)]


@app.post("/orders", dependencies=[Depends(require_api_key(APIKeyScope.TRADE_WRITE))])
async def order() -> str:
    return "accepted"


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
