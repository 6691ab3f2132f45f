"""Clusters in a process of their own, as other processes of the user see them: their names, states, and sockets."""
