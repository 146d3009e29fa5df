//! The disk that both hosts boot from.

/// The Debian suite of the hosts and of the guest's kernel.
pub(super) const SUITE: &str = "bookworm";
