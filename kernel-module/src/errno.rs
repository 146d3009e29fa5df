//! The error numbers that user space sees.

/// A Linux error number, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// No such process, or one without memory of its own.
    pub const ESRCH: Self = Self(3);
    /// A fatal signal came meanwhile.
    pub const EINTR: Self = Self(4);
    /// Too many runs at once.
    pub const E2BIG: Self = Self(7);
    /// There is no request now.
    pub const EAGAIN: Self = Self(11);
    /// No memory for list pages.
    pub const ENOMEM: Self = Self(12);
    /// The argument does not lie in the caller's memory.
    pub const EFAULT: Self = Self(14);
    /// A field has a value that cannot be.
    pub const EINVAL: Self = Self(22);
    /// Unknown request to the device.
    pub const ENOTTY: Self = Self(25);
    /// Another version of the ABI.
    pub const EPROTONOSUPPORT: Self = Self(93);
    /// The generation is not the open one.
    pub const ESTALE: Self = Self(116);

    /// What a system call returns: `-errno`.
    pub const fn to_return(self) -> i64 {
        -(self.0 as i64)
    }
}
