"""The small MongoDB server: what commands do, without a network."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bson")

from bson import Binary, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycluster.engines.hyperopt.mongo import codec, wire
from lazycluster.engines.hyperopt.mongo.dispatch import ClientSession, Dispatcher
from lazycluster.engines.hyperopt.mongo.errors import CommandError
from lazycluster.engines.hyperopt.mongo.query import compile_filter, compile_projection
from lazycluster.engines.hyperopt.mongo.scram import Conversation, ScramCredentials
from lazycluster.engines.hyperopt.mongo.store import DocumentStore, StoreError
from lazycluster.engines.hyperopt.mongo.updates import compile_update
from lazycluster.engines.hyperopt.mongo.values import order


class Database:
    """An engine, spoken to as drivers do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = DocumentStore(str(path))
        self.engine = Dispatcher(self.store, None)

    def __call__(self, name: str, value: Any = 1, **fields: Any) -> dict[str, Any]:
        reply = self.engine.run(ClientSession(), {name: value, **fields, "$db": "db"})
        assert self.engine.commit() is None
        return codec.decode(codec.encode(reply))

    def find(self, conditions: Any = None, **fields: Any) -> list[Any]:
        reply = self("find", "c", filter=conditions or {}, **fields)
        assert reply["ok"], reply
        return reply["cursor"]["firstBatch"]

    def ids(self, conditions: Any = None, **fields: Any) -> list[Any]:
        return [document["_id"] for document in self.find(conditions, **fields)]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "db")
    yield database
    database.store.close()


@pytest.fixture
def people(db: Database) -> Database:
    documents = [
        {"_id": 1, "name": "a", "age": 3, "tags": ["x", "y"], "at": {"b": 1}},
        {"_id": 2, "name": "b", "age": 5.0, "tags": [], "at": [{"b": 2}, {"b": 3}]},
        {"_id": 3, "name": "c", "age": None, "tags": ["y"]},
        {"_id": 4, "name": "d", "age": math.nan},
    ]
    assert db("insert", "c", documents=documents)["n"] == 4
    return db


