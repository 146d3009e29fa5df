//! Numbers in bytes: list pages, and the arguments of `ioctl(2)` as they lie in the caller's memory.
//!
//! All offsets come from this crate or from `offset_of!`; one that lay past the end would read as 0 and write nothing,
//! which keeps panics out of the kernel.

use core::mem::offset_of;

use enlightenment::device::{Add, Begin, Publish, Request, Stats, UserRun};

/// Copies `from` to `at`.
pub fn put(bytes: &mut [u8], at: usize, from: &[u8]) {
    if let Some(to) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..from.len())) {
        to.copy_from_slice(from);
    }
}

/// Writes a 32-bit number at `at`.
pub fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_le_bytes());
}

/// Writes a 64-bit number at `at`.
pub fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    put(bytes, at, &value.to_le_bytes());
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

/// Reads a 32-bit number at `at`.
pub fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}

/// Reads a 64-bit number at `at`.
pub fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}

/// [`Begin`] from its bytes.
pub fn begin(bytes: &[u8; size_of::<Begin>()]) -> Begin {
    Begin {
        version: get_u32(bytes, offset_of!(Begin, version)),
        flags: get_u32(bytes, offset_of!(Begin, flags)),
        generation: get_u64(bytes, offset_of!(Begin, generation)),
    }
}

/// [`Add`] from its bytes.
pub fn add(bytes: &[u8; size_of::<Add>()]) -> Add {
    Add {
        generation: get_u64(bytes, offset_of!(Add, generation)),
        runs: get_u64(bytes, offset_of!(Add, runs)),
        count: get_u32(bytes, offset_of!(Add, count)),
        pid: i32::from_le_bytes(get(bytes, offset_of!(Add, pid))),
        pages_listed: get_u64(bytes, offset_of!(Add, pages_listed)),
        pages_unmapped: get_u64(bytes, offset_of!(Add, pages_unmapped)),
    }
}

/// [`Publish`] from its bytes.
pub fn publish(bytes: &[u8; size_of::<Publish>()]) -> Publish {
    Publish {
        generation: get_u64(bytes, offset_of!(Publish, generation)),
        answers: get_u64(bytes, offset_of!(Publish, answers)),
        frames_read: get_u64(bytes, offset_of!(Publish, frames_read)),
        frames_written: get_u64(bytes, offset_of!(Publish, frames_written)),
        pool_frames_clean: get_u64(bytes, offset_of!(Publish, pool_frames_clean)),
        pool_frames: get_u64(bytes, offset_of!(Publish, pool_frames)),
    }
}

/// The [`UserRun`] at place `i` of an array.
pub fn user_run(array: &[u8], i: usize) -> UserRun {
    let bytes: [u8; size_of::<UserRun>()] = get(array, i * size_of::<UserRun>());
    UserRun {
        address: get_u64(&bytes, offset_of!(UserRun, address)),
        disk_offset: get_u64(&bytes, offset_of!(UserRun, disk_offset)),
        vdev: get_u32(&bytes, offset_of!(UserRun, vdev)),
        pages: u16::from_le_bytes(get(&bytes, offset_of!(UserRun, pages))),
        list: bytes[offset_of!(UserRun, list)],
        reserved: bytes[offset_of!(UserRun, reserved)],
    }
}

/// [`Stats`] as bytes.
pub fn stats_bytes(stats: &Stats) -> [u8; size_of::<Stats>()] {
    let mut out = [0; size_of::<Stats>()];
    for (at, value) in [
        (offset_of!(Stats, generations), stats.generations),
        (offset_of!(Stats, pages_translated), stats.pages_translated),
        (offset_of!(Stats, pages_unmapped), stats.pages_unmapped),
        (offset_of!(Stats, requests), stats.requests),
        (offset_of!(Stats, signals), stats.signals),
        (offset_of!(Stats, list_pages), stats.list_pages),
        (offset_of!(Stats, root_pfn), stats.root_pfn),
        (offset_of!(Stats, xen), stats.xen),
        (offset_of!(Stats, calls), stats.calls),
        (offset_of!(Stats, migrating), stats.migrating),
        (offset_of!(Stats, untold), stats.untold),
        (offset_of!(Stats, requests_forgotten), stats.requests_forgotten),
    ] {
        put_u64(&mut out, at, value);
    }
    out
}

/// [`Request`] as bytes.
pub fn request_bytes(request: &Request) -> [u8; size_of::<Request>()] {
    let mut out = [0; size_of::<Request>()];
    put_u64(&mut out, offset_of!(Request, sequence), request.sequence);
    put_u32(&mut out, offset_of!(Request, kind), request.kind);
    put_u32(&mut out, offset_of!(Request, reserved), request.reserved);
    out
}
