//! The eBPF programs that guest-probe attaches to a running mysqld: one for each kind of event (`event.rs`), all into one ring
//! buffer. They know no build of mysqld: structure offsets come in as [`Layout`] when they are loaded.
#![no_std]
#![no_main]
// The tables and programs are named by what they hold and do; their contracts stand in `event.rs`.
#![allow(missing_docs)]

mod event;

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::bpf_probe_read_user;
use aya_ebpf::macros::{map, uprobe, uretprobe};
use aya_ebpf::maps::{PerCpuArray, RingBuf};
use aya_ebpf::programs::{ProbeContext, RetProbeContext};
use aya_ebpf::{EbpfContext, Global};
use aya_log_ebpf::debug;

use crate::event::{COUNTER_LOST, COUNTER_UNREADABLE, COUNTERS as COUNTER_COUNT, Event, EventKind, Layout};

/// Events on their way; the size is set at load.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// What went wrong, per processor.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

#[unsafe(no_mangle)]
static LAYOUT: Global<Layout> = Global::new(Layout {
    block_page_id: 0,
    block_io_fix: 0,
    block_state: 0,
    block_frame: 0,
    node_space: 0,
    space_id: 0,
    io_fix_read: 0,
    state_file_page: 0,
    reserved: [0; 2],
    wake_at: 0,
});

/// `buf_page_io_complete(bpage, …)`: a read or a write is done; reads are told.
#[uprobe]
pub fn read_complete(ctx: ProbeContext) -> u32 {
    let layout = LAYOUT.load();
    let Some(block) = ctx.arg::<u64>(0) else { return 0 };
    match read_user::<u8>(block, layout.block_io_fix) {
        Some(io_fix) if io_fix == layout.io_fix_read => {
            tell_block(&ctx, EventKind::ReadComplete, block, &layout);
        }
        Some(_) => {}
        None => unreadable(&ctx, block),
    }
    0
}

/// `buf_page_create(…)` has returned a control block.
#[uretprobe]
pub fn page_create(ctx: RetProbeContext) -> u32 {
    tell_block(&ctx, EventKind::Create, ctx.ret::<u64>(), &LAYOUT.load());
    0
}

/// `buf_flush_insert_into_flush_list(pool, block, lsn)`.
#[uprobe]
pub fn page_dirty(ctx: ProbeContext) -> u32 {
    if let Some(block) = ctx.arg::<u64>(1) {
        tell_block(&ctx, EventKind::Dirty, block, &LAYOUT.load());
    }
    0
}

/// `buf_flush_remove(bpage)`.
#[uprobe]
pub fn page_clean(ctx: ProbeContext) -> u32 {
    if let Some(block) = ctx.arg::<u64>(0) {
        tell_block(&ctx, EventKind::Clean, block, &LAYOUT.load());
    }
    0
}

/// `buf_LRU_block_free_non_file_page(block)`: the page id in the block may be reset already, so the frame alone counts.
#[uprobe]
pub fn frame_free(ctx: ProbeContext) -> u32 {
    let layout = LAYOUT.load();
    let Some(block) = ctx.arg::<u64>(0) else { return 0 };
    match read_user::<u64>(block, layout.block_frame) {
        Some(frame) => tell(&ctx, EventKind::Free, frame, 0, 0, &layout),
        None => unreadable(&ctx, block),
    }
    0
}

/// `Fil_shard::open_file(this, node)`.
#[uprobe]
pub fn file_open(ctx: ProbeContext) -> u32 {
    let layout = LAYOUT.load();
    let Some(node) = ctx.arg::<u64>(1) else { return 0 };
    let id =
        read_user::<u64>(node, layout.node_space).and_then(|space| read_user::<u32>(space, layout.space_id));
    match id {
        Some(id) => tell(&ctx, EventKind::FileOpen, 0, id, 0, &layout),
        None => unreadable(&ctx, node),
    }
    0
}

/// `buf_pool_t::allocate_chunk(…)` and `buf_pool_t::deallocate_chunk(…)`.
#[uprobe]
pub fn pool_resize(ctx: ProbeContext) -> u32 {
    tell(&ctx, EventKind::Resize, 0, 0, 0, &LAYOUT.load());
    0
}

/// Tells of a page in a frame; of one that is in the pool compressed alone there is nothing to tell.
#[inline(always)]
fn tell_block<C: EbpfContext>(ctx: &C, kind: EventKind, block: u64, layout: &Layout) {
    match read_user::<u8>(block, layout.block_state) {
        Some(state) if state == layout.state_file_page => {}
        Some(_) => return,
        None => return unreadable(ctx, block),
    }
    let id = read_user::<[u32; 2]>(block, layout.block_page_id);
    let frame = read_user::<u64>(block, layout.block_frame);
    match (id, frame) {
        (Some([space, page]), Some(frame)) => tell(ctx, kind, frame, space, page, layout),
        _ => unreadable(ctx, block),
    }
}

#[inline(always)]
fn tell<C: EbpfContext>(ctx: &C, kind: EventKind, frame: u64, space: u32, page: u32, layout: &Layout) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        count(COUNTER_LOST);
        debug!(ctx, "the ring buffer is full: event {} of the frame at {:x} is lost", kind as u32, frame);
        return;
    };
    entry.write(Event { frame, space, page, kind: kind as u32, reserved: 0 });
    entry.submit(wake_or_not(layout));
}

/// The reader comes by in its own time; it is woken only around the moment when the buffer becomes `wake_at` bytes full. Not from
/// there on at every event: one wake-up is enough, and each costs a third of a microsecond and more.
#[inline(always)]
fn wake_or_not(layout: &Layout) -> u64 {
    let waiting = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let over = waiting.wrapping_sub(u64::from(layout.wake_at));
    u64::from(if over < 4096 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP })
}

#[inline(always)]
fn read_user<T>(base: u64, offset: u32) -> Option<T> {
    let address = base.wrapping_add(u64::from(offset)) as *const T;
    // SAFETY: the helper takes any address and fails for one that cannot be read; any bytes are a `T` here (integers only).
    unsafe { bpf_probe_read_user(address) }.ok()
}

#[inline(always)]
fn unreadable<C: EbpfContext>(ctx: &C, address: u64) {
    count(COUNTER_UNREADABLE);
    debug!(ctx, "no structure can be read at {:x}", address);
}

#[inline(always)]
fn count(counter: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter) {
        // SAFETY: the slot is this processor's own, and a program run is not moved to another processor.
        unsafe { *value += 1 };
    }
}

/// The licence that the kernel reads: its tracing helpers are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