@pytest.mark.parametrize(
    ("conditions", "ids"),
    [
        ({}, [1, 2, 3, 4]),
        ({"age": 5}, [2]),
        ({"age": None}, [3]),
        ({"tags": None}, [4]),
        ({"age": math.nan}, [4]),
        ({"age": {"$gt": 3}}, [2]),
        ({"age": {"$gte": 3, "$lt": 5}}, [1]),
        ({"age": {"$ne": 3}}, [2, 3, 4]),
        ({"age": {"$in": [3, 5]}}, [1, 2]),
        ({"age": {"$nin": [3, None]}}, [2, 4]),
        ({"tags": "y"}, [1, 3]),
        ({"tags": ["y"]}, [3]),
        ({"tags": {"$size": 0}}, [2]),
        ({"tags": {"$exists": False}}, [4]),
        ({"at.b": 3}, [2]),
        ({"at.0.b": 2}, [2]),
        ({"at": {"b": 1}}, [1]),
        ({"name": {"$regex": "^[ab]"}}, [1, 2]),
        ({"name": Regex("^D$", "i")}, [4]),
        ({"$or": [{"_id": 1}, {"age": {"$lt": 100}, "name": "b"}]}, [1, 2]),
        ({"$nor": [{"_id": 1}, {"_id": 2}]}, [3, 4]),
        ({"$and": [{"_id": {"$gt": 1}}, {"_id": {"$lt": 3}}]}, [2]),
        ({"age": {"$not": {"$gt": 3}}}, [1, 3, 4]),
        ({"_id": {"$in": [4, 1, 9]}}, [1, 4]),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_filters(people: Database, conditions: Any, ids: list[int], indexed: bool) -> None:
    if indexed:
        for name in ("age", "tags", "name", "at.b"):
            people("createIndexes", "c", indexes=[{"key": {name: 1}, "name": name}])
    assert sorted(people.ids(conditions)) == ids
    assert people("count", "c", query=conditions)["n"] == len(ids)


def test_sorting_skipping_limiting_projecting(people: Database) -> None:
    assert people.ids(sort={"age": 1}) == [3, 4, 1, 2]
    assert people.ids(sort={"age": -1}) == [2, 1, 4, 3]
    assert people.ids(sort={"_id": -1}, skip=1, limit=2) == [3, 2]
    assert people.ids(sort={"$natural": -1}, limit=1) == [4]
    assert people.find({"_id": 1}, projection={"at.b": 1, "_id": 0}) == [{"at": {"b": 1}}]
    assert people.find({"_id": 2}, projection={"tags": 0, "age": 0, "at.b": 0}) == [
        {"_id": 2, "name": "b", "at": [{}, {}]}
    ]


def _trial(number: int, state: int, loss: float | None, owner: str | None = "host1-0") -> Any:
    result = {"status": "new"} if loss is None else {"status": "ok", "loss": loss}
    return {"_id": number, "state": state, "owner": owner, "result": result}


@pytest.mark.parametrize(
    ("pipeline", "found"),
    [
        (
            [
                {
                    "$group": {
                        "_id": "$state",
                        "n": {"$sum": 1},
                        "best": {"$min": "$result.loss"},
                        "worst": {"$max": "$result.loss"},
                        "mean": {"$avg": "$result.loss"},
                    }
                },
                {"$sort": {"_id": 1}},
            ],
            [
                {"_id": 0, "n": 1, "best": None, "worst": None, "mean": None},
                {"_id": 2, "n": 3, "best": 0.5, "worst": 4, "mean": 2.5},
            ],
        ),
        (
            [
                {"$match": {"state": 2}},
                {"$group": {"_id": "$owner", "total": {"$sum": "$result.loss"}}},
                {"$sort": {"total": -1}},
            ],
            [{"_id": "host1-0", "total": 4.5}, {"_id": "host2-0", "total": 3}],
        ),
        (
            [{"$group": {"_id": None, "n": {"$count": {}}, "first": {"$first": "$_id"}}}],
            [{"_id": None, "n": 4, "first": 1}],
        ),
        (
            [
                {"$group": {"_id": {"state": "$state", "owner": "$owner"}, "ids": {"$push": "$_id"}}},
                {"$match": {"_id.state": 2}},
            ],
            [
                {"_id": {"state": 2, "owner": "host1-0"}, "ids": [1, 3]},
                {"_id": {"state": 2, "owner": "host2-0"}, "ids": [2]},
            ],
        ),
        (
            [{"$sort": {"result.loss": -1}}, {"$limit": 1}, {"$project": {"result.loss": 1}}],
            [{"_id": 3, "result": {"loss": 4}}],
        ),
        ([{"$group": {"_id": "$no.such.field", "states": {"$addToSet": "$state"}}}], [{"_id": None, "states": [2, 0]}]),
        ([{"$match": {"state": 9}}, {"$group": {"_id": "$state", "n": {"$sum": 1}}}], []),
        ([{"$match": {"state": 2}}, {"$count": "trials"}], [{"trials": 3}]),
        ([], [_trial(1, 2, 0.5), _trial(2, 2, 3, "host2-0"), _trial(3, 2, 4), _trial(4, 0, None, None)]),
    ],
)
def test_aggregations(db: Database, pipeline: list[Any], found: list[Any]) -> None:
    trials = [_trial(1, 2, 0.5), _trial(2, 2, 3, "host2-0"), _trial(3, 2, 4), _trial(4, 0, None, None)]
    db("insert", "c", documents=trials)
    assert db("aggregate", "c", pipeline=pipeline, cursor={})["cursor"]["firstBatch"] == found


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ([{"$lookup": {}}], "the stage $lookup is not supported by this server; it has: $match, $group"),
        ([{"$group": {"_id": 1, "n": {"$stdDevPop": "$x"}}}], "the accumulator $stdDevPop is not supported"),
        ([{"$group": {"_id": {"$year": "$book_time"}}}], "the operator $year is not supported"),
        ([{"$group": {"n": {"$sum": 1}}}], "_id"),
        ([{"$group": {"_id": "$$NOW"}}], "the variable"),
        ([{"$limit": 0}], "$limit must be"),
        ([{"$count": "$a"}], "$count must be"),
        ([{"$group": {"_id": 1, "n": {"$sum": 1}}}, {"$sort": {}}], "$sort must"),
    ],
)
def test_aggregations_that_there_are_not_are_refused_by_name(db: Database, pipeline: list[Any], says: str) -> None:
    db("insert", "c", documents=[{"_id": 1}])
    answer = db("aggregate", "c", pipeline=pipeline, cursor={})
    assert answer["ok"] == 0
    assert says in answer["errmsg"]


