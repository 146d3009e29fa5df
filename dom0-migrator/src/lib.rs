//! Live migration that sends references in place of pages which lie on shared storage.
//!
//! `dom0-migrator` is the save helper that libxl starts (`LIBXL_SAVE_HELPER`), and the two commands that migrate with it.
//!
//! * [`engine`]: what stands in the stream between libxenguest and the network.

pub mod engine;
