"""A fake broker that refreshes access tokens."""

from collections import deque
from uuid import UUID

from tiger_db.errors import AnswerLost, CredentialsRefused
from tiger_db.models import NewToken, TigerAccount
from tiger_db.testing.factories import access_token


class FakeBroker:
    """A broker without a network, for `RefreshWorker(database, FakeBroker())`.

    Like Tiger, the broker ends the previous token of an account with each refresh. It refuses a
    request that has not the newest token that the broker has issued for the account. `requests` are
    the accounts of all requests, as the worker passed them.
    """

    def __init__(self) -> None:
        self.requests: list[TigerAccount] = []
        self._issued: dict[UUID, str] = {}
        self._planned: deque[NewToken | Exception] = deque()

    def plan(self, *answers: NewToken | Exception) -> None:
        """Plan the answers to the next requests: tokens to return, or errors to raise.

        For an `AnswerLost`, the broker issues a token before it raises the error.
        """
        self._planned.extend(answers)

    async def __call__(self, account: TigerAccount) -> NewToken:
        """Answer a request as planned, or else with a new token in Tiger's format.

        Raises:
            CredentialsRefused: the account has not the newest token.
            Exception: the planned error.
        """
        self.requests.append(account)
        answer = self._planned.popleft() if self._planned else None
        if isinstance(answer, Exception) and not isinstance(answer, AnswerLost):
            raise answer
        token = None if account.access_token is None else account.access_token.get_secret_value()
        if self._issued.get(account.id, token) != token:
            raise CredentialsRefused("the access token is not the newest one")
        new = answer if isinstance(answer, NewToken) else NewToken(access_token())
        self._issued[account.id] = new.access_token
        if isinstance(answer, AnswerLost):
            raise answer
        return new