def test_batches(db: Database) -> None:
    db("insert", "c", documents=[{"_id": number} for number in range(250)])
    reply = db("find", "c")
    assert len(reply["cursor"]["firstBatch"]) == 101
    number = reply["cursor"]["id"]
    more = db("getMore", number, collection="c", batchSize=100)["cursor"]
    assert [document["_id"] for document in more["nextBatch"]] == list(range(101, 201))
    db("delete", "c", deletes=[{"q": {"_id": {"$gte": 240}}, "limit": 0}])
    assert len(db("getMore", number, collection="c")["cursor"]["nextBatch"]) == 39
    assert db("getMore", number, collection="c")["code"] == 43
    number = db("find", "c", batchSize=1)["cursor"]["id"]
    assert db("killCursors", "c", cursors=[number])["cursorsKilled"] == [number]
    assert db("find", "c", batchSize=5, singleBatch=True)["cursor"]["id"] == 0


def test_counting(people: Database) -> None:
    assert people("count", "c")["n"] == 4
    assert people("count", "c", query={"age": {"$gt": 0}}, skip=1)["n"] == 1
    group = {"$group": {"_id": 1, "n": {"$sum": 1}}}
    pipeline = [{"$match": {"_id": {"$gt": 1}}}, group]
    assert people("aggregate", "c", pipeline=pipeline, cursor={})["cursor"]["firstBatch"] == [{"_id": 1, "n": 3}]
    assert people("aggregate", "nothing", pipeline=[group], cursor={})["cursor"]["firstBatch"] == []
    assert people("aggregate", "c", pipeline=[{"$lookup": {}}], cursor={})["code"] == 40324
    assert people("distinct", "c", key="tags")["values"] == ["x", "y"]
    assert people("distinct", "c", key="age", query={"_id": {"$lt": 3}})["values"] == [3, 5]


def test_updates(people: Database) -> None:
    reply = people("update", "c", updates=[{"q": {"_id": 1}, "u": {"$set": {"at.b": 7, "n.m": 1}, "$inc": {"age": 2}}}])
    assert (reply["n"], reply["nModified"]) == (1, 1)
    (document,) = people.find({"_id": 1})
    assert (document["at"], document["n"], document["age"]) == ({"b": 7}, {"m": 1}, 5)
    assert people("update", "c", updates=[{"q": {"_id": 1}, "u": {"$set": {"name": "a"}}}])["nModified"] == 0
    everything = {"q": {}, "u": {"$unset": {"tags": 1}, "$push": {"log": "x"}}, "multi": True}
    assert people("update", "c", updates=[everything])["n"] == 4
    assert people.find({"_id": 3}) == [{"_id": 3, "name": "c", "age": None, "log": ["x"]}]
    reply = people("update", "c", updates=[{"q": {"_id": 9}, "u": {"$setOnInsert": {"new": 1}}, "upsert": True}])
    assert reply["upserted"] == [{"index": 0, "_id": 9}]
    assert people.find({"_id": 9}) == [{"_id": 9, "new": 1}]
    people("update", "c", updates=[{"q": {"_id": 9}, "u": {"other": 2}}])
    assert people.find({"_id": 9}) == [{"_id": 9, "other": 2}]


