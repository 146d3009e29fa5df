//! The lab: two real Xen hosts under QEMU, a link between them, a disk that both see, and a guest with a warmed MySQL. There are two
//! kinds of it: a PV guest on Xen 4.17, and a PVH or an HVM guest on Xen 4.20.

mod cli;
mod clock;
mod debian;
mod dom0;
mod flavour;
mod frozen;
mod guest_disk;
mod guest_size;
mod kernel;
mod link;
mod machine;
mod modules;
mod prune;
mod qemu;
mod qmp;
mod raised;
mod run_dir;
mod shell;
pub mod ssh;
mod storage;

pub use cli::{Args, run};
pub use flavour::Flavour;
pub use guest_disk::get as guest_disk;
pub use guest_size::GuestSize;
pub use kernel::{Kernel, WORK};
pub use machine::Spawned;
pub use raised::{Lab, Options};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where the guest is when the lab comes up.
    Source,
    /// Where it is to go.
    Target,
}

impl Host {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Target];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }

    /// Its name where there are systems with names, as in the pages.
    pub const fn alias(self) -> &'static str {
        match self {
            Self::Source => "host-a",
            Self::Target => "host-b",
        }
    }

    /// Its address on the link between the hosts.
    pub const fn address(self) -> &'static str {
        match self {
            Self::Source => "10.9.0.1",
            Self::Target => "10.9.0.2",
        }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Target => 2,
        }
    }

    fn state_file(self) -> String {
        format!("{}.state", self.name())
    }
}
