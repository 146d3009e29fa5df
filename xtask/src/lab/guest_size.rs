//! How large the guest is. The lab's own is small, so that a demo is short; figures want the proportion of the research, a pool of 70 % of
//! the memory.

use anyhow::{Result, ensure};

use super::guest_disk::TABLES;

/// Memory of the guest, and what of it is the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSize {
    memory_mib: u32,
    pool_mib: u32,
}

/// What the pool may be rounded to: `innodb_buffer_pool_chunk_size` (`files/my.cnf`).
const CHUNK_MIB: u32 = 32;

/// What a guest's kernel and server need beside the pool. With 256 MiB the last of the tables is never read into the pool: the guest
/// reads the server's own pages from the disk again and again.
const BESIDE_MIB: u32 = 320;

/// What the hosts have for a guest: their memory without dom0's and the hypervisor's own (`qemu.rs`).
const MOST_MIB: u32 = 1120;

impl Default for GuestSize {
    fn default() -> Self {
        Self { memory_mib: 704, pool_mib: 256 }
    }
}

impl GuestSize {
    /// A guest of another size than the lab's own.
    ///
    /// # Errors
    /// When the pool is no multiple of its chunks, leaves the guest too little, or the hosts have no room for it.
    pub fn new(memory_mib: u32, pool_mib: u32) -> Result<Self> {
        ensure!(
            memory_mib <= MOST_MIB,
            "a guest of {memory_mib} MiB: the hosts have room for {MOST_MIB} MiB at most"
        );
        ensure!(
            pool_mib >= 4 * CHUNK_MIB && pool_mib.is_multiple_of(CHUNK_MIB),
            "a pool of {pool_mib} MiB: it must be a multiple of {CHUNK_MIB} MiB, and at least {} MiB",
            4 * CHUNK_MIB
        );
        ensure!(
            pool_mib.saturating_add(BESIDE_MIB) <= memory_mib,
            "a pool of {pool_mib} MiB in a guest of {memory_mib} MiB: kernel and server need {BESIDE_MIB} MiB beside it"
        );
        Ok(Self { memory_mib, pool_mib })
    }

    /// Memory, in bytes.
    pub const fn memory_bytes(self) -> u64 {
        (self.memory_mib as u64) << 20
    }

    /// `innodb_buffer_pool_size`, in bytes.
    pub const fn pool_bytes(self) -> u64 {
        (self.pool_mib as u64) << 20
    }

    /// sysbench's tables.
    pub const fn tables(self) -> u32 {
        TABLES
    }

    /// Rows of each of sysbench's tables: so many that with both of their indexes they just fit into the pool, for what has to be
    /// evicted for the next table would have to be read again, slowly, by every query over all of them.
    pub const fn rows(self) -> u32 {
        240_000 / 256 * self.pool_mib + 240_000 % 256 * self.pool_mib / 256
    }

    /// Size of the whole disk: the server's root, twice the tables (one load more, and its logs), and some room.
    pub(super) const fn disk_bytes(self) -> u64 {
        (1024 + 2 * self.pool_mib as u64) << 20
    }

    /// The server's configuration for this pool.
    pub(super) fn configuration(self, of_the_small_guest: &str) -> String {
        let small = Self::default().pool_mib;
        of_the_small_guest.replace(
            &format!("innodb_buffer_pool_size={small}M"),
            &format!("innodb_buffer_pool_size={}M", self.pool_mib),
        )
    }

    /// What `xl create` is told beside the guest's file, which is the small guest's.
    pub(super) fn overrides(self) -> String {
        if self == Self::default() {
            String::new()
        } else {
            format!(" 'memory={0}' 'maxmem={0}'", self.memory_mib)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lab_s_own_guest_is_what_its_files_say() {
        let size = GuestSize::default();
        assert!(include_str!("files/db1.cfg").contains(&format!("\nmemory = {}\n", size.memory_mib)));
        let file = include_str!("files/my.cnf");
        assert_eq!(size.configuration(file), file);
        assert_eq!((size.rows(), size.disk_bytes(), size.overrides()), (240_000, 1536 << 20, String::new()));
    }

    #[test]
    fn another_guest_has_its_pool_in_the_configuration() {
        let size = GuestSize::new(1120, 768).unwrap();
        assert!(
            size.configuration(include_str!("files/my.cnf")).contains("\ninnodb_buffer_pool_size=768M\n")
        );
        assert_eq!(size.rows(), 720_000);
        assert_eq!(size.overrides(), " 'memory=1120' 'maxmem=1120'");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (memory, pool) in
            [(4096, 256), (704, 250), (704, 640), (896, 640), (704, 32), (704, u32::MAX - 31)]
        {
            assert!(GuestSize::new(memory, pool).is_err(), "{memory} {pool}");
        }
    }
}
