from tests import factories
from tiger_db.database import AsyncSession


async def test_smoke(session: AsyncSession) -> None:
    account = await factories.account(session)
    assert account.created_at is not None