def test_find_and_modify(people: Database) -> None:
    change = {"query": {"age": {"$gt": 0}}, "sort": {"age": -1}, "update": {"$set": {"age": 0}}}
    assert people("findAndModify", "c", **change)["value"]["age"] == 5
    assert people("findAndModify", "c", **change, new=True, fields={"age": 1})["value"] == {"_id": 1, "age": 0}
    assert people("findAndModify", "c", **change)["value"] is None
    assert people("findAndModify", "c", query={"_id": 1}, remove=True)["value"]["_id"] == 1
    reply = people("findAndModify", "c", query={"a": 0}, update={"$inc": {"k": 3}}, upsert=True, new=True)
    assert reply["value"]["k"] == 3
    assert reply["value"]["a"] == 0


def test_an_index_follows_what_is_changed(db: Database) -> None:
    db("createIndexes", "c", indexes=[{"key": {"k": 1, "x": 1}, "name": "k"}, {"key": {"k": 1}, "name": "less"}])
    db("insert", "c", documents=[{"_id": 1, "k": 1, "x": None}])
    for value in (True, 1.5, "1", None, [1, 2], [1, True], {"a": 1}, {"a": True}, math.nan, 1):
        db("update", "c", updates=[{"q": {"_id": 1}, "u": {"$set": {"k": value}}}])
        assert [document["_id"] for document in db.find({"k": value})] == [1]
        others = {"_id": {"$ne": 1}, "k": {"$in": [1, True, "1", 1.5, None, 2]}}
        assert db.find(others) == []
    assert db.find({"k": 1, "x": None}) == [{"_id": 1, "k": 1, "x": None}]
    assert db("update", "c", updates=[{"q": {"_id": 1}, "u": {"$unset": {"x": 1}}}])["nModified"] == 1
    assert db.find({"k": 1, "x": None}) == [{"_id": 1, "k": 1}]
    assert db.find({"k": True}) == []


def test_unique_indexes(db: Database) -> None:
    assert db("createIndexes", "c", indexes=[{"key": {"k": 1}, "name": "k_1", "unique": True}])["ok"]
    assert db("insert", "c", documents=[{"_id": 1, "k": 1}, {"_id": 2, "k": 1.0}, {"_id": 3, "k": 2}])["n"] == 1
    reply = db("insert", "c", documents=[{"_id": 2, "k": 1.0}, {"_id": 3, "k": 2}], ordered=False)
    assert reply["n"] == 1
    assert reply["writeErrors"][0]["code"] == 11000
    assert db("insert", "c", documents=[{"_id": 3, "k": 9}])["writeErrors"][0]["keyValue"] == {"_id": 3}
    assert db("update", "c", updates=[{"q": {"_id": 3}, "u": {"$set": {"k": 1}}}])["writeErrors"][0]["code"] == 11000
    assert db("update", "c", updates=[{"q": {"_id": 3}, "u": {"$set": {"j": 1}}}])["nModified"] == 1
    db("delete", "c", deletes=[{"q": {"_id": 1}, "limit": 1}])
    assert db("insert", "c", documents=[{"_id": 4, "k": 1}])["n"] == 1
    names = [index["name"] for index in db("listIndexes", "c")["cursor"]["firstBatch"]]
    assert names == ["_id_", "k_1"]
    assert db("createIndexes", "d", indexes=[{"key": {"x": 1}, "name": "x"}])["numIndexesAfter"] == 2
    assert db("dropIndexes", "c", index="k_1")["ok"]
    assert db("insert", "c", documents=[{"_id": 5, "k": 1}])["n"] == 1
    assert db("createIndexes", "c", indexes=[{"key": {"k": 1}, "name": "k_1", "unique": True}])["code"] == 11000
    assert len(db("listIndexes", "c")["cursor"]["firstBatch"]) == 1


