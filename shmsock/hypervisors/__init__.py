"""How hypervisors are told to give a region to a guest: arguments of QEMU, XML of libvirt."""
