"""The shipped controller and replicators in a world that is made up: seeded, in virtual time.

What is shipped runs as it is, shells and all: control loop, stream, store, catalogue watcher,
reader, runner, gate. What is modelled is what stands around it: clocks, the network, etcd, the
queue, the sink, and processes that crash, freeze and come back.
"""
