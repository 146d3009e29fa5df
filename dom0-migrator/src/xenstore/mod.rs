//! A client of xenstore, the tree of small values that dom0 and its guests share.

mod client;
mod wire;

pub use client::{Store, StoreError, Xenstore};
