//! An independent reading of all control blocks of a running mysqld 9.7.4-2 of Debian, through `/proc/PID/mem`: what the frame table is
//! held against. Nothing of guest-probe's own reader is used; the offsets are written down here once more.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

/// Bytes in a frame.
pub const PAGE: usize = 16_384;

/// `buf_pool_ptr`, relative to the load address.
const BUF_POOL_PTR: u64 = 0x495_1280;
/// In `buf_pool_t`.
const N_CHUNKS: u64 = 0x168;
const CHUNKS: u64 = 0x178;
/// A chunk is `{n_blocks, mem, blocks}`.
const CHUNK: u64 = 24;
/// Bytes in a `buf_block_t`.
const BLOCK: usize = 368;
/// `state` of a block that holds a page of a file.
const FILE_PAGE: u8 = 5;
/// `io_fix` while a page is read.
const READING: u8 = 1;

/// One control block.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Tablespace and page number.
    pub page: (u32, u32),
    /// Whether it holds a page of a file.
    pub is_file_page: bool,
    /// Whether that is compressed by row format.
    pub compressed: bool,
    /// Whether it is being read.
    pub reading: bool,
    /// `io_fix`.
    pub io_fix: u8,
    /// Threads that use it.
    pub fix_count: u32,
    /// Whether it has changes that are not on disk.
    pub dirty: bool,
}

/// A process's memory.
pub struct Memory {
    mem: File,
    load_address: u64,
}

impl Memory {
    /// Opens it.
    ///
    /// # Errors
    /// When there is no such mysqld.
    pub fn open(pid: i32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let load_address = maps
            .lines()
            .filter(|line| line.ends_with("/mysqld") || line.ends_with("/mysqld (deleted)"))
            .filter_map(|line| u64::from_str_radix(line.split('-').next()?, 16).ok())
            .min()
            .context("mysqld maps no mysqld")?;
        Ok(Self { mem: File::open(format!("/proc/{pid}/mem"))?, load_address })
    }

    /// Reads some bytes.
    ///
    /// # Errors
    /// When they are not there.
    pub fn read(&self, address: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.mem.read_exact_at(&mut bytes, address).with_context(|| format!("reading at {address:#x}"))?;
        Ok(bytes)
    }

    /// Reads bytes at an address of the ELF file.
    ///
    /// # Errors
    /// When they are not there.
    pub fn read_program(&self, address: u64, length: usize) -> Result<Vec<u8>> {
        self.read(self.load_address + address, length)
    }

    fn read_u64(&self, address: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(address, 8)?.try_into().unwrap_or_default()))
    }

    /// All control blocks by the address of their frame.
    ///
    /// # Errors
    /// When they are not where they should be.
    pub fn control_blocks(&self) -> Result<BTreeMap<u64, Block>> {
        let pool = self.read_u64(self.load_address + BUF_POOL_PTR)?;
        let count = self.read_u64(pool + N_CHUNKS)?;
        let chunks = self.read_u64(pool + CHUNKS)?;
        ensure!(count < 10_000, "{count} chunks");
        let mut found = BTreeMap::new();
        for chunk in 0..count {
            let blocks_in_chunk = self.read_u64(chunks + CHUNK * chunk)?;
            let blocks = self.read_u64(chunks + CHUNK * chunk + 16)?;
            ensure!(blocks_in_chunk < 10_000_000, "{blocks_in_chunk} blocks");
            let raw = self.read(blocks, blocks_in_chunk as usize * BLOCK)?;
            for block in raw.chunks_exact(BLOCK) {
                let u32_at =
                    |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
                found.insert(
                    u64_at(0x100),
                    Block {
                        page: (u32_at(0), u32_at(4)),
                        is_file_page: block[0x15] == FILE_PAGE,
                        compressed: block[0xe] & 2 != 0,
                        reading: block[0x14] == READING,
                        io_fix: block[0x14],
                        fix_count: u32_at(0x10),
                        dirty: u64_at(0x38) != 0,
                    },
                );
            }
        }
        Ok(found)
    }
}
