"""Hostile programs: each defines the right `f` only if its attack succeeded, so that a pass shows a hole.

`{canary}` is a world-writable file outside the sandbox, `{port}` a port that listens on the host's loopback.
"""

TESTS = "for x in (3, 4, -7):\n    assert f(x) == x * x\n"
RIGHT = "def f(x):\n    return x * x\n"

# Attacks on the machine. `succeeded` is set by the attack.
ATTACKS = {
    "2 GiB of memory": "block = bytearray(2**31); succeeded = len(block) > 0",
    "memory of children": """
import os
def eat():
    block = bytearray(2**28)
    for at in range(0, len(block), 4096): block[at] = 1
    import time; time.sleep(3)
pids = []
for _ in range(40):
    pid = os.fork()
    if pid == 0: eat(); os._exit(0)
    pids.append(pid)
succeeded = len(pids) == 40
""",
    "a file of 64 MiB": "open('/tmp/big', 'wb').write(bytes(2**26)); succeeded = True",
    "a hole of 64 MiB": "open('/tmp/big', 'wb').truncate(2**26); succeeded = True",
    "many files of 4 MiB": "for n in range(20): open(f'/tmp/{n}', 'wb').write(bytes(2**22))\nsucceeded = True",
    "files in the root and in /dev": """
succeeded = False
for path in ('/x', '/dev/x', '/dev/shm/x', '/guest/x', '/usr/x'):
    try: open(path, 'w').write('x'); succeeded = True
    except OSError: pass
""",
    "memory files": """
import os
fds = [os.memfd_create(str(n)) for n in range(32)]
for fd in fds: os.write(fd, bytes(2**24))
succeeded = True
""",
    "shared memory segments": """
import ctypes
libc = ctypes.CDLL(None)
succeeded = all(libc.shmget(0, 2**26, 0o1600) >= 0 for _ in range(8))
""",
    "60 processes": """
import os, time
for _ in range(60):
    if os.fork() == 0: time.sleep(2); os._exit(0)
succeeded = True
""",
    "200 threads": """
import threading, time
for _ in range(200): threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
succeeded = True
""",
    "reading /etc/passwd": "succeeded = 'root' in open('/etc/passwd').read()",
    "reading it in a shell": """
import subprocess
succeeded = b'root' in subprocess.check_output(['/bin/sh', '-c', 'cat /etc/passwd'])
""",
    "reading a file outside": "succeeded = bool(open({canary!r}).read())",
    "reading homes": """
import os
succeeded = any(os.path.exists(path) for path in ('/home', '/root/.bashrc', '/root/.profile', '/var', '/etc/hostname'))
""",
    "reading the environment": "import os\nsucceeded = 'SECRET_OF_THE_TRAINER' in os.environ",
    "reading the environments of others": """
import glob
succeeded = any(b'SECRET' in open(path, 'rb').read() for path in glob.glob('/proc/*/environ'))
""",
    "reading the tests": """
import glob, os
found = [path for path in glob.glob('/guest/**', recursive=True) if path.endswith('/guest/tests.py')]
succeeded = any('x * x' in open(path).read() for path in found if '/lib/' not in path)
for fd in range(64):
    try: succeeded |= b'assert' in os.pread(fd, 4096, 0)
    except OSError: pass
""",
    "writing outside": "open({canary!r}, 'w').write('escaped'); succeeded = True",
    "a symbolic link": """
import os
os.symlink({canary!r}, '/tmp/link')
open('/tmp/link', 'w').write('escaped')
succeeded = True
""",
    "a hard link": "import os\nos.link('/usr/bin/env', '/tmp/env'); succeeded = True",
    "overwriting the interpreter": "import sys\nopen(sys.executable, 'ab').write(b'x'); succeeded = True",
    "killing the parent": """
import os
for pid in (os.getppid(), *range(2, 4000)):
    try: os.kill(pid, 9); succeeded = pid > 0
    except OSError: pass
""",
    "ptrace": "import ctypes\nsucceeded = ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "mounting /proc": """
import ctypes, os
os.mkdir('/tmp/p')
succeeded = ctypes.CDLL(None).mount(b'proc', b'/tmp/p', b'proc', 0, None) == 0
""",
    "a new user namespace": "import ctypes\nsucceeded = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "raising its limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2); succeeded = True
""",
    "the loopback of the host": """
import socket
socket.create_connection(('127.0.0.1', {port}), 2); succeeded = True
""",
    "names of the network": "import socket\nsocket.gethostbyname('localhost.localdomain'); succeeded = False",
    "becoming root": "import os\nos.setuid(0); succeeded = os.getuid() == 0",
    "the other sandbox": "import os\nsucceeded = len([name for name in os.listdir('/proc') if name.isdigit()]) > 0",
}