def test_collections_and_databases(db: Database) -> None:
    db("insert", "a", documents=[{}])
    db("insert", "fs.files", documents=[{}])
    listed = db("listCollections")["cursor"]["firstBatch"]
    assert [entry["name"] for entry in listed] == ["a", "fs.files"]
    assert [entry["name"] for entry in db("listDatabases")["databases"]] == ["db"]
    assert db("drop", "a")["ok"]
    assert db("drop", "a")["code"] == 26
    assert db("dropDatabase")["ok"]
    assert db("listCollections")["cursor"]["firstBatch"] == []


@pytest.mark.parametrize(
    ("name", "value", "fields", "code", "message"),
    [
        ("mapReduce", "c", {}, 59, "no such command: 'mapReduce'"),
        ("find", "c", {"collation": {}}, 40415, "find.collation"),
        ("find", "c", {"filter": {"a": {"$near": 1}}}, 2, "unknown operator: $near"),
        ("find", "c", {"filter": {"$where": "x"}}, 2, "$where"),
        ("find", "c", {"filter": {"a": {"$in": 3}}}, 2, "array"),
        ("find", "c", {"limit": -1}, 2, "limit"),
        ("find", "", {}, 73, "collection name"),
        ("find", 7, {}, 73, "collection name"),
        ("find", "c", {"projection": {"a": 1, "b": 0}}, 9, "projection"),
        ("findAndModify", "c", {"query": {}}, 2, "must be specified"),
        ("insert", "c", {"documents": []}, 2, "documents"),
        ("createIndexes", "c", {"indexes": [{"key": {"a": "text"}, "name": "a"}]}, 115, "not supported"),
        ("listIndexes", "c", {}, 26, "does not exist"),
        ("find", "c", {"filter": {"a": {"$in": [{"$gt": 1}]}}}, 2, "cannot nest $ under $in"),
        ("find", "c", {"filter": {"a": {"$ne": Regex("a")}}}, 2, "regex as arg to $ne"),
        ("find", "c", {"filter": {"a": {"$gt": Regex("a")}}}, 2, "RegEx as arg to predicate over field 'a'"),
        ("find", "c", {"filter": {"a": {"$not": 3}}}, 2, "$not needs a regex"),
        ("find", "c", {"filter": {"a": Regex("(")}}, 2, "'(' is not supported"),
        ("find", "c", {"filter": {"a": {"$in": [Regex("^[[:alpha:]_]")]}}}, 2, "[:alpha:] is unknown"),
        ("find", "c", {"filter": {"a": {"$options": "i"}}}, 2, "$options needs a $regex"),
        ("find", "c", {"filter": {"a": {"$regex": "a", "$options": 3}}}, 2, "$regex has to be a string"),
        ("listDatabases", 1, {"filter": {"sizeOnDisk": {"$gt": 1}}}, 2, "cannot be filtered by sizeOnDisk"),
        ("listDatabases", 1, {"filter": {"name": {"$near": 1}}}, 2, "unknown operator: $near"),
    ],
)
def test_what_it_does_not_know_it_refuses(
    db: Database, name: str, value: Any, fields: Any, code: int, message: str
) -> None:
    reply = db(name, value, **fields)
    assert reply["ok"] == 0
    assert reply["code"] == code
    assert message in reply["errmsg"]
    assert reply["codeName"] != "UnknownError"


