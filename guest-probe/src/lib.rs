//! What lies in which frame of a running mysqld's buffer pool, and where on disk the same bytes are.
//!
//! ```text
//! process ── elf ── catalogue          which mysqld, its functions and structure offsets
//!    │
//!    ├─ probes ──────► events ─┐       each read, create, dirty, clean, free, by eBPF
//!    ├─ control_blocks ────────┴─► frame_table        begun from a snapshot, kept by events
//!    │        │                        │
//!    │        └── the truth at the moment of use ──► lists ──► device ──► the kernel module
//!    └─ spaces ── storage_map (fiemap, disk) ──────────┘
//!          file of a page      its place on the whole disk
//! ```
//!
//! **What holds.** mysqld is neither stopped nor changed: its memory is read, its functions are probed. All that is published is a
//! hint: a frame that is listed wrongly costs time, never a byte. The memory of this program is bounded by 32 MiB and 64
//! bytes a frame.

mod bytes;
pub mod catalogue;
pub mod command_line;
pub mod config;
pub mod control_blocks;
pub mod coverage;
pub mod derive;
pub mod device;
pub mod disk;
pub mod dm;
pub mod doctor;
pub mod elf;
#[path = "../../guest-probe-ebpf/src/event.rs"]
pub mod event;
pub mod exit;
pub mod fiemap;
pub mod frame_table;
pub mod left_out;
pub mod lists;
pub mod memory;
pub mod metrics;
pub mod page_cache;
pub mod privileges;
pub mod probes;
pub mod process;
pub mod report;
pub mod servers;
pub mod service;
pub mod session;
pub mod spaces;
pub mod statistics;
pub mod status;
pub mod storage_map;
pub mod urgency;
pub mod watch;
pub mod wrong_hints;
