"""Becomes the command it is given, as another user if asked, after arranging to be killed when its owner dies.

Run as a script: OWNER_PID UID GID SIGNAL COMMAND... (uid 0: stay who we are). A process of its own because
`preexec_fn` can deadlock in a threaded parent, warns from Python 3.12 on, and uvloop cannot change the user.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    owner, uid, gid, death_signal = map(int, sys.argv[1:5])
    command = sys.argv[5:]
    if uid:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        # After setuid, which clears it.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != owner:
            sys.exit("the owner died before its server started")
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
