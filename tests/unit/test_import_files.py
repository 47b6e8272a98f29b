"""Files of keys: what is read, what is refused, and which line is named."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from apikeys.v1 import import_service_pb2 as pb
from apikeys.v1 import key_pb2
from latchgate.importing.client import BATCH_BYTES, BATCH_ROWS, batches
from latchgate.importing.fields import READERS
from latchgate.importing.files import MAX_LINE_BYTES, FileRefusedError, FileRow, KeyFile
from support.imports import foreign_token, sha256
from support.keys import timestamp

TOKEN = "sk_live_of_the_file_tests_0123456789"
HEX = sha256(TOKEN).hex()
HEADER = "digest,name\n"


def read(folder: Path, content: str | bytes, name: str = "keys.csv") -> list[FileRow]:
    """Reads a file that is written for it; counting it first, as the command does."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    file = KeyFile.named(path)
    count = file.count()
    rows = list(file.rows())
    assert count == len(rows)
    return rows


def refused(folder: Path, content: str | bytes, name: str = "keys.csv") -> str:
    """Reads a file that must be refused as a whole, already when it is counted; gives why, without the path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FileRefusedError) as caught:
        KeyFile.named(path).count()
    with pytest.raises(FileRefusedError):
        list(KeyFile.named(path).rows())
    return str(caught.value).removeprefix(f"{path}: ").removeprefix(f"{path} ")


def keys(rows: list[FileRow]) -> list[pb.ImportedKey]:
    """Gives the keys of rows of which nothing is wrong."""
    assert [()] * len(rows) == [row.faults for row in rows]
    return [row.key for row in rows if row.key is not None]


FULL = pb.ImportedKey(
    row=2,
    digest=sha256(TOKEN),
    hint="sk_live_of",
    name='a "quoted", name',
    environment=key_pb2.ENVIRONMENT_TEST,
    permissions=["read", "orders:*"],
    rate_limit_per_minute=600,
    user_id="u1",
    user_email="ann@example.com",
    metadata={"team": "payments", "ü": "☃"},
    allowed_cidrs=["192.0.2.0/24", "2001:db8::/32"],
    active=False,
)
FULL.expire_time.FromJsonString("2090-01-31T22:59:59.123456Z")
FULL_CSV = (
    "digest,hint,name,environment,permissions,rate_limit_per_minute,expire_time,user_id,user_email,metadata,"
    "allowed_cidrs,active\n"
    f'{HEX},sk_live_of,"a ""quoted"", name",test,read orders:*,600,2090-01-31T23:59:59.123456789+01:00,u1,'
    "ann@example.com,"
    '"{""team"": ""payments"", ""ü"": ""☃""}",192.0.2.0/24 2001:db8::/32,false\n'
)
FULL_JSON = {
    "digest": HEX,
    "hint": "sk_live_of",
    "name": 'a "quoted", name',
    "environment": "test",
    "permissions": ["read", "orders:*"],
    "rate_limit_per_minute": 600,
    "expire_time": "2090-01-31 22:59:59.123456z",
    "user_id": "u1",
    "user_email": "ann@example.com",
    "metadata": {"team": "payments", "ü": "☃"},
    "allowed_cidrs": ["192.0.2.0/24", "2001:db8::/32"],
    "active": False,
}


def test_every_field_of_csv(tmp_path: Path) -> None:
    """A row of CSV gives all that a key can have; lists are separated by spaces, metadata is JSON."""
    assert [FULL] == keys(read(tmp_path, FULL_CSV))
    assert set(READERS) == {field.name for field in pb.ImportedKey.DESCRIPTOR.fields} - {"row"}


def test_every_field_of_jsonl(tmp_path: Path) -> None:
    """A line of JSON gives the same, with lists and objects of its own."""
    FULL_AT_1 = pb.ImportedKey()  # noqa: N806
    FULL_AT_1.CopyFrom(FULL)
    FULL_AT_1.row = 1
    assert [FULL_AT_1] == keys(read(tmp_path, json.dumps(FULL_JSON) + "\n", "keys.jsonl"))


@pytest.mark.parametrize("name", ["keys.CSV", "keys.jsonl", "keys.ndjson"])
def test_name_tells_the_format(tmp_path: Path, name: str) -> None:
    """The end of the name says how a file is written, in any case of letters."""
    content = f"{HEADER}{HEX},a\n" if name.endswith("CSV") else json.dumps({"digest": HEX, "name": "a"})
    assert 1 == len(keys(read(tmp_path, content, name)))


@pytest.mark.parametrize("name", ["keys.txt", "keys", "keys.csv.gz"])
def test_unknown_format(name: str) -> None:
    """A file with another name is refused, before it is looked at."""
    with pytest.raises(FileRefusedError, match=r"must end in \.csv or \.jsonl"):
        KeyFile.named(Path(name))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    """A file that can not be opened is one line that says why."""
    with pytest.raises(FileRefusedError, match="No such file"):
        KeyFile.named(tmp_path / "keys.csv").count()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileRefusedError, match="directory"):
        KeyFile.named(tmp_path / "folder.csv").count()


@pytest.mark.parametrize(
    "written",
    [
        f"{HEADER}{HEX},a\n",
        f"{HEADER}{HEX},a",
        f"\ufeff{HEADER}{HEX},a\n",
        f"{HEADER}{HEX},a\n".replace("\n", "\r\n"),
        f'"digest","name"\n"{HEX}","a"\n',
        f"digest, name\n{HEX},a\n\n\n",
        f"\n\n{HEADER}\n,\n{HEX},a\n",
        f"{HEADER}{HEX.upper()},a\n",
    ],
    ids=["plain", "no end", "byte order mark", "CRLF", "quotes", "spaces", "empty lines", "upper case"],
)
def test_ways_of_writing_csv(tmp_path: Path, written: str) -> None:
    """What spreadsheets and databases write is read: byte order marks, both line ends, quotes, empty lines."""
    ((name, digest),) = [(key.name, key.digest) for key in keys(read(tmp_path, written))]
    assert ("a", sha256(TOKEN)) == (name, digest)


def test_lines_are_those_where_rows_begin(tmp_path: Path) -> None:
    """A row is known by the line on which it begins, whatever stands between."""
    rows = read(tmp_path, f'{HEADER}\n{HEX},"a\nb\nc"\n{HEX},d\n\n{HEX},e,f\n')
    assert [3, 6, 8] == [row.line for row in rows]
    rows = read(tmp_path, f"\n{json.dumps({'digest': HEX, 'name': 'a'})}\n\n[]\n", "keys.jsonl")
    assert [2, 4] == [row.line for row in rows]


@pytest.mark.parametrize(
    "written",
    [
        HEX,
        base64.b64encode(sha256(TOKEN)).decode(),
        base64.urlsafe_b64encode(sha256(TOKEN)).decode(),
        base64.urlsafe_b64encode(sha256(TOKEN)).decode().rstrip("="),
    ],
    ids=["hex", "base64", "base64url", "unpadded"],
)
def test_ways_of_writing_digests(tmp_path: Path, written: str) -> None:
    """A digest is read in the forms in which others keep it."""
    assert [sha256(TOKEN)] == [key.digest for key in keys(read(tmp_path, f"{HEADER}{written},a\n"))]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("name\na\n", "line 1 must name a column digest"),
        ("digest\na\n", "line 1 must name a column name"),
        (f"\n{TOKEN},a\n", "line 2 column 1 has no name that is known"),
        ("digest,name,colour\n", "line 1 column 3 has no name that is known"),
        ("digest,name,name\n", "line 1 has two columns name"),
        (f'{HEADER}{HEX},"a"b\n', "line 2 is not CSV"),
        (f'{HEADER}{HEX},a\n{HEX},"b\n', "line 3 is not CSV"),
        (f"{HEADER}{HEX},a\n{HEX},\u00e4\n".encode("latin-1"), "line 3 is not UTF-8"),
        (f"{HEADER}{HEX},a\n".encode("utf-16"), "line 1 is not UTF-8"),
        (f"{HEADER}{HEX},a\0b\n", "line 2 holds the character U+0000"),
        (f"{HEADER}{HEX},{'a' * MAX_LINE_BYTES}\n", f"line 2 is longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_file_that_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    """A file that is not what it should be is refused as a whole, with the line, before anything of it is sent."""
    told = refused(tmp_path, content)
    assert told.startswith(said)
    assert TOKEN not in told


@pytest.mark.parametrize("name", ["token", "key", "api_key", "Secret", " TOKEN ", "plaintext"])
@pytest.mark.parametrize("format_", ["csv", "jsonl"])
def test_tokens_are_refused(tmp_path: Path, name: str, format_: str) -> None:
    """A file with a column or field of tokens is refused loudly, whatever else it has; no token is repeated."""
    if format_ == "csv":
        told = refused(tmp_path, f"digest,name,{name}\n{HEX},a,{TOKEN}\n")
        line = 1
    else:
        good = json.dumps({"digest": HEX, "name": "a"})
        told = refused(tmp_path, f"{good}\n{json.dumps({name: TOKEN, 'name': 'a'})}\n", "keys.jsonl")
        line = 2
    assert told.startswith(f"line {line} has a {'column' if format_ == 'csv' else 'field'} '{name.strip().lower()}'")
    assert "Tokens in plain text are not imported, and were not sent" in told
    assert TOKEN not in told


WRONG: list[tuple[str, Any, str]] = [
    ("digest", TOKEN, "must be the SHA-256 of the token"),
    ("digest", HEX[:-1], "must be the SHA-256 of the token"),
    ("digest", "g" * 64, "must be the SHA-256 of the token"),
    ("digest", "é" * 64, "must be the SHA-256 of the token"),
    ("digest", "!" * 43, "must be the SHA-256 of the token"),
    ("digest", 7, "must be text"),
    ("digest", "", "must be given"),
    ("name", None, "must be given"),
    ("name", ["a"], "must be text"),
    ("environment", "production", "must be live or test"),
    ("permissions", [1], "must be a list of texts"),
    ("permissions", {"read": True}, "must be a list of texts"),
    ("rate_limit_per_minute", "-1", "must be a whole number"),
    ("rate_limit_per_minute", "1.5", "must be a whole number"),
    ("rate_limit_per_minute", 1.0, "must be a whole number"),
    ("rate_limit_per_minute", True, "must be a whole number"),
    ("rate_limit_per_minute", 2**31, "must be a whole number"),
    ("expire_time", "2027-01-31", "must be a time"),
    ("expire_time", "2027-01-31T00:00:00", "must be a time"),
    ("expire_time", "2027-02-31T00:00:00Z", "must be a time"),
    ("expire_time", "0001-01-01T00:00:00+01:00", "must be a time"),
    ("expire_time", 1800000000, "must be text"),
    ("metadata", "team", "must be an object of texts"),
    ("metadata", {"team": 1}, "must be an object of texts"),
    ("active", "yes", "must be true or false"),
    ("user_id", "\ud800", "must hold texts that can be written in UTF-8"),
]


@pytest.mark.parametrize(("field", "value", "said"), WRONG)
def test_value_that_can_not_be_read(tmp_path: Path, field: str, value: Any, said: str) -> None:
    """A value that can not be read is told with its field and what it must be, never with what it is; other rows are
    read.
    """
    good = {"digest": HEX, "name": "a"}
    lines = [json.dumps(each) for each in (good, good | {field: value}, good)]
    before, wrong, after = read(tmp_path, "\n".join(lines), "keys.jsonl")
    assert [(), ()] == [before.faults, after.faults]
    ((told_field, told),) = wrong.faults
    assert (field if "UTF-8" not in said else "", True) == (told_field, told.startswith(said))
    assert TOKEN not in told


@pytest.mark.parametrize("line", ["{", "[]", '"a"', "7", "[" * 100_000, '{"digest": "a", "name": "b", "colour": "c"}'])
def test_line_that_is_no_key(tmp_path: Path, line: str) -> None:
    """A line that is no JSON object, or has fields that are not known, is refused; the others are read."""
    good = json.dumps({"digest": HEX, "name": "a"})
    rows = read(tmp_path, f"{good}\n{line}\n{good}\n", "keys.jsonl")
    assert [False, True, False] == [bool(row.faults) for row in rows]


def test_wrong_number_of_columns(tmp_path: Path) -> None:
    """A row with more or fewer columns than the header has is refused; the others are read."""
    rows = read(tmp_path, f"{HEADER}{HEX}\n{HEX},a\n{HEX},a,b\n")
    assert ["must have 2 columns, and has 1", "must have 2 columns, and has 3"] == [
        row.faults[0][1] for row in rows if row.faults
    ]


def test_empty_values_are_absent(tmp_path: Path) -> None:
    """Columns that are empty are as if they were not there."""
    columns = list(READERS)
    values = [{"digest": HEX, "name": "a"}.get(name, "") for name in columns]
    (key,) = keys(read(tmp_path, f"{','.join(columns)}\n{','.join(values)}\n"))
    assert pb.ImportedKey(row=2, digest=sha256(TOKEN), name="a") == key


def test_batches_are_bounded() -> None:
    """Rows are put into requests of bounded number and size, in their order, each once."""
    small = [FileRow(line=number, key=pb.ImportedKey(row=number)) for number in range(BATCH_ROWS * 2 + 1)]
    assert [BATCH_ROWS, BATCH_ROWS, 1] == [len(batch.rows) for batch in batches(iter(small), "acme")]
    large = [FileRow(line=number, key=pb.ImportedKey(row=number, name="a" * 4096)) for number in range(2 * BATCH_ROWS)]
    made = list(batches(iter(large), "acme"))
    assert [row.line for row in large] == [key.row for batch in made for key in batch.request.keys]
    assert all(batch.request.ByteSize() < BATCH_BYTES + 5000 for batch in made)
    assert {"acme"} == {batch.request.organization_id for batch in made}
    wrong = FileRow(line=7, faults=(("", "wrong"),))
    ((rows, request),) = [(batch.rows, batch.request) for batch in batches(iter([small[0], wrong]), "")]
    assert (2, 1) == (len(rows), len(request.keys))


def test_times_keep_their_moment(tmp_path: Path) -> None:
    """Times with an offset are the same moment in UTC."""
    (key,) = keys(read(tmp_path, f"digest,name,expire_time\n{HEX},{foreign_token()},2090-01-01T01:00:00+01:00\n"))
    expected = timestamp(key.expire_time.ToDatetime())
    assert "2090-01-01T00:00:00Z" == expected.ToJsonString()
