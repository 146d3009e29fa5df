//! Shared parts of the tests that need a database, a kernel or a hypervisor.
