//! Integers at a fixed place of a byte slice; `None` past the end.

macro_rules! reader {
    ($(#[$doc:meta])* $name:ident, $type:ty, $from:ident) => {
        $(#[$doc])*
        pub fn $name(bytes: &[u8], at: usize) -> Option<$type> {
            let end = at.checked_add(size_of::<$type>())?;
            Some(<$type>::$from(bytes.get(at..end)?.try_into().ok()?))
        }
    };
}

reader!(
    /// As mysqld's memory has it.
    u32_le, u32, from_le_bytes
);
reader!(
    /// As mysqld's memory has it.
    u64_le, u64, from_le_bytes
);
reader!(
    /// As InnoDB's files have it.
    u16_be, u16, from_be_bytes
);
reader!(
    /// As InnoDB's files have it.
    u32_be, u32, from_be_bytes
);
reader!(
    /// As InnoDB's files have it.
    u64_be, u64, from_be_bytes
);
