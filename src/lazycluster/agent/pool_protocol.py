"""Messages between manager, agent and workers of a pool; used by all three.

Manager to agent, in the INPUT of the pool's channel: records, each a head and `size` bytes.
Agent to worker: chunks as they came, over a queue that all workers of the pool take from; blobs as descriptors, over a
socket of each worker's own.
Worker to agent and manager: answers, over the worker's own socket; in the OUTPUT of the channel each piece of them
begins with the number of the worker, so that no answer has to wait for a large one.
"""

from __future__ import annotations

import struct

RECORD = struct.Struct("!BIQIIQ")  # kind, blob (the function's), number, first, count, size
# A chunk holds the arguments of several calls; of those, `count` are to be called, beginning with `first`.
CHUNK, LOCAL_CHUNK = 1, 2  # the second begins with local modules, see `call_process`
LARGE = 64  # added to the kind of a chunk whose bytes come in a descriptor
BLOB = 3  # what several chunks need: kept until it is dropped
DROP = 4  # drop a blob
CANCEL = 5  # end a chunk, whether its calls have begun or not
BACK = 6  # give back up to `count` chunks that were not begun
SMALL = 32 * 1024  # bytes of a chunk above which it goes in a descriptor

ANSWER = struct.Struct("!BQfQ")  # kind, number, seconds that it took, size
RETURNED, MIXED, BROKEN = 1, 2, 3  # all calls returned; each has an outcome of its own; the chunk could not be loaded
NEED = 4  # a blob
READY = 5  # the worker has been initialised
UNFIT = 6  # its initialisation has failed

GIVEN = struct.Struct("!QQ")  # comes with the descriptor of a blob: number, size
MISSING = (1 << 64) - 1  # the size of a blob that is not there

WORKER = struct.Struct("!I")  # before each piece of OUTPUT

SLOT = struct.Struct("!QI")  # on the board, by worker: the chunk that it has, 0 for none; which of its calls
SLOT_SIZE = 16
