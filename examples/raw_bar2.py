"""The bare bytes of a region, without sockets: python raw_bar2.py REGION OFFSET [VALUE]

REGION is pci:auto for the one ivshmem device of a guest, or a file on the host. With VALUE the byte is
written, else it is read. A region that shmsock formatted is not to be written to.
"""

import sys

import shmsock


def main() -> None:
    region, offset, *value = sys.argv[1:]
    with shmsock.open_region(region, writable=bool(value)) as memory:
        if value:
            memory[int(offset)] = int(value[0])
        print(f"byte {offset} of {len(memory)}: {memory[int(offset)]}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main()
    except (OSError, ValueError, IndexError) as problem:
        sys.exit(f"raw_bar2: {problem}")
