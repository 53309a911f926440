"""The bare bytes of a region, without sockets: python raw_bar2.py REGION OFFSET [VALUE [force]]

REGION is pci:auto for the one ivshmem device of a guest, or a file on the host. With VALUE the byte is
written, else it is read. In a region that shmsock formatted nothing is written, unless by force: that breaks
it for all who use it.
"""

import sys

import shmsock


def main() -> None:
    region, offset, *value = sys.argv[1:]
    with shmsock.open_region(region, writable=bool(value), force=value[1:] == ["force"]) as memory:
        if value:
            memory[int(offset)] = int(value[0])
        print(f"byte {offset} of {len(memory)}: {memory[int(offset)]}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    try:
        main()
    except (OSError, ValueError, IndexError) as problem:
        sys.exit(f"raw_bar2: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
