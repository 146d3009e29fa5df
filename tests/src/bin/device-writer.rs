//! Root of an HVM guest that has its device model write into the guest's memory, again and again, each time where nothing was written
//! before: what is lost when the guest moves was not in the device model's log of dirty pages, for nobody else writes there.
//!
//! ```text
//! device-writer STOP         until there is something at the path STOP; meanwhile, now and then, a line `written N`;
//!                            then `N of M`: how many words of those that were written are there
//! ```
//!
//! A processor that QEMU emulates knows a program's right to a port only while its task register says "available", as the instruction that
//! loads it leaves it there. The hypervisor loads a register that says "busy", which is what processors have: after a migration, by whatever
//! helper, a program's `out` is a general protection fault. Then there is a line `refused after N`, and nothing is written from there on.
//!
//! The device is QEMU's firmware configuration (QEMU, docs/specs/fw_cfg.rst): by its DMA interface it puts an item where it is told to.
//! The item that every QEMU has is a signature of four bytes.

use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use enlightenment::PAGE_SIZE;

/// The address of what is to be done, high half and low half: the second one starts it.
const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;
/// What is to be done: select the item (its key, 0, is in the upper half) and read it.
const SELECT_AND_READ: u32 = 1 << 3 | 1 << 1;
/// What the item with the key 0 is.
const SIGNATURE: [u8; 4] = *b"QEMU";
/// Pages that are written to.
const PAGES: usize = 64;
/// How often it fits into them.
const MOST: usize = PAGES * PAGE_SIZE / SIGNATURE.len();
/// Between two times.
const PAUSE: Duration = Duration::from_millis(20);
/// Words from one line that says how many there are to the next.
const LINE: usize = 50;
/// `out dx, eax`, as the processor knows it.
const OUT: u8 = 0xef;

/// Whether the processor has refused a port.
static REFUSED: AtomicBool = AtomicBool::new(false);

fn main() -> Result<()> {
    let Some(stop) = std::env::args_os().nth(1) else {
        bail!("usage: device-writer STOP");
    };
    // SAFETY: it takes no pointers, and gives this thread the right to use twelve ports that no driver of this program's has.
    if unsafe { libc::ioperm(DMA_HIGH.into(), 8, 1) } != 0 {
        return Err(io::Error::last_os_error()).context("ioperm");
    }
    go_on_when_refused()?;
    let memory = Memory::locked()?;
    let mut written = 0;
    while !Path::new(&stop).exists() {
        if written < MOST && !REFUSED.load(Ordering::Relaxed) {
            if memory.have_written(written)? {
                written += 1;
                if written % LINE == 0 {
                    println!("written {written}");
                }
            } else {
                println!("refused after {written}");
            }
        }
        thread::sleep(PAUSE);
    }
    let there = (0..written).filter(|&index| memory.read(index) == SIGNATURE).count();
    println!("{there} of {written}");
    Ok(())
}

/// Pages that stay in memory: those that the device model writes to, and after them the one with what it is to do.
struct Memory {
    pages: *mut [u8; PAGE_SIZE],
    numbers: File,
}

impl Memory {
    fn locked() -> Result<Self> {
        let count = PAGES + 1;
        // Aligned as pages are.
        let room = vec![0_u8; (count + 1) * PAGE_SIZE].leak();
        let skip = room.as_ptr().align_offset(PAGE_SIZE);
        let pages = room[skip..].as_mut_ptr();
        // SAFETY: so many pages of `room` are there from `skip` on.
        if unsafe { libc::mlock(pages.cast(), count * PAGE_SIZE) } != 0 {
            return Err(io::Error::last_os_error()).context("mlock");
        }
        Ok(Self { pages: pages.cast(), numbers: File::open("/proc/self/pagemap")? })
    }

    /// Has the device model write the signature into the place with this index; whether the processor let it be asked.
    fn have_written(&self, index: usize) -> Result<bool> {
        let at = index * SIGNATURE.len();
        let to = self.physical(at / PAGE_SIZE)? + (at % PAGE_SIZE) as u64;
        let mut order = [0; 16];
        order[..4].copy_from_slice(&SELECT_AND_READ.to_be_bytes());
        order[4..8].copy_from_slice(&(SIGNATURE.len() as u32).to_be_bytes());
        order[8..].copy_from_slice(&to.to_be_bytes());
        // SAFETY: the page after those that are written to is there, and this program's alone.
        let place = unsafe { self.pages.add(PAGES).cast::<[u8; 16]>() };
        // SAFETY: likewise; volatile, since somebody else reads it.
        unsafe { place.write_volatile(order) };
        let from = self.physical(PAGES)?;
        write_port(DMA_HIGH, ((from >> 32) as u32).to_be());
        write_port(DMA_LOW, (from as u32).to_be());
        if REFUSED.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // SAFETY: as above. The device model sets the control word to 0 once it is done.
        let answer = unsafe { place.read_volatile() };
        ensure!(answer[..4] == [0; 4], "the device model answers {:02x?}: no fw_cfg with DMA?", &answer[..4]);
        Ok(true)
    }

    /// What is in the place with this index.
    fn read(&self, index: usize) -> [u8; 4] {
        // SAFETY: an index is below MOST, so the place is within the pages; volatile, since somebody else writes it.
        unsafe { self.pages.cast::<[u8; 4]>().add(index).read_volatile() }
    }

    /// Where a page lies now. Linux may move one, locked or not; not within the moment in which it is written to, or one word is lost in
    /// ten thousands.
    fn physical(&self, page: usize) -> Result<u64> {
        let address = self.pages as u64 / PAGE_SIZE as u64 + page as u64;
        let mut entry = [0; 8];
        self.numbers.read_exact_at(&mut entry, address * 8).context("/proc/self/pagemap")?;
        // Bits 0 to 54 are the frame's number (Linux, admin-guide/mm/pagemap).
        let number = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(number != 0, "a page has no number: this needs root");
        Ok(number * PAGE_SIZE as u64)
    }
}

/// Has a refused `out` skipped and noted.
fn go_on_when_refused() -> Result<()> {
    extern "C" fn refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let context = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel gives a handler with SA_SIGINFO the context of its thread, which is nobody else's meanwhile.
        let at = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
        // SAFETY: the thread was about to execute what is there.
        if unsafe { *(*at as *const u8) } != OUT {
            std::process::abort();
        }
        // The instruction is this one byte.
        *at += 1;
        REFUSED.store(true, Ordering::Relaxed);
    }
    // SAFETY: all zeros is an action without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = refused as *const () as usize;
    // SAFETY: the handler changes its thread's instruction pointer and one atomic, and calls nothing but abort.
    if unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error()).context("sigaction");
    }
    Ok(())
}

/// Writes 32 bits to a port.
fn write_port(port: u16, value: u32) {
    // SAFETY: only the two ports of the interface are given, which `main` has the right to; what the device then writes is volatile memory.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}