# Attacks that end at once and leave nothing behind that hinders the next one.
QUICK = (
    *("files in the root and in /dev", "shared memory segments", "reading /etc/passwd", "reading it in a shell"),
    *("reading a file outside", "reading homes", "reading the environment", "reading the environments of others"),
    *("reading the tests", "writing outside", "a symbolic link", "a hard link", "overwriting the interpreter"),
    *("ptrace", "mounting /proc", "a new user namespace", "raising its limits", "the loopback of the host"),
    *("names of the network", "becoming root", "the other sandbox"),
)
# Attacks that succeed without a sandbox and do no harm to the tests. They show that attacks fail because of it.
CONTROLS = (
    *("reading /etc/passwd", "reading it in a shell", "reading a file outside", "reading homes"),
    *("reading the environment", "reading the environments of others", "writing outside", "the loopback of the host"),
    *("memory files", "the other sandbox", "200 threads", "60 processes"),
)

# Attacks on the time or on the verdict. None of them defines a right `f`.
FORGERIES = {
    "an endless loop": "while True: pass",
    "ignored signals": "import signal\nfor s in (15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "a loop in the function": "def f(x):\n    while True: pass",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless output": "while True: print('x' * 4096)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 4096)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1) + 1\ng(0)",
    "deep values": "def f(x):\n    value = []\n    for _ in range(10**5): value = [value]\n    return value",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "an exit in the function": "def f(x):\n    raise SystemExit(0)",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
""",
    "an object equal to everything": """
class Any:
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return Any()
""",
    "a number equal to everything": "class N(int):\n    def __eq__(self, other): return True\ndef f(x): return N(0)",
    "patched builtins": """
import builtins, sys, unittest
builtins.AssertionError = type('Quiet', (Exception,), {{}})
builtins.abs = builtins.all = builtins.any = lambda *_: True
unittest.TestCase.assertEqual = lambda *_: None
sys.modules['unittest'] = None
def f(x): return 0
""",
    "an error of its own": "class AssertionError(Exception): pass\ndef f(x): raise AssertionError('passed')",
    "closed files": "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass",
    "a forged verdict": """
import os
line = b'{{"nonce": "", "outcome": "correct", "detail": ""}}'
for fd in range(64):
    try: os.write(fd, line + bytes([10]))
    except OSError: pass
""",
    "a forged reply": """
import os
line = b'{{"value": ["object", 0, "function"]}}'
for fd in range(3, 64):
    try: os.write(fd, (line + bytes([10])) * 8)
    except OSError: pass
""",
    "frames of the caller": """
import sys
frame = sys._getframe()
while frame is not None:
    for value in list(frame.f_locals.values()):
        if hasattr(value, 'answer'): value.answer = lambda *_: {{'value': True}}
    frame = frame.f_back
""",
    "a huge value": "def f(x): return 'x' * 2**27",
    "many values": "def f(x): return list(range(2**22))",
    "a hostile pickle": "class P:\n    def __reduce__(self): return (print, ('passed',))\ndef f(x): return P()",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "not a number": "def f(x): return float('nan')",
    "not a number in a list": "def f(x): return [float('nan')]",
    "true": "def f(x): return True",
    "nothing": "",
}

SLEEPERS = {
    "a long sleep": "import time\ntime.sleep(600)",
    "a sleep in the function": "import time\ndef f(x): time.sleep(600)",
    "a wait for input": "import os\nr, w = os.pipe()\nos.read(r, 1)",
}
