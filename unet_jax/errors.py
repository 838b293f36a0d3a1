"""What a user can mend is an InputError: one line that says what is wrong and what to do."""

import contextlib
import errno
import sys
from collections.abc import Iterator

# What a disk may refuse.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


class InputError(Exception):
    """Bad input. Its message is one line for the user: what is wrong, and what to do about it."""


@contextlib.contextmanager
def exit_on_input_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Turns an InputError (or a full disk) into one line on stderr and exit status 2, for the experiments' `main`.

    `interrupted` is what Ctrl-C prints, with exit status 1.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (*STORAGE, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        advice = "free some room or choose another folder" if error.errno in STORAGE else "choose another name"
        message = f"{error.strerror}: {error.filename or 'writing a file'}; {advice}"
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)  # by itself: not every process lives to print an exit's text
        sys.exit(1)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
