"""Forwarders for programs that know only TCP, UDP or UNIX sockets: `shmsock forward`, `socks5` and `nc`."""
