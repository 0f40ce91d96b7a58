"""Normalize account numbers, and accept only the forms of Tiger's numbers.

Revision: 0011
Follows: 0010
Made: 2026-11-28

The migration locks tiger_accounts during one scan of the table. Account numbers that differ only in
invisible characters, width or letter case belong to one account at Tiger. If several rows contain
the same number in different forms, the migration does not change the numbers of these rows. A number
that does not have the form of Tiger's account numbers stays unchanged.

The new CHECK constraint requires the form of Tiger's numbers, and exempts existing rows with other
numbers by their ids. If the CHECK constraint did not exempt existing rows with other numbers, each
update of such a row would fail. If the CHECK constraint lists ids of exempted rows, the constraint
stays NOT VALID, and `tiger-db doctor` lists the exempted rows. Processes of revision 0010 work
with the schema of revision 0011, but can store only account numbers that have the form of Tiger's
numbers.

A separate transaction validates the new CHECK constraint, and blocks neither readers nor writers.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
squawk_ignore = {
    "ban-drop-constraint": "the new constraint account_number_form limits the length, too",
}

FORM = "^(U[0-9]{1,49}|[0-9]{5,10}|[0-9]{17,50})$"
NAME = "ck_tiger_accounts_account_number_form"
LENGTHS = {
    "min_1": "char_length(account_number) >= 1",
    "max_50": "char_length(account_number) <= 50",
}
# The SQL expression NORMAL computes the same value as the Python function
# `normalize_account_number`. PostgreSQL's function normalize() needs a database with the encoding
# UTF8.
IGNORABLE = (
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]"
)
BLANK = r"[\u0001-\u0020\u007f-\u00a0\u1680\u2028\u2029\u2800]+"
NORMAL = (
    "CASE getdatabaseencoding() WHEN 'UTF8' THEN upper(regexp_replace(normalize("
    f"regexp_replace(account_number, '{IGNORABLE}', '', 'g'), NFKC), '^{BLANK}|{BLANK}$', '', 'g'))"
    " ELSE upper(btrim(account_number)) END"
)
NORMALIZE = f"""
WITH accounts AS (
    SELECT id, {NORMAL} AS number, count(*) OVER (PARTITION BY {NORMAL}) AS rows FROM tiger_accounts
)
UPDATE tiger_accounts AS a SET account_number = number FROM accounts
WHERE accounts.id = a.id AND number <> account_number AND number ~ '{FORM}' AND rows = 1
"""
CONSTRAIN = f"""
DO $$
BEGIN
    EXECUTE concat('ALTER TABLE tiger_accounts ADD CONSTRAINT {NAME} CHECK (account_number ~ ',
        quote_literal('{FORM}'),
        (SELECT ' OR id IN (' || string_agg(quote_literal(id), ', ' ORDER BY id) || ')'
            FROM tiger_accounts WHERE account_number !~ '{FORM}'),
        ') NOT VALID');
END
$$
"""
VALIDATE = f"""
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM tiger_accounts WHERE account_number !~ '{FORM}') THEN
        ALTER TABLE tiger_accounts VALIDATE CONSTRAINT {NAME};
    END IF;
END
$$
"""


def upgrade() -> None:
    op.execute("LOCK TABLE tiger_accounts")
    # The constraint already exists if an earlier run of this migration stopped during validation.
    for name in ("form", *LENGTHS):
        op.execute(
            "ALTER TABLE tiger_accounts"
            f" DROP CONSTRAINT IF EXISTS ck_tiger_accounts_account_number_{name}"
        )
    op.execute(NORMALIZE)
    op.execute(CONSTRAIN)
    with op.get_context().autocommit_block():
        op.execute(VALIDATE)


def downgrade() -> None:
    op.drop_constraint(op.f(NAME), "tiger_accounts")
    for name, rule in LENGTHS.items():
        constraint = f"ck_tiger_accounts_account_number_{name}"
        op.execute(f"ALTER TABLE tiger_accounts ADD CONSTRAINT {constraint} CHECK ({rule})")
