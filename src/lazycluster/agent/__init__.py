"""The part that runs on hosts: Python 3.8 or newer, standard library only, imports nothing else of lazycluster.

Some of its modules run on the manager, too: the frames, both sides of copies, and checks of directories.
"""
