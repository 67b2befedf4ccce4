"No test may leave this machine: only Unix sockets and loopback addresses connect, in collection as in the tests."
import ipaddress, os, socket

import pytest

os.environ.update(IN_TEST='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')


class NetworkBlocked(RuntimeError):
    "A test tried to reach another machine; not an OSError, so that no retry or fallback hides it."


def is_loopback(host) -> bool:
    "Whether a host name or address is this machine; None and '' mean any local interface."
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, '', 'localhost'): return True
    try: return ipaddress.ip_address(host.partition('%')[0]).is_loopback
    except ValueError: return False


def guard_socket(method, position=0):
    "`socket.socket`'s method, refusing an internet address that is not loopback."
    def call(self, *args):
        address = args[position] if len(args) > position else None
        internet = self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple)
        if internet and not is_loopback(address[0]):
            raise NetworkBlocked(f'tests may connect to loopback only, not to {address}')
        return method(self, *args)
    return call


def guard_lookup(function):
    "A resolver that knows no other machine."
    def call(host, *args, **kwargs):
        if not is_loopback(host): raise NetworkBlocked(f'tests may look up loopback only, not {host!r}')
        return function(host, *args, **kwargs)
    return call


def pytest_configure(config):
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, position in dict(connect=0, connect_ex=0, sendto=-1, sendmsg=3).items():
        patch.setattr(socket.socket, name, guard_socket(getattr(socket.socket, name), position))
    for name in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex'):
        patch.setattr(socket, name, guard_lookup(getattr(socket, name)))