@pytest.mark.parametrize("indexed", [False, True])
def test_regular_expressions_among_values(db: Database, indexed: bool) -> None:
    stored = ["train", "test", "trial", Regex("^t"), None, 5, ["train", "x"]]
    db("insert", "c", documents=[{"_id": number, "name": name} for number, name in enumerate(stored)])
    if indexed:
        assert db("createIndexes", "c", indexes=[{"key": {"name": 1}, "name": "n"}])["ok"]
    for conditions, ids in (
        ({"name": {"$in": [Regex("^tr")]}}, [0, 2, 6]),
        ({"name": {"$in": [Regex("^TR", "i"), "test"]}}, [0, 1, 2, 6]),
        ({"name": {"$in": [Regex("^t"), None]}}, [0, 1, 2, 3, 4, 6]),
        ({"name": {"$in": [Regex("nothing")]}}, []),
        ({"name": {"$nin": [Regex("^tr")]}}, [1, 3, 4, 5]),
        ({"name": {"$nin": [Regex("^t"), 5]}}, [4]),
        ({"name": Regex("^t")}, [0, 1, 2, 3, 6]),
        ({"name": {"$not": Regex("^t")}}, [4, 5]),
        ({"name": {"$eq": Regex("^t")}}, [3]),
        ({"$and": [{"name": {"$in": [Regex("st$")]}}, {"_id": {"$in": [0, 1]}}]}, [1]),
    ):
        assert db.ids(conditions) == ids, conditions
        assert db("count", "c", query=conditions)["n"] == len(ids), conditions
    assert db("delete", "c", deletes=[{"q": {"name": {"$nin": [Regex("^tr"), 5]}}, "limit": 0}])["n"] == 3
    assert db.ids() == [0, 2, 5, 6]


@pytest.mark.parametrize("limit", [2, -1, True, None, "1"])
def test_deletions_of_another_number_than_one_or_all(db: Database, limit: Any) -> None:
    db("insert", "c", documents=[{"_id": 1}, {"_id": 2}, {"_id": 3}])
    (error,) = db("delete", "c", deletes=[{"q": {}, "limit": limit}])["writeErrors"]
    assert error["code"] == 9
    assert db.ids() == [1, 2, 3]


@pytest.mark.parametrize("command", ["find", "count", "aggregate"])
def test_hints_name_an_index(db: Database, command: str) -> None:
    fields = {"pipeline": [{"$group": {"_id": 1, "n": {"$sum": 1}}}], "cursor": {}} if command == "aggregate" else {}
    assert db(command, "missing", **fields, hint="none")["ok"]
    db("insert", "c", documents=[{"a": 1}])
    db("createIndexes", "c", indexes=[{"key": {"a": 1, "b": -1}, "name": "ab"}])
    for hint in ("_id_", {"_id": 1}, {"$natural": 1}, "ab", {"a": 1, "b": -1}):
        assert db(command, "c", **fields, hint=hint)["ok"], hint
    for hint in ("ba", {"a": 1}, {"b": -1, "a": 1}, {"_id": -1}, {"$natural": -1}, 3):
        reply = db(command, "c", **fields, hint=hint)
        assert (reply["ok"], reply["code"]) == (0, 2), hint
        assert "existing index" in reply["errmsg"]


@pytest.mark.parametrize(
    ("value", "code"),
    [({"$gt": 1}, 52), ({"a": {"$x": 1}}, 52), ({"a": [{"$x": 1}]}, 52), ([1], 53), (Regex("a"), 53)],
)
@pytest.mark.parametrize("how", ["insert", "upsert"])
def test_ids_that_could_not_be_looked_for(db: Database, how: str, value: Any, code: int) -> None:
    if how == "insert":
        reply = db("insert", "c", documents=[{"_id": value}])
    else:
        reply = db("update", "c", updates=[{"q": {"a": 1}, "u": {"$set": {"_id": value}}, "upsert": True}])
    assert [error["code"] for error in reply["writeErrors"]] == [code]
    assert db.ids() == []


def test_databases_are_filtered(db: Database) -> None:
    for name in ("one", "two"):
        db.engine.run(ClientSession(), {"insert": "c", "documents": [{}], "$db": name})
    db.engine.commit()
    for conditions, names in (
        ({}, ["one", "two"]),
        ({"name": "two"}, ["two"]),
        ({"name": Regex("^o")}, ["one"]),
        ({"empty": True}, []),
        ({"name": {"$in": ["one", "three"]}, "empty": False}, ["one"]),
    ):
        for only in (True, False):
            found = db("listDatabases", filter=conditions, nameOnly=only)["databases"]
            assert [one["name"] for one in found] == names


