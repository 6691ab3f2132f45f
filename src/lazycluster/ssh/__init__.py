"""The connection to one host, on the manager: configuration, ssh process, agent, tunnels, file transfer."""
