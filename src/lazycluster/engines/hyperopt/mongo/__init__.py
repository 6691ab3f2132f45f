"""A small server that speaks MongoDB's wire protocol, for hyperopt, on `bson` and SQLite.

What it is: the master of a `HyperoptCluster`, by default. It has the commands that hyperopt's
`MongoTrials`, GridFS and a user who looks into trials with PyMongo need: find (filter, sort, projection, skip, limit,
batches), count, distinct, insert, update, delete, findAndModify, indexes (also unique ones), the lists of databases
and collections, and of the aggregations those that count. Whoever connects proves with SCRAM-SHA-256 that he knows the
password, and the server by TLS that it is the one of this cluster. What was acknowledged is on the disk, and survives
the death of the server (SQLite, WAL, full synchronisation); commands that arrive at the same time share one
synchronisation.

What it is not: a MongoDB. There are no replica sets, transactions, sessions, aggregation pipelines, text or
geographic queries, collations, users and roles, or compression; it listens on the loopback interface only. What it
does not know it refuses, with MongoDB's own error code and the name of what it does not know. Comparing 128-bit
decimals is as exact as a double.

The modules import nothing but each other, those in `lazycluster.cluster.sent`, `bson` and the standard library, since
they also run as a program that is sent as text.
"""

from __future__ import annotations