@pytest.mark.parametrize(
    "change",
    [
        {"$set": {"a": 1}, "$inc": {"a": 1}},
        {"$set": {"a": 1, "a.b": 2}},
        {"$set": {"a.b.c": 1}, "$unset": {"a": ""}},
        {"$set": {"a": 1}, "$setOnInsert": {"a": 2}},
        {"$push": {"a": 1}, "$set": {"a.0": 1}},
    ],
)
@pytest.mark.parametrize("upsert", [False, True])
def test_changes_that_conflict_are_refused(db: Database, change: Any, upsert: bool) -> None:
    db("insert", "c", documents=[{"_id": 1, "a": [1]}])
    statement = {"q": {"_id": 2 if upsert else 1}, "u": change, "upsert": upsert}
    (error,) = db("update", "c", updates=[statement])["writeErrors"]
    assert error["code"] == 40
    assert "would create a conflict at 'a" in error["errmsg"]
    assert db.find() == [{"_id": 1, "a": [1]}]
    assert db("update", "c", updates=[{"q": {}, "u": {"$set": {"ab": 1, "abc.d": 2, "b.a": 3}}}])["nModified"] == 1


def test_many_documents_are_not_replaced_by_one(db: Database) -> None:
    db("insert", "c", documents=[{"_id": 1}, {"_id": 2}])
    (error,) = db("update", "c", updates=[{"q": {}, "u": {"a": 1}, "multi": True}])["writeErrors"]
    assert error["code"] == 9
    assert db.find() == [{"_id": 1}, {"_id": 2}]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"$rename": {"a": "b"}}, 9),
        ([{"$set": {"a": 1}}], 9),
        ({"$set": {"a.$": 1}}, 2),
        ({"$set": {"_id": 2}}, 66),
        ({"$inc": {"s": 1}}, 14),
        ({"$inc": {"big": 1}}, 2),
        ({"$push": {"s": 1}}, 2),
        ({"$set": {"s.x": 1}}, 28),
    ],
)
def test_updates_that_are_refused_change_nothing(db: Database, change: Any, code: int) -> None:
    document = {"_id": 1, "s": "text", "big": Int64(2**63 - 1)}
    db("insert", "c", documents=[document])
    reply = db("update", "c", updates=[{"q": {}, "u": change}])
    assert (reply.get("code") or reply["writeErrors"][0]["code"]) == code
    assert db.find() == [document]


def test_values_come_back_as_they_were(db: Database) -> None:
    document = {
        "_id": ObjectId(),
        "nan": math.nan,
        "inf": [math.inf, -math.inf, -0.0],
        "date": datetime.datetime(2024, 2, 29, 1, 2, 3, 4000),
        "binary": b"\x00\xff",
        "uuid": Binary(b"x" * 16, 4),
        "long": Int64(7),
        "int": 7,
        "none": None,
        "stamp": Timestamp(3, 4),
        "ends": [MinKey(), MaxKey()],
        "text": "é\0ü",
    }
    db("insert", "c", documents=[document])
    db("update", "c", updates=[{"q": {}, "u": {"$set": {"new": True}}}])
    body = db.store.collection("db.c").body(1)
    assert body is not None
    assert body == codec.encode({**document, "new": True})
    assert type(codec.decode(body)["long"]) is Int64


def test_documents_that_are_too_large(db: Database) -> None:
    reply = db("insert", "c", documents=[{"x": b"x" * codec.LARGEST}])
    assert reply["writeErrors"][0]["code"] == 10334


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    first = Database(tmp_path)
    first("createIndexes", "c", indexes=[{"key": {"k": 1}, "name": "k", "unique": True}])
    first("insert", "c", documents=[{"_id": 1, "k": 1}])
    with pytest.raises(StoreError, match=r"locked by another server that uses it \(process \d+\)"):
        DocumentStore(str(tmp_path))
    first.store.close()
    second = Database(tmp_path)
    assert second.find({"k": 1}) == [{"_id": 1, "k": 1}]
    assert second("insert", "c", documents=[{"_id": 2, "k": 1}])["writeErrors"]
    second.store.close()


