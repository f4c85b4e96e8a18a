"""The tables, their version, and the way forward from every older version.

A user's rows lie side by side: each table is clustered by the user, so that one person's data is one range of the
file, read at one go and deleted at one go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import apsw

from ..errors import SchemaTooNew, StoreCorrupt
from . import forgotten
from .files import translate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "APPLICATION_ID",
    "USER_TABLES",
    "VERSION",
    "everyone",
    "forget_user",
    "migrate",
    "next_memory_id",
    "version_of",
    "want_compaction",
]

APPLICATION_ID = 0x57464153  # "WFAS": tells our files from other people's databases

MIGRATIONS = (
    """
    CREATE TABLE journal (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- names the turn elsewhere: never given twice
        platform TEXT NOT NULL, channel TEXT NOT NULL, user TEXT NOT NULL, message_id TEXT NOT NULL,
        state INTEGER NOT NULL DEFAULT 0,
        accepted_at REAL NOT NULL,
        message BLOB NOT NULL,
        reply BLOB,
        UNIQUE (platform, channel, message_id, user)
    );
    CREATE INDEX journal_open ON journal (id) WHERE state < 2;
    CREATE INDEX journal_user ON journal (user);
    CREATE TABLE conversation (
        user TEXT NOT NULL, platform TEXT NOT NULL, channel TEXT NOT NULL, scope TEXT NOT NULL,
        turn INTEGER NOT NULL,
        at REAL NOT NULL, text TEXT NOT NULL, reply TEXT NOT NULL,
        PRIMARY KEY (user, platform, channel, scope, turn)
    ) WITHOUT ROWID;
    CREATE TABLE embedder (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dimension INTEGER NOT NULL);
    CREATE TABLE memory (
        user TEXT NOT NULL, id INTEGER NOT NULL,
        scope TEXT NOT NULL, text TEXT NOT NULL, at REAL NOT NULL,
        speaker TEXT, session TEXT, metadata BLOB, source TEXT,
        embedder INTEGER NOT NULL, vector BLOB NOT NULL, scale REAL NOT NULL,
        PRIMARY KEY (user, id)
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX memory_source ON memory (user, source) WHERE source IS NOT NULL;
    CREATE TABLE memory_counter (user TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
    """,
    """
    ALTER TABLE journal ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;  -- how often the process died in its turn
    ALTER TABLE journal ADD COLUMN age REAL NOT NULL DEFAULT 0;          -- seconds this journal had been served
    ALTER TABLE journal ADD COLUMN digest BLOB;                          -- of the words, where others must not pass
    """,
    """
    CREATE TABLE journal_by_user (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        platform TEXT NOT NULL, channel TEXT NOT NULL, user TEXT NOT NULL, message_id TEXT NOT NULL,
        state INTEGER NOT NULL DEFAULT 0,
        accepted_at REAL NOT NULL,
        message BLOB NOT NULL,
        reply BLOB,
        attempts INTEGER NOT NULL DEFAULT 0,
        age REAL NOT NULL DEFAULT 0,
        digest BLOB,
        UNIQUE (user, platform, channel, message_id)  -- one index finds a message and a user's messages
    );
    INSERT INTO journal_by_user SELECT id, platform, channel, user, message_id, state, accepted_at, message, reply,
        attempts, age, digest FROM journal ORDER BY id;
    DELETE FROM sqlite_sequence WHERE name = 'journal_by_user';
    INSERT INTO sqlite_sequence SELECT 'journal_by_user', seq FROM sqlite_sequence WHERE name = 'journal';
    DROP TABLE journal;
    ALTER TABLE journal_by_user RENAME TO journal;
    CREATE INDEX journal_open ON journal (id) WHERE state < 2;
    """,
    """
    CREATE TABLE compaction (id INTEGER PRIMARY KEY AUTOINCREMENT);  -- a row for each deletion that left traces
    """,
    """
    CREATE TABLE forgotten (digest TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;  -- still to be told elsewhere
    """,
)
VERSION = len(MIGRATIONS)

USER_TABLES = ("memory", "memory_counter", "conversation", "journal")
"""Every table that holds a person's rows, each with a column `user`."""


def version_of(connection: apsw.Connection) -> int:
    """Return the schema version of a database, 0 for an empty one.

    Raises SchemaTooNew for one that a newer whisper-fast wrote, StoreCorrupt for what is not a database of ours.
    """
    try:
        version = int(connection.pragma("user_version"))
        owner = int(connection.pragma("application_id"))
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except apsw.Error as error:
        raise translate(error, connection.filename) from error
    if owner != APPLICATION_ID and (tables or version):
        raise StoreCorrupt(f"{connection.filename} is not a whisper-fast database; choose another data folder")
    if version > VERSION:
        raise SchemaTooNew(
            f"{connection.filename} has schema {version}, this whisper-fast knows {VERSION}; install the newer one"
        )
    return version


def migrate(connection: apsw.Connection, before: Callable[[int], None]) -> None:
    """Bring a database to `VERSION` in one transaction.

    `before(version)` is called first if there is data of an older version: it makes and verifies the backup.
    """
    version = version_of(connection)
    if version == VERSION:
        return
    if version:
        before(version)
    with connection:
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", VERSION)


def forget_user(connection: apsw.Connection, user: str, upto: int | None = None) -> int:
    """Delete every row of `user`, in every table, and return how many there were; call it inside a write job.

    Turns after the journal entry `upto` stay: they came after the wish to forget.
    """
    before = connection.total_changes()
    turns = {"journal": " AND id <= ?", "conversation": " AND turn <= ?"} if upto is not None else {}
    for table in USER_TABLES:
        later = turns.get(table, "")
        sql = f"DELETE FROM {table} WHERE user = ?{later}"  # noqa: S608 - names of ours
        connection.execute(sql, (user, upto) if later else (user,))
    deleted = connection.total_changes() - before
    forgotten.note(connection, user)
    want_compaction(connection)
    return deleted


def everyone(connection: apsw.Connection) -> list[str]:
    """Return all users of whom something is stored."""
    sql = " UNION ".join(f"SELECT user FROM {table}" for table in USER_TABLES)  # noqa: S608 - names of ours
    return [user for (user,) in connection.execute(sql)]


def want_compaction(connection: apsw.Connection) -> int:
    """Note that something was deleted whose traces must go too, inside the write job; return the note's number."""
    connection.execute("INSERT INTO compaction DEFAULT VALUES")
    return connection.last_insert_rowid()


def next_memory_id(connection: apsw.Connection, user: str) -> int:
    """Return a memory id that was never used for `user`; call it inside a write job."""
    sql = """INSERT INTO memory_counter (user, last) VALUES (?, 1)
             ON CONFLICT (user) DO UPDATE SET last = last + 1 RETURNING last"""
    return int(connection.execute(sql, (user,)).get)
