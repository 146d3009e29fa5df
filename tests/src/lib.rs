//! What the tests against a real mysqld stand on: a server of its own in a mount namespace of its own, on a partition of a loop
//! device, under sysbench load; and an independent reading of all its control blocks.
//!
//! They need root and `POOLSKIP_MYSQL_ROOT`, an unpacked root with mysqld and sysbench; `cargo xtask test` makes one and sets it.
//! Everything that is started or mounted ends with the test, whatever way it ends: servers and loads die with the thread that started
//! them, mounts with the namespace of their server, loop devices with their last user.

pub mod disk;
pub mod fake_device;
pub mod hostile;
pub mod kernel;
pub mod listed;
pub mod running;
pub mod scale;
pub mod server;
pub mod storage;
pub mod tpcc;
pub mod truth;