def test_files_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "lazycluster-mongo.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match="not a database"):
        DocumentStore(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        DocumentStore(str(tmp_path / "file" / "db"))


# --- logging in ----------------------------------------------------------------------------------
def test_only_who_logs_in_may_do_anything(tmp_path: Path) -> None:
    store = DocumentStore(str(tmp_path))
    engine = Dispatcher(store, ScramCredentials.of("me", "secret"))
    session = ClientSession()
    for name in ("find", "insert", "listDatabases", "dropDatabase", "nonsense", "getMore"):
        assert engine.run(session, {name: "c", "$db": "db"})["code"] == 13
    for payload in (b"", b"n,,n=me,r=", b"y,,n=me,r=x", b"n,,n=you", b"n,,m=1,n=me,r=x", 3, None):
        start = {"saslStart": 1, "mechanism": "SCRAM-SHA-256", "payload": payload, "$db": "admin"}
        assert engine.run(session, start)["code"] == 18
    assert engine.run(session, {"saslStart": 1, "mechanism": "PLAIN", "payload": b""})["code"] == 334
    assert engine.run(session, {"saslContinue": 1, "payload": b""})["code"] == 18
    assert not session.authenticated
    assert "stored_key" not in repr(ScramCredentials.of("me", "secret"))
    store.close()


def test_a_wrong_proof_is_refused() -> None:
    conversation = Conversation(ScramCredentials.of("me", "secret"))
    first = conversation.answer(b"n,,n=me,r=abc")
    nonce = first.split(b",")[0][2:]
    for proof in (b"", b"AAAA", b"%%", b"A" * 43 + b"="):
        fresh = Conversation(ScramCredentials.of("me", "secret"))
        nonce = fresh.answer(b"n,,n=me,r=abc").split(b",")[0][2:]
        with pytest.raises(CommandError):
            fresh.answer(b"c=biws,r=" + nonce + b",p=" + proof)
        assert not fresh.done


# --- properties ----------------------------------------------------------------------------------
_numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.sampled_from([2**53, 2**53 + 1, float(2**53)])
)
_plain = st.one_of(st.none(), st.booleans(), _numbers, st.text(max_size=5), st.binary(max_size=5))
_values = st.recursive(
    _plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.$", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(_numbers, _numbers)
def test_numbers_are_ordered_as_numbers(one: Any, other: Any) -> None:
    assert (order(one) < order(other)) == (one < other)
    assert (order(one) == order(other)) == (one == other)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=4), max_size=3), st.lists(st.text(max_size=4), max_size=3))
def test_lists_are_ordered_as_lists(one: list[str], other: list[str]) -> None:
    encoded = [[text.encode() for text in texts] for texts in (one, other)]
    assert (order(one) < order(other)) == (encoded[0] < encoded[1])


@settings(deadline=None, max_examples=60)
@given(_values, _values)
def test_no_filter_projection_or_update_fails_in_a_way_of_its_own(value: Any, conditions: Any) -> None:
    document = {"_id": 1, "a": value, "b": {"a": value}}
    for compile_it in (compile_filter, compile_projection, compile_update):
        for wanted in (conditions, {"a": conditions}, {"$set": conditions}, {"a": {"$in": conditions}}):
            try:
                result: Any = compile_it(wanted)
                if result is not None:
                    result(document, False) if compile_it is compile_update else result(document)
            except CommandError:
                continue


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=80), st.integers(0, 60), st.binary(max_size=4))
def test_malformed_messages_are_told_from_others(tail: bytes, position: int, noise: bytes) -> None:
    body = codec.encode({"find": "c", "$db": "db", "filter": {"a": [1, "x"]}})
    good = wire.HEADER.pack(21 + len(body), 1, 0, 2013) + b"\0\0\0\0\0" + body
    assert wire.parse(good).command["find"] == "c"
    for message in (good[:position] + noise + good[position:], good[:16] + tail, good + tail, tail.ljust(16, b"\0")):
        try:
            wire.length_of(message)
            wire.parse(message)
        except wire.MessageError:
            continue
