//! The lab: two real Xen hosts under QEMU, a link between them, a disk that both see, and a PV guest with a warmed MySQL.

mod cli;
mod clock;
mod dom0;
mod frozen;
mod guest_disk;
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

pub use cli::{Args, run};
pub use guest_disk::get as guest_disk;
pub use kernel::{guest_kernel_release, kernel_headers};
pub use machine::Spawned;
pub use raised::{Lab, Options};

/// The guest's memory (`files/db1.cfg`).
pub const GUEST_MEMORY_BYTES: u64 = 704 << 20;

/// Its server's buffer pool (`files/my.cnf`).
pub const GUEST_POOL_BYTES: u64 = 256 << 20;

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
