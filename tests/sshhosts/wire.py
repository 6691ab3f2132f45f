"""A bad cable between two network interfaces: late, slow, lossy. Run as a script, as root, standard library only.

It takes every frame from one interface to the other, as a switch of its own would, for kernels without netem:
``wire.py INTERFACE INTERFACE '{"delay": seconds, "loss": [fraction, fraction], "rate": bytes per second}'``, each of
which holds for either way; losses are those of frames from the first, and from the second. It says when it is ready,
and ends when its input does.
"""

import heapq
import json
import os
import random
import select
import signal
import socket
import sys
import time

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
# Whole segments of TCP come as one frame, which the header says; so nothing has to be cut or summed up here.
LONGEST_FRAME = 10 + 65536 + 64
LONGEST_QUEUE = 128 * 1024  # bytes that wait for a slow cable; what comes beyond is lost, as in any router


def end_of(name):
    """A socket that takes and gives whole frames of an interface."""
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    found.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    found.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    found.bind((name, ETH_P_ALL))
    found.setblocking(False)
    return found


class Direction:
    """What goes from one end to the other."""

    def __init__(self, source, target, delay, loss, rate):
        self.source, self.target = source, target
        self.delay, self.loss, self.rate = delay, loss, rate
        self.free = 0.0  # when the last frame that waits has left

    def take(self, now):
        """Yield when each frame that has come is to arrive, and the frame."""
        while True:
            try:
                frame = self.source.recv(LONGEST_FRAME)
            except (BlockingIOError, OSError):
                return
            if random.random() < self.loss:
                continue
            leaves = now
            if self.rate:
                if (self.free - now) * self.rate > LONGEST_QUEUE:
                    continue
                leaves = self.free = max(self.free, now) + len(frame) / self.rate
            yield leaves + self.delay, frame


def carry(directions):
    """Carry frames until the input ends."""
    waiting, number = [], 0
    sources = [direction.source for direction in directions]
    while True:
        pause = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        ready = select.select([0, *sources], [], [], pause)[0]
        if 0 in ready and not os.read(0, 1):
            return
        now = time.monotonic()
        for direction in directions:
            for due, frame in direction.take(now):
                number += 1
                heapq.heappush(waiting, (due, number, direction.target, frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, frame = heapq.heappop(waiting)
            try:
                target.send(frame)
            except OSError:  # the other end is down, or its queue is full: a cable tells nobody
                continue


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first, second = end_of(sys.argv[1]), end_of(sys.argv[2])
    settings = json.loads(sys.argv[3])
    ways = ((first, second), (second, first))
    directions = [
        Direction(*way, settings["delay"], loss, settings["rate"])
        for way, loss in zip(ways, settings["loss"], strict=True)
    ]
    os.write(1, b"ready\n")
    carry(directions)


if __name__ == "__main__":
    main()
